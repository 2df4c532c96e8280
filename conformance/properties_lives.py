"""Properties of an adapter's life: merging, switching, weighting, saving and loading, a program of steps each."""

from collections.abc import Sequence

from refpeft.conformance.property import FIRST, FOO, Property, Steps, do, life, prefixes
from refpeft.conformance.strategies import Structure


def weighted(how: str, *weights: list[float]) -> Steps:
    """One sum after the other, each under a name of its own."""
    both = ["first", "second"]
    return [do("weighted", adapter=f"{how}{n}", of=both[: len(w)], weights=w, how=how) for n, w in enumerate(weights)]


def overlapping(s: Structure) -> Structure:
    """One layer named before a pattern for all: the first that matches wins, so their order is part of the meaning."""
    names = s["config"]["target_modules"]
    return {"alpha_pattern": {names[0]: 12.0, f"({'|'.join(names)})": 3.0}}


BOTH = [*FIRST, do("add", adapter="second")]
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
        ["L4", "D5", "ID3", "IA3", "LH5", "LK5", "GL6", "DY6", "OF6", "BO7", "VE3", "AL3"],
    ),
    life(
        "two-merged",
        "Two active adapters merged are two active adapters, and come apart again.",
        [[*BOTH, do("activate", adapters=["first", "second"]), do("merge"), do("unmerge")]],
        ["together", "merge", "unmerge"],
        ["L4", "D5", "ID3", "IA3", "LH5", "LK5", "GL6", "DY6", "OF6", "BO7", "VE3", "AL3"],
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
