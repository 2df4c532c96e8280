"""Properties of an adapter's life: merging, switching, weighting, saving and loading, a program of steps each."""

from collections.abc import Mapping, Sequence
from typing import Any

from refpeft.conformance import tiny
from refpeft.conformance.property import Property, Steps, do, life, two
from refpeft.conformance.strategies import Structure


def weighted(how: str, *weights: list[float]) -> Steps:
    """One sum after the other, each under a name of its own."""
    both = ["first", "second"]
    return [do("weighted", adapter=f"{how}{n}", of=both[: len(w)], weights=w, how=how) for n, w in enumerate(weights)]


def head(s: Structure) -> Structure:
    return {"modules_to_save": [tiny.HEAD[s["family"]]]}


def prefixes(s: Structure) -> Mapping[str, Any]:
    return {"foo": two(s)["first"], "foobar": two(s)["second"]}


def overlapping(s: Structure) -> Structure:
    """One layer named before a pattern for all: the first that matches wins, so their order is part of the meaning."""
    names = s["config"]["target_modules"]
    return {"alpha_pattern": {names[0]: 12.0, f"({'|'.join(names)})": 3.0}}


FIRST, BOTH = [do("add", adapter="first")], [do("add", adapter="first"), do("add", adapter="second")]
FOO = [do("add", adapter="foo"), do("add", adapter="foobar")]
LIFE: Sequence[Property] = [
    life("merge-twice", "Merging twice merges once.", [[*FIRST, do("merge"), do("merge")]], ["merge"]),
    life("safe-merge", "A merge with a check for nan merges the same.", [[*FIRST, do("merge", safe=True)]], ["merge"]),
    life(
        "refused-merge",
        "A merge with a check for nan refuses an adapter that has one, and changes nothing.",
        [[*FIRST, do("refused_merge", adapter="first"), do("merge")]],
        ["merge", "change"],
    ),
    life(
        "unmerge",
        "Merge and unmerge, any number of times, and the adapter runs as before.",
        [[*FIRST, do("merge"), do("unmerge")], [*FIRST, *[do("merge"), do("unmerge")] * 2]],
        ["merge", "unmerge"],
    ),
    life(
        "disable",
        "Disabled is the base, whatever was done before; enabled is back.",
        [
            [*FIRST, do("disable"), do("enable")],
            [*BOTH, do("activate", adapters=["second"]), do("disable"), do("enable")],
        ],
        ["disable"],
    ),
    life(
        "modules-to-save",
        "A module trained whole is used while its adapter is active, and only then.",
        [[*FIRST, do("disable"), do("enable")]],
        ["disable", "modules_to_save"],
        configs=head,
        architectures=(tiny.CLASSIFIER,),
    ),
    life(
        "switch",
        "After switching, the other adapter runs, with its own rank and scale.",
        [
            [*BOTH, do("activate", adapters=["second"])],
            [*BOTH, do("activate", adapters=["second"]), do("activate", adapters=["first"])],
        ],
        ["several"],
    ),
    life(
        "two-active",
        "Two adapters active are both of them, composed as the method says, and one of them again is one.",
        [[*BOTH, do("activate", adapters=["first", "second"]), do("activate", adapters=["second"])]],
        ["together"],
        ["L4", "D5", "ID3", "IA3", "LH5", "LK5", "OF6", "BO7", "VE3", "AL3"],
    ),
    life(
        "two-merged",
        "Two active adapters merged are two active adapters, and come apart again.",
        [[*BOTH, do("activate", adapters=["first", "second"]), do("merge"), do("unmerge")]],
        ["together", "merge", "unmerge"],
        ["L4", "D5", "ID3", "IA3", "LH5", "LK5", "OF6", "BO7", "VE3", "AL3"],
    ),
    life(
        "delete",
        "A deleted adapter is gone, and the others are as before.",
        [[*BOTH, do("activate", adapters=["first"]), do("delete", adapter="second")]],
        ["several", "delete"],
    ),
    life(
        "weighted",
        "A weighted sum of adapters is the sum of the weighted ΔW; weight 0 adds nothing, weight −w subtracts.",
        [
            [
                *BOTH,
                *weighted("linear", [1.0, 0.0], [0.5], [-1.0]),
                *weighted("cat", [1.0, 1.0], [0.5, -0.25], [0.0, 1.0]),
            ]
        ],
        ["several", "weighted"],
        ["L3"],
        adapters=lambda s: {"first": s["config"], "second": s["config"]},
        methods=["lora", "rslora"],
    ),
    life(
        "weighted-patterns",
        "Adapters side by side, each with weight 1, are both of them: what a pattern scales is scaled once.",
        [[*BOTH, *weighted("cat", [1.0, 1.0])]],
        ["several", "weighted", "patterns"],
        ["L3"],
        adapters=lambda s: {"first": s["config"], "second": s["config"]},
        configs=lambda s: {"alpha_pattern": {s["config"]["target_modules"][0]: 12.0}},
        methods=["lora"],
    ),
    life(
        "save-load",
        "Saved and loaded beside each other, adapters whose names contain each other are as before.",
        [
            [
                *FOO,
                do("save", adapter="foo"),
                do("save", adapter="foobar"),
                do("load", adapters=["foo", "foobar"]),
                do("activate", adapters=["foobar"]),
            ]
        ],
        ["several", "save"],
        adapters=prefixes,
    ),
    life(
        "saved-keys",
        "The file of an adapter holds exactly its own tensors, by HF peft's names.",
        [[*FOO, do("save", adapter="foo")]],
        ["several", "save"],
        adapters=prefixes,
    ),
    life(
        "saved-modules",
        "Modules trained whole are saved and loaded with the adapter they belong to.",
        [[*FOO, do("save", adapter="foo"), do("save", adapter="foobar"), do("load", adapters=["foobar", "foo"])]],
        ["several", "save", "modules_to_save"],
        adapters=prefixes,
        configs=head,
        architectures=(tiny.CLASSIFIER,),
    ),
    life(
        "saved-patterns",
        "Patterns that match the same layer mean the same after saving and loading: the first still wins.",
        [[*FIRST, do("save", adapter="first"), do("load", adapters=["first"])]],
        ["save", "patterns"],
        adapters=lambda s: {"first": s["config"]},
        configs=overlapping,
    ),
    life(
        "change",
        "Parameters that change between steps are seen by the next step, merged or not.",
        [
            [*FIRST, do("change", adapter="first"), do("merge"), do("unmerge")],
            [*FIRST, do("merge"), do("unmerge"), do("change", adapter="first")],
        ],
        ["change", "merge", "unmerge"],
        changed=["first"],
    ),
]
