"""What stories are told on: everything awkward about models does occur, among what is always asked, and is adapted."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from refpeft.conformance import staging, stories, telling
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import FEATURES
from refpeft.conformance.targets.spec import Spec
from refpeft.conformance.targets.spec_stories import Folding, Story
from refpeft.conformance.traits import TRAITS
from refpeft.conformance.yardstick import UNIT, Yardstick
from refpeft.method import matches

INFO = Spec().info()
PROPERTIES = {p.name: p for p in stories.STORIES}
CHAINED = sorted(m for m in staging.CASTS if "chain" not in TRAITS[m].lacks)
LINEAR = {**INFO, "features": [f for f in INFO["features"] if f not in ("conv1d", "embedding")]}


def always(method: str, info: Mapping[str, Any], *names: str) -> Iterator[Case]:
    info = {**info, "features": [f for f in info["features"] if f not in TRAITS[method].lacks]}
    for name in names or PROPERTIES:
        if PROPERTIES[name].applies(method):
            for s in PROPERTIES[name].corners(method, info):
                yield PROPERTIES[name].case(method, s, 0)


def adapted(case: Case) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Layers that an adapter of the story is on."""
    for path, about in case.meta["model"]["layers"].items():
        if any(matches(a["config"]["target_modules"], path) for a in case.meta["adapters"].values()):
            yield path, about


def awkward(case: Case) -> Iterator[str]:
    """What is awkward about the model or the adapters of a story, of what its adapters are on."""
    on, configs = dict(adapted(case)), [a["config"] for a in case.meta["adapters"].values()]
    order, layers = case.meta["model"]["order"], case.meta["model"]["layers"]
    told = {
        "tied": "tied_to" in layers["head"],
        "runs twice": any(order.count(path) > 1 for path in on),
        "name begins another": any(p != q and q.startswith(p) for p in on for q in layers),
        "name ends another": any(p != q and q.endswith("." + p) for p in on for q in layers),
        "Conv1D": any(about["kind"] == "conv1d" for about in on.values()),
        "Conv1D beside Linear": {"conv1d", "linear"} <= {about["kind"] for about in on.values()},
        "square": any(about["in"] == about["out"] for about in on.values()),
        "square Conv1D": any(about["kind"] == "conv1d" and about["in"] == about["out"] for about in on.values()),
        "not square": any(about["in"] != about["out"] for about in on.values()),
        "bias and none": {True, False} <= {about["bias"] for about in on.values()},
        "adapter's name begins another": len(case.meta["adapters"]) > 1,
        "head trained whole": any("modules_to_save" in c for c in configs),
        "head of one only": 0 < sum("modules_to_save" in c for c in configs) < len(configs),
        "several layers": any(len(c["target_modules"]) > 1 for c in configs),
    }
    yield from (name for name, holds in told.items() if holds)


@pytest.mark.parametrize("method", CHAINED)
def test_all_that_is_awkward_occurs(method: str) -> None:
    """At least twice among the stories that are always told; where all layers are Linear, with two exceptions."""
    found = Counter(trait for case in always(method, INFO) for trait in awkward(case))
    assert min(found.values()) >= 2, found
    assert len(found) == 14
    linear = Counter(trait for case in always(method, LINEAR) for trait in awkward(case))
    assert found.keys() - linear.keys() == {"Conv1D", "Conv1D beside Linear", "square Conv1D"}
    assert min(linear.values()) >= 2, linear


def test_every_method_of_the_suite_that_has_stories_has_a_cast() -> None:
    asked = {m for m in TRAITS if any(p.applies(m) for p in stories.STORIES)}
    assert asked == set(staging.CASTS)
    assert len(asked) == 18
    assert set(staging.RELEVANT) <= set(FEATURES)


def test_adapters_of_a_cast_differ_and_are_told_what_their_layers_leave_possible() -> None:
    for method in ("loha", "oft", "ia3"):
        configs = [staging.plainly(method, n, [{}], staging.TARGETS, {}) for n in range(6)]
        assert all(c["foo"] != c["foobar"] for c in configs) or method == "ia3"
    sides = {len(c["feedforward_modules"]) for s in configs for c in s.values()}
    assert sides == {0, 1}
    assert staging.dividing({"target_modules": ["down"], "oft_block_size": 4})["oft_block_size"] == 2


def test_what_a_target_lacks_is_not_told() -> None:
    lacks = {**INFO, "features": [f for f in INFO["features"] if f not in staging.RELEVANT]}
    several, heirs = 0, 0
    for case in always("lora", lacks, "any-order", "files"):
        merged, active = False, list[str]()
        for step in case.meta["steps"]:
            if step["do"] in ("activate", "disable", "delete"):
                assert not merged
            if step["do"] == "activate":
                active = step["adapters"]
                several += len(active) > 1
            active = active or [step["adapter"]] if step["do"] == "add" else active
            heirs += step["do"] == "delete" and step["adapter"] in active
            merged = step["do"] == "merge" or (merged and step["do"] != "unmerge")
        assert all(about["kind"] != "conv1d" for about in case.meta["model"]["layers"].values())
    assert several == heirs == 0


def test_prompts_have_stories_on_a_transformer_and_libraries_without_chains_too() -> None:
    unchained = {**INFO, "features": [f for f in FEATURES if f != "chain"]}
    for method, info in (("prompt_tuning", INFO), ("lora", unchained)):
        case = next(always(method, {**info, "families": ["bert"]}, "files"))
        assert case.meta["model"]["model_type"] == "bert"


# ── in 16 bits ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", CHAINED)
def test_in_16_bits_the_model_is_and_what_is_trained_is_not(method: str) -> None:
    for case in always(method, INFO, "sixteen-bits"):
        assert UNIT[case.meta["dtype"]] > UNIT["float32"]
        for name, a in case.arrays.items():
            half = name.startswith(("model/", "dout")) or name.endswith("/head.weight")
            if name != "ids":
                assert (a.dtype.name == case.meta["dtype"]) == half, name


def test_folding_rounds_what_is_merged_and_leaves_what_that_took_away() -> None:
    """Before a merge the formula, after it a little else, and of what is merged and taken out again the rest stays."""
    (case, *_) = always("lora", INFO, "sixteen-bits")
    assert [step["do"] for step in case.meta["steps"]][:3] == ["add", "merge", "unmerge"]
    exact, folded = Story(case.in_float64()).run(case.meta["steps"]), Folding(case).run(case.meta["steps"])
    off = [float(np.abs(exact[f"{k}/logits"] - folded[f"{k}/logits"]).max()) for k in range(3)]
    assert off[0] == 0
    assert 0 < off[1] < 0.1
    assert 0 < off[2] < 0.1
    rounded = Folding(Case({**case.meta, "dtype": "float64"}, case.arrays)).run(case.meta["steps"])
    assert max(np.abs(exact[n] - rounded[n]).max() for n in exact) < 1e-12


def test_the_limit_of_a_story_in_16_bits_does_not_grow_with_its_merges() -> None:
    for case in always("lora", INFO, "sixteen-bits", "any-order"):
        merges = sum(step["do"] == "merge" for step in case.meta["steps"])
        half = UNIT[case.meta["dtype"]] > UNIT["float32"]
        assert Yardstick(case).limit == (10 if half else 10 * (1 + merges))
        assert Yardstick(case).folds == (half and merges > 0)


def test_an_average_is_of_adapters_of_one_config() -> None:
    seen = Counter[int]()
    for method in ("ia3", "lora", "houlsby"):
        for case in always(method, INFO, "averaged"):
            for step in case.meta["steps"]:
                if step["do"] == "average":
                    seen[len(step["of"])] += 1
                    configs = [case.meta["adapters"][n]["config"] for n in step["of"]]
                    assert all(c == configs[0] for c in configs)
    assert min(seen[1], seen[2]) > 0
    assert set(telling.NEEDED["average"]) <= set(FEATURES)
