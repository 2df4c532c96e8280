"""What stories are told on: the model, the adapters with their configs and numbers, and how to have less of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refpeft.conformance import chain, tiny
from refpeft.conformance.build import meta
from refpeft.conformance.case import DTYPES, Case
from refpeft.conformance.numbers import generator, integers, normal
from refpeft.conformance.strategies import FLAGS, Strategy, Structure, linears_of
from refpeft.conformance.targets.spec_stories import Story
from refpeft.conformance.telling import NAMES, told
from refpeft.model import Model
from refpeft.ops import Array

TARGETS = (["q"], ["q2", "down"], ["q", "q2"], ["block.q"], ["down"])
OPTIONS: Sequence[Structure] = ({}, {"alpha_pattern": {"q": 5.0}}, {"rank_pattern": {"block.q": 1}})
HEADS: Sequence[Structure] = ({}, {"modules_to_save": ["head"]})


def same(config: Structure) -> Structure:
    return config


def one_side(config: Structure) -> Structure:
    """(IA)³ on what layers give, or on what the last of them takes."""
    return {**config, "feedforward_modules": config["target_modules"][-1:] if config["feedforward_modules"] else []}


def dividing(config: Structure) -> Structure:
    """Blocks that divide the six inputs of `down`, too."""
    return {**config, "oft_block_size": 2 if "down" in config["target_modules"] else config["oft_block_size"]}


@dataclass(frozen=True)
class Cast:
    """What adapters of a method can be in a story. `own`: values for the fields that each chooses for itself, except
    that those on the same layers have `shared` ones in common; `options`: fields of which some have one; `apart`: may
    some be on other layers than the rest? `settled`: what a config is that its layers leave possible."""

    own: Mapping[str, Sequence[Any]]
    options: Sequence[Structure] = ({},)
    shared: Sequence[str] = ()
    apart: bool = True
    settled: Callable[[Structure], Structure] = same
    layers: bool = True  # does a config name layers?
    families: Sequence[str] = ("bert", "roberta", "gpt2")  # of transformers, the first that the target has


CAUSAL = ("gpt2", "llama", "bert")
LORA = Cast({"r": [2, 1, 3], "lora_alpha": [3.0, 1.0, 8.0]}, OPTIONS)
BOTTLENECK: Mapping[str, Sequence[Any]] = {"reduction_factor": [4, 2], "non_linearity": ["relu", "silu", "tanh"]}
PRODUCT: Mapping[str, Sequence[Any]] = {"r": [2, 1, 4], "alpha": [6.0, 1.0, 3.0]}
CASTS: Mapping[str, Cast] = {
    "lora": LORA,
    "rslora": LORA,
    "dora": LORA,
    "ia3": Cast({"feedforward_modules": [[], ["last"]]}, shared=["feedforward_modules"], settled=one_side),
    "adalora": Cast({
        "init_r": [3, 2, 4], "lora_alpha": [6.0, 1.5, 2.0], "target_r": [1, 2], "total_step": [10]
    }),
    "vera": Cast({"r": [2], "d_initial": [0.1, 0.5]}, apart=False),  # A and B are of all, as large as they need
    "loha": Cast(PRODUCT, OPTIONS),
    "lokr": Cast({**PRODUCT, "decompose_both": [False, True], "decompose_factor": [-1, 2]}, OPTIONS),
    "glora": Cast(PRODUCT, OPTIONS),
    "dylora": Cast({"r": [4, 2], "rank": [2, 1], "alpha": [6.0, 1.0, 3.0]}),
    "oft": Cast({
        "oft_block_size": [2, 4], "num_cayley_neumann_terms": [5, 4, 7], "block_share": [False, True]
    }, settled=dividing),
    "boft": Cast({"boft_block_size": [2, 1]}),
    "houlsby": Cast(BOTTLENECK, layers=False),
    "pfeiffer": Cast(BOTTLENECK, layers=False),
    "parallel": Cast({**BOTTLENECK, "scaling": [4.0, 1.0]}, layers=False),
    "prompt_tuning": Cast({"num_virtual_tokens": [2, 1, 3]}, layers=False, families=CAUSAL),
    "p_tuning": Cast({"num_virtual_tokens": [2, 1, 3], "encoder_hidden_size": [5, 3]}, layers=False, families=CAUSAL),
    "prefix_tuning": Cast({
        "num_virtual_tokens": [2, 1, 3], "encoder_hidden_size": [5, 3], "prefix_projection": [False, True]
    }, layers=False, families=CAUSAL),
}  # fmt: skip
RELEVANT = ("conv1d", "together", "heir", "train-any", "train-loaded", "over-merged")  # without: other stories
LONGEST_PROMPT = 3


def stage(method: str, info: Mapping[str, Any]) -> Structure:
    """What the target and the method decide about the model and the stories: features that are lacking, if any, and
    the family of a transformer, with the layers that can be adapted, where a chain of layers will not do."""
    found: Structure = {}
    if lacks := [name for name in RELEVANT if name not in info["features"]]:
        found["lacks"] = lacks
    if "chain" not in info["features"]:
        families = [info["stories"]] if "stories" in info else CASTS[method].families
        there = info.get("families", families)
        found["family"] = next((family for family in families if family in there), families[0])
    return found


def places(method: str, info: Mapping[str, Any], chain_places: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """Layers to adapt: those of the chain, or of a transformer one, the next, several, and one of another kind."""
    if "chain" in info["features"]:
        return chain_places
    first, second, *_, last = linears_of(info, stage(method, info)["family"])
    return ([first], [second, last], [first, second], [last])


def shorter(method: str, s: Structure) -> Iterator[Structure]:
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
    settled = CASTS[method].settled
    for where in (["q2"], ["q"]) if "family" not in s else ():
        if any(len(config.get("target_modules", ())) > 1 for config in s["configs"].values()):
            yield {**s, "configs": {n: settled({**c, "target_modules": where}) for n, c in s["configs"].items()}}
    if s["dtype"] == "float64":
        yield {**s, "dtype": "float32"}


def configurations(
    method: str, heads: Sequence[Structure], where: Sequence[Sequence[str]], given: Structure
) -> Strategy:
    """Of three adapters, most on the same layers, with ranks and α of their own, and the options that are given."""
    cast = CASTS[method]
    own = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in cast.own.items()})
    layers = st.sampled_from(where)

    def joined(first: list[str], each: list[tuple[Structure, list[str], bool, Structure, Structure]]) -> Structure:
        common, found = {name: each[0][0][name] for name in cast.shared}, {}
        for name, (own, there, apart, option, whole) in zip(NAMES, each, strict=True):
            layers = there if apart and cast.apart else first
            own = {**own, **({} if apart else common), **({"target_modules": layers} if cast.layers else {})}
            found[name] = cast.settled({**own, **option, **whole, **FLAGS.get(method, {})}) | given
        return found

    one = st.tuples(own, layers, st.booleans(), st.sampled_from(cast.options), st.sampled_from(heads))
    return st.builds(joined, layers, st.lists(one, min_size=3, max_size=3))


def plainly(
    method: str, n: int, heads: Sequence[Structure], where: Sequence[Sequence[str]], given: Structure
) -> Structure:
    """Of the n-th of the stories that are always told: most on the same layers; in some there is a head trained
    whole, a pattern, or ranks that differ."""
    cast, flags = CASTS[method], {**FLAGS.get(method, {}), **given}
    option = cast.options[min(1, len(cast.options) - 1)] if n % 4 == 3 else {}
    whole = heads[-1] if n % 4 == 1 else {}
    layers = where[(2 - n % 2) % len(where)]
    last = where[-1] if n % 4 == 0 and cast.apart else layers
    on = [{"target_modules": there} if cast.layers else {} for there in (layers, layers, last)]
    return {
        name: cast.settled({**chosen(cast, n, k), **on[k], **option, **flags}) | (whole if k != 1 else {})
        for k, name in enumerate(NAMES)
    }


def chosen(cast: Cast, n: int, k: int) -> Structure:
    """The own fields of the k-th adapter in the n-th story that is always told."""
    if cast is LORA:
        return {"r": 3 if k == 1 and n % 6 == 2 else 2, "lora_alpha": float(3 + 2 * k)}
    own = list(cast.own)
    differ = own[1:2] if n % 2 and len(own) > 1 else own  # or all but the shapes is the same
    step = {name: k * (name in differ and name not in cast.shared) for name in own}
    return {name: values[(n + step[name]) % len(values)] for name, values in cast.own.items()}


def case(method: str, prop: str, s: Structure, seed: int) -> Case:
    """The model, the adapters with their numbers, and the steps."""
    seed += s["draw"]
    base = model_of(s, seed)
    steps, facts = told(s["moves"], s["able"], s["configs"], s.get("lacks", ()))
    used = {step["adapter"] for step in steps if step["do"] == "add"}
    arrays: dict[str, Array] = {f"model/{n}": a for n, a in base.params.items()}
    about: dict[str, Any] = {}
    for name in (n for n in NAMES if n in used):
        values, still = numbers(method, s["configs"][name], base, seed, name)
        about[name] = {"method": method, "config": s["configs"][name]} | ({"frozen": list(still)} if still else {})
        arrays |= {f"{name}/{n}": a for n, a in {**values, **still}.items()}
    arrays |= inputs(s, base, seed)
    asked = {"model": base.source, "adapters": about, "active": list(about), "steps": steps, "facts": facts}
    told_so_far = Case(meta(method, "story", prop, s, seed) | asked, arrays)
    return Case(told_so_far.meta, {**arrays, **masks(told_so_far, seed)})


def model_of(s: Structure, seed: int) -> Model:
    """The chain, or a transformer of one layer."""
    dtype = DTYPES[s["dtype"]]
    if "family" in s:
        return tiny.model(tiny.config_json(s["family"], tiny.LM[s["family"]], 1), seed, dtype)
    source = chain.source(s["tied"], "conv1d" not in s.get("lacks", ()))
    return chain.model(source, chain.params(source, seed, dtype))


def inputs(s: Structure, base: Model, seed: int) -> dict[str, Array]:
    """ids, and a gradient of what is said, with positions to spare for a prompt."""
    if "family" not in s:
        ids, dout = integers(seed, "ids", (2, 2), 0, 4), chain.short(seed, "dout", (2, 2, 5))
    else:
        vocab = base.source["vocab_size"]
        ids, dout = (
            integers(seed, "ids", (2, 3), 2, vocab - 1),
            chain.short(seed, "dout", (2, 3 + LONGEST_PROMPT, vocab)),
        )
    return {"ids": ids, "dout": dout.astype(DTYPES[s["dtype"]])}


def numbers(
    method: str, config: Structure, base: Model, seed: int, name: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Of an adapter: those that are trained, which are short, and those that are not."""
    import refpeft

    fresh = refpeft.init(method, config, base)
    noise = chain.short if base.config.family == chain.FAMILY else small
    found = {n: moved(n, v, noise(seed, f"{name}/{n}", v.shape)) for n, v in fresh.params.items()}
    return {n: a.astype(fresh.params[n].dtype) for n, a in found.items()}, dict(fresh.frozen)


def small(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """For a transformer, which has more of them than there are short ones."""
    return normal(seed, name, shape) / 4


def moved(name: str, start: Array, by: Array) -> Array:
    """DoRA's magnitudes near the norms, and vectors that scale near the ones, that they start from; rotations that are
    no more than a part of a turn."""
    if name.endswith("lora_magnitude_vector"):
        return np.abs(np.round(start + 0.5 * by, 3))
    if name.endswith(("ia3_l", "boft_s")):
        return np.round(start + 0.5 * by, 3)
    return np.round(by / 4, 4) if "oft_" in name else by


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
