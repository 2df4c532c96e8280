"""What stories are told on: the model, the adapters with their configs and numbers, and how to have less of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refpeft.conformance import chain
from refpeft.conformance.build import meta
from refpeft.conformance.case import DTYPES, Case
from refpeft.conformance.numbers import generator, integers
from refpeft.conformance.strategies import FLAGS, Strategy, Structure
from refpeft.conformance.targets.spec_stories import Story
from refpeft.conformance.telling import NAMES, told
from refpeft.ops import Array

TARGETS = (["q"], ["q2", "down"], ["q", "q2"], ["block.q"], ["down"])
OPTIONS: Sequence[Structure] = ({}, {"alpha_pattern": {"q": 5.0}}, {"rank_pattern": {"block.q": 1}})
HEADS: Sequence[Structure] = ({}, {"modules_to_save": ["head"]})


def shorter(s: Structure) -> Iterator[Structure]:
    """Without one of the moves, from the last on; then with less that is special about the model and the adapters."""
    for n in reversed(range(len(s["moves"]))):
        yield {**s, "moves": [*s["moves"][:n], *s["moves"][n + 1 :]]}
    if s["tied"]:
        yield {**s, "tied": False}
    for option in ("modules_to_save", "alpha_pattern", "rank_pattern"):
        for name, config in s["configs"].items():
            if option in config:
                less = {field: value for field, value in config.items() if field != option}
                yield {**s, "configs": {**s["configs"], name: less}}
    for where in (["q2"], ["q"]):
        if any(len(config["target_modules"]) > 1 for config in s["configs"].values()):
            yield {**s, "configs": {name: {**c, "target_modules": where} for name, c in s["configs"].items()}}
    if s["dtype"] != "float32":
        yield {**s, "dtype": "float32"}


def configurations(method: str, heads: Sequence[Structure], where: Sequence[Sequence[str]]) -> Strategy:
    """Of three adapters, most on the same layers, with ranks and α of their own."""
    own = st.fixed_dictionaries({"r": st.sampled_from([2, 1, 3]), "lora_alpha": st.sampled_from([3.0, 1.0, 8.0])})
    layers = st.sampled_from(where)

    def joined(first: list[str], each: list[tuple[Structure, list[str], bool, Structure, Structure]]) -> Structure:
        return {
            name: {**own, "target_modules": there if apart else first, **option, **whole, **FLAGS.get(method, {})}
            for name, (own, there, apart, option, whole) in zip(NAMES, each, strict=True)
        }

    one = st.tuples(own, layers, st.booleans(), st.sampled_from(OPTIONS), st.sampled_from(heads))
    return st.builds(joined, layers, st.lists(one, min_size=3, max_size=3))


def plainly(method: str, n: int, heads: Sequence[Structure], where: Sequence[Sequence[str]]) -> Structure:
    """Of the n-th of the stories that are always told: most on the same layers; in some there is a head trained
    whole, a pattern, or ranks that differ."""
    flags, option = FLAGS.get(method, {}), OPTIONS[1] if n % 4 == 3 else {}
    whole = heads[-1] if n % 4 == 1 else {}
    layers = where[(2 - n % 2) % len(where)]
    last = where[-1] if n % 4 == 0 else layers
    ranks, places = [2, 3 if n % 6 == 2 else 2, 2], [layers, layers, last]
    return {
        name: {"r": ranks[k], "lora_alpha": float(3 + 2 * k), "target_modules": places[k], **option, **flags}
        | (whole if k != 1 else {})
        for k, name in enumerate(NAMES)
    }


def case(method: str, prop: str, s: Structure, seed: int) -> Case:
    """The model, the adapters with their numbers, and the steps."""
    seed += s["draw"]
    dtype, source = DTYPES[s["dtype"]], chain.source(s["tied"])
    steps, facts = told(s["moves"], s["able"], s["configs"])
    used = {step["adapter"] for step in steps if step["do"] == "add"}
    weights = chain.params(source, seed, dtype)
    arrays: dict[str, Array] = {f"model/{n}": a for n, a in weights.items()}
    about: dict[str, Any] = {}
    for name in (n for n in NAMES if n in used):
        about[name] = {"method": method, "config": s["configs"][name]}
        arrays |= {
            f"{name}/{n}": a for n, a in numbers(method, s["configs"][name], source, weights, seed, name).items()
        }
    arrays["ids"] = integers(seed, "ids", (2, 2), 0, 4)
    arrays["dout"] = chain.short(seed, "dout", (2, 2, 5)).astype(dtype)
    asked = {"model": source, "adapters": about, "active": list(about), "steps": steps, "facts": facts}
    told_so_far = Case(meta(method, "story", prop, s, seed) | asked, arrays)
    return Case(told_so_far.meta, {**arrays, **masks(told_so_far, seed)})


def numbers(
    method: str, config: Structure, source: Structure, weights: Mapping[str, Array], seed: int, name: str
) -> dict[str, Array]:
    """Of an adapter: short ones, DoRA's magnitudes near the norms that they start from."""
    import refpeft

    fresh = refpeft.init(method, config, chain.model(source, weights))
    return {
        n: np.abs(np.round(v + 0.5 * chain.short(seed, f"{name}/{n}", v.shape), 3)).astype(v.dtype)
        if n.endswith("lora_magnitude_vector")
        else chain.short(seed, f"{name}/{n}", v.shape).astype(v.dtype)
        for n, v in fresh.params.items()
    }


class Masking(Story):
    """Draws the masks that a story needs, and keeps them."""

    def __init__(self, case: Case, seed: int) -> None:
        super().__init__(case)
        self.seed, self.drawn = seed, dict[str, Array]()

    def mask(self, name: str, shape: tuple[int, ...]) -> Array:
        self.drawn["mask/" + name] = generator(self.seed, "mask/" + name).random(shape) < 0.6
        return self.drawn["mask/" + name]


def masks(case: Case, seed: int) -> dict[str, Array]:
    if not any("dare" in step.get("how", "") for step in case.meta["steps"]):
        return {}
    session = Masking(case, seed)
    session.run(case.meta["steps"])
    return session.drawn
