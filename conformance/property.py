"""What a property is, and the three ways to make one: of one layer, of a whole model, of an adapter's life.

Every answer is compared with the specification's, so a property is a choice of what to ask, of what kind of case.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from refpeft.conformance import build, strategies, tiny
from refpeft.conformance.case import Case
from refpeft.conformance.strategies import Strategy, Structure
from refpeft.conformance.traits import TRAITS

Info = Mapping[str, Any]
PADDED: Mapping[str, Sequence[Any]] = {"padded": [True], "batch": [[2, 3], [2, 5], [3, 4]]}


@dataclass(frozen=True)
class Property:
    name: str
    level: str
    statement: str
    draw: Callable[[str, Info], Strategy]
    corners: Callable[[str, Info], Sequence[Structure]]  # what is always asked, before anything is drawn
    make: Callable[[str, Structure, int], Case]
    needs: Sequence[str] = ()
    claims: Sequence[str] = ()  # as the methods' docstrings label them: L2 of LoRA, D2 of DoRA
    required: bool = True
    methods: Sequence[str] | None = None
    families: Sequence[str] | None = None  # those whose models it is about
    any_head: bool = True  # or only language models
    smaller: Callable[[str, Structure], Iterator[Structure]] | None = None  # what to try of a failure that is met

    def applies(self, method: str) -> bool:
        """Is it about methods of this kind?"""
        if method not in TRAITS:
            return False
        asks = TRAITS[method].asks
        if asks is not None:
            return f"{self.level}/{self.name}" in asks
        return self.methods is None or method in self.methods

    def claims_of(self, method: str) -> Sequence[str]:
        return [c for c in self.claims if c.rstrip("0123456789") == TRAITS[method].letter]

    def fits(self, method: str, about: Mapping[str, Any]) -> bool:
        """Can it be asked, and of this method, about the model in a folder, which is of one family and architecture?"""
        family, traits = about["family"], TRAITS[method]
        head = about["architecture"].removeprefix(tiny.PREFIX[family])
        language = head == tiny.LM[family]
        if head == tiny.CLASSIFIER and family not in tiny.HEAD:
            return False
        if traits.architectures is not None and ("" if language else head) not in traits.architectures:
            return False
        there = self.families is None or (family in self.families and (language or self.any_head))
        return there and family in traits.families

    def structure(self, method: str, info: Info) -> Strategy:
        if self.families and "model" not in info and not strategies.buildable(info, self.families):
            return st.nothing()  # the target has none of the families that it is about
        return self.draw(method, info)

    def case(self, method: str, structure: Structure, seed: int) -> Case:
        case = self.make(method, structure, seed)
        more = {"claims": self.claims_of(method), "structure": structure}
        if "settings" in structure:
            more["settings"] = structure["settings"]
        return Case({**case.meta, **more}, case.arrays)


# ── one layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


NARROWED: Sequence[str] = ("kind", "dtype", "edge", "regime")


def layer(
    name: str,
    statement: str,
    want: Sequence[str],
    needs: Sequence[str],
    claims: Sequence[str] = (),
    change: Callable[[Structure], Structure] = lambda s: s,
    **more: Any,
) -> Property:
    """The fields in `NARROWED` that are given are drawn from what is given; `change` changes what was drawn."""
    fixed: dict[str, Sequence[Any]] = {key: more.pop(key) for key in NARROWED if key in more}

    def draw(method: str, info: Info) -> Strategy:
        choices = possible(fixed, info)
        if not all(choices.values()):
            return st.nothing()  # of what this property needs the target declares none
        own = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in choices.items()})
        return own.flatmap(lambda own: strategies.layer(method, info, **own))

    def corners(method: str, info: Info) -> Sequence[Structure]:
        return strategies.layer_corners(method, info, possible(fixed, info))

    def make(method: str, s: Structure, seed: int) -> Case:
        return build.layer(method, name, change(s), seed, want)

    return Property(name, "layer", statement, draw, corners, make, needs, claims, **more)


def possible(fixed: Mapping[str, Sequence[Any]], info: Info) -> Mapping[str, Sequence[Any]]:
    """Without the dtypes and kinds of layer that the target does not declare."""
    able = {"dtype": info["dtypes"], "kind": ["linear", *info["features"]]}
    return {k: [c for c in v if c in able.get(k, v)] for k, v in fixed.items()}


def whole(
    name: str,
    statement: str,
    want: Sequence[str],
    needs: Sequence[str],
    claims: Sequence[str] = (),
    also: Mapping[str, Sequence[Any]] | None = None,
    configs: Callable[[Structure], Mapping[str, Any]] = lambda s: {},
    adapters: Callable[[Structure], Mapping[str, Any] | None] = lambda s: None,
    families: tuple[str, ...] = tuple(tiny.FAMILIES),
    level: str = "model",
    across: bool = False,
    **more: Any,
) -> Property:
    """`also` are further fields to draw; `configs` changes the adapter's config, `adapters` names several. Models with
    an encoder and a decoder are always asked about if `across`, and otherwise if they are drawn."""
    always = tuple(f for f in families if across or f not in tiny.ENCODER_DECODERS) or families
    fixed = {key: more.pop(key) for key in ("architectures", "layers") if key in more}

    def draw(method: str, info: Info) -> Strategy:
        base = strategies.model(method, info, families, **fixed)
        extra = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in possible(also or {}, info).items()})
        return st.builds(lambda s, own: {**s, **own}, base, extra)

    def corners(method: str, info: Info) -> Sequence[Structure]:
        plain = strategies.model_corners(method, info, always, fixed.get("architectures", ("",)))
        own = possible(also or {}, info)
        return [{**s, **{k: v[n % len(v)] for k, v in own.items()}} for n, s in enumerate(plain)]

    def make(method: str, s: Structure, seed: int) -> Case:
        s = {**s, "config": {**s["config"], **settled(s), **configs(s)}}
        return build.model(method, level, name, s, seed, adapters(s), want=list(want))

    return Property(
        name, level, statement, draw, corners, make, needs, claims, families=families,
                    any_head="architectures" not in fixed, **more)  # fmt: skip


def settled(s: Structure) -> Structure:
    """What the family and its head decide, whatever was drawn and whatever the target has chosen."""
    return TRAITS[s["method"]].fixed(s["family"], s["architecture"].removeprefix(tiny.PREFIX[s["family"]]))


def two(s: Structure) -> Mapping[str, Any]:
    """Two adapters of one method whose configs differ: their ranks and α, …"""
    first = s["config"]
    return {"first": first, "second": TRAITS[s["method"]].second(first)}


Steps = Sequence[Mapping[str, Any]]


def life(
    name: str,
    statement: str,
    programs: Sequence[Steps],
    needs: Sequence[str],
    claims: Sequence[str] = (),
    adapters: Callable[[Structure], Mapping[str, Any]] = two,
    changed: Sequence[str] = (),
    configs: Callable[[Structure], Mapping[str, Any]] = lambda s: {},
    architectures: tuple[str, ...] = ("",),
    families: tuple[str, ...] | None = None,
    over: tuple[str, ...] = (),
    **more: Any,
) -> Property:
    """Programs of steps; after each, the model says what the formula says of the adapters active then. All of them are
    always asked of the families in `over`; where none are named, one program of two, and several of one."""

    def draw(method: str, info: Info) -> Strategy:
        base = strategies.model(method, info, families or tuple(tiny.FAMILIES), architectures, layers=1)
        return st.builds(lambda s, n: {**s, "program": n}, base, st.integers(0, len(programs) - 1))

    def corners(method: str, info: Info) -> Sequence[Structure]:
        plain = strategies.model_corners(method, info, over or families or ("gpt2", "bert"), architectures)
        few = plain if over else plain[: 1 if len(programs) > 1 else 2]
        return [{**s, "program": n} for s in few for n in range(len(programs))]

    def make(method: str, s: Structure, seed: int) -> Case:
        s = {**s, "config": {**s["config"], **settled(s), **configs(s)}}
        return build.model(method, "lifecycle", name, s, seed, adapters(s), changed, steps=list(programs[s["program"]]))

    return Property(name, "lifecycle", statement, draw, corners, make, needs, claims, families=families, **more)


def do(what: str, **arguments: Any) -> Mapping[str, Any]:
    return {"do": what, **arguments}


FIRST: Steps = [do("add", adapter="first")]
FOO: Steps = [do("add", adapter="foo"), do("add", adapter="foobar")]


def prefixes(s: Structure) -> Mapping[str, Any]:
    return {"foo": two(s)["first"], "foobar": two(s)["second"]}
