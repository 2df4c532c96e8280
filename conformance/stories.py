"""Stories: what is done to a model with adapters, in any order, drawn and made shorter by Hypothesis.

A story is drawn as a list of moves, each a few small integers that mean nothing by themselves. `told` reads them one
after the other: what is possible at that point becomes a step, what is not is left out. So any shorter list is a
story too, which is all that shrinking asks for. The steps are what a case stores and targets see.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refpeft.conformance import chain
from refpeft.conformance.build import meta
from refpeft.conformance.case import DTYPES, Case
from refpeft.conformance.numbers import generator, integers
from refpeft.conformance.property import Info, Property, do
from refpeft.conformance.strategies import FLAGS, Strategy, Structure
from refpeft.conformance.targets.spec_stories import Story
from refpeft.ops import Array

Step = Mapping[str, Any]
Move = Sequence[int]  # n, a, b: which move, of which adapter, how
NAMES = ("foo", "foobar", "foob")  # each the beginning of another
LONGEST = 12


@dataclass
class Teller:
    """What is known of a story so far: enough to know what can be done next."""

    configs: Mapping[str, Mapping[str, Any]]
    adapters: dict[str, str] = field(default_factory=dict)  # those there are, with whose config
    active: list[str] = field(default_factory=list)
    merged: bool = False
    enabled: bool = True
    last: str | None = None  # the one that was active alone before
    files: dict[str, str] = field(default_factory=dict)  # what is saved, with whose config
    sums: dict[str, str] = field(default_factory=dict)  # made of others → how
    doubtful: bool = False  # a step may have been refused
    facts: dict[str, bool] = field(default_factory=dict)  # what happened in it, for known failures to match

    def note(self, **facts: bool) -> None:
        self.facts |= {name.replace("_", "-"): True for name, holds in facts.items() if holds}

    def config(self, name: str) -> Mapping[str, Any]:
        return self.configs[self.adapters[name]]

    def named(self, n: int) -> str | None:
        return sorted(self.adapters)[n % len(self.adapters)] if self.adapters else None

    # moves: each gives a step, or None where it is not possible

    def add(self, a: int, b: int) -> Step | None:
        name = NAMES[a % len(NAMES)]
        if name in self.adapters or name not in self.configs or not self.enabled:
            return None
        self.adapters[name] = name
        self.active = self.active or [name]
        self.last = self.last or name
        return do("add", adapter=name)

    def activate(self, a: int, b: int) -> Step | None:
        first, second = self.named(a), self.named(a + 1)
        if first is None or second is None or not self.enabled:
            return None
        both = first != second and (plain(self.config(first)) or plain(self.config(second)))
        self.active = [first, second] if b % 3 == 2 and both else [first]
        self.merged = False
        self.last = first if len(self.active) == 1 else self.last
        return do("activate", adapters=list(self.active))

    def merge(self, a: int, b: int) -> Step | None:
        if not self.active or self.doubtful:
            return None
        self.merged = True
        return do("merge", **({"safe": True} if b % 2 else {}))

    def unmerge(self, a: int, b: int) -> Step | None:
        if not self.merged:
            return None
        self.merged = False
        return do("unmerge")

    def disable(self, a: int, b: int) -> Step | None:
        if not (self.adapters and self.enabled):
            return None
        self.enabled, self.merged = False, False
        return do("disable")

    def enable(self, a: int, b: int) -> Step | None:
        if self.enabled:
            return None
        self.enabled = True
        return do("enable")

    def train(self, a: int, b: int) -> Step | None:
        free = any(self.sums.get(name, "").endswith("svd") for name in self.active)
        if not self.active or self.merged or not self.enabled or free or self.doubtful:
            return None
        return do("train")

    def delete(self, a: int, b: int) -> Step | None:
        name = self.named(a)
        if name is None or len(self.adapters) < 2 or not self.enabled or self.doubtful:
            return None
        if self.active == [name] and len(self.adapters) > 2:
            return None  # which of the others would be active, nobody says
        self.doubtful, config = self.merged, self.config(name)
        del self.adapters[name]
        self.sums.pop(name, None)
        left = [n for n in self.active if n != name]
        heir = self.config(next(iter(self.adapters)))
        self.note(
            heir_has_head=not left and not plain(heir),
            head_beside_two=len(left) > 1 and not plain(config),
            two_left=len(left) > 1 and name == self.last,
            heir_elsewhere=not left and set(heir["target_modules"]) != set(config["target_modules"]),
        )
        self.active = left or list(self.adapters)[:1]
        self.last = self.active[0] if len(self.active) == 1 else self.last
        return do("delete", adapter=name, **({"may": "refuse"} if self.merged else {}))

    def save(self, a: int, b: int) -> Step | None:
        name = self.named(a)
        if name is None or name in self.sums or self.doubtful:
            return None
        self.files[name] = self.adapters[name]
        return do("save", adapter=name)

    def load(self, a: int, b: int) -> Step | None:
        """A fresh model with what was saved."""
        if not self.files or self.doubtful:
            return None
        names = sorted(self.files)
        names = [names[a % len(names)], *(n for n in names if n != names[a % len(names)])][: 1 + b % 2]
        self.adapters = {n: self.files[n] for n in names}
        self.active, self.merged, self.enabled, self.sums = names[:1], False, True, {}
        self.last = names[0]
        return do("load", adapters=names)

    def load_as(self, a: int, b: int) -> Step | None:
        free = [n for n in ("other", *NAMES) if n not in self.adapters]
        if not (self.files and free and self.adapters and self.enabled) or self.doubtful:
            return None
        file, name = sorted(self.files)[a % len(self.files)], free[b % len(free)]
        self.adapters[name] = self.files[file]
        return do("load_as", adapter=name, file=file)

    def swap(self, a: int, b: int) -> Step | None:
        name = self.named(a)
        if name is None or not self.files or name in self.sums or self.merged or self.doubtful:
            return None
        file = sorted(self.files)[b % len(self.files)]
        if not alike(self.configs[self.adapters[name]], self.configs[self.files[file]]):
            return None
        config, others = self.config(name), [n for n in self.adapters if n != name]
        self.note(
            swap=True,
            swap_of_part_of_a_name=any(name in n for n in others),
            swap_with_head=not plain(config),
            swap_with_patterns=bool({"alpha_pattern", "rank_pattern"} & config.keys()),
            swap_of_inactive=name not in self.active,
        )
        self.adapters[name] = self.files[file]
        return do("swap", adapter=name, file=file)

    def replace(self, a: int, b: int) -> Step | None:
        """A saved adapter loaded under a name that is taken: replaced, or refused."""
        name = self.named(a)
        if name is None or not self.files or name in self.sums or self.merged or self.doubtful:
            return None
        self.doubtful = True
        return do("load_as", adapter=name, file=sorted(self.files)[b % len(self.files)], may="refuse")

    def combine(self, a: int, b: int) -> Step | None:
        """Weights and densities that all differ from each other and from what leaves things as they are."""
        return self.combined(a, SUMS[b % len(SUMS)], [0.75, -1.5])

    def thin(self, a: int, b: int) -> Step | None:
        """By DARE, with weights whose signs nobody can lose."""
        return self.combined(a, DARE[b % len(DARE)], [0.75, 1.5])

    def combined(self, a: int, how: str, weights: list[float]) -> Step | None:
        name = f"sum{len(self.sums)}"
        there = [n for n in sorted(self.adapters) if n not in self.sums and summable(self.config(n))]
        of = there[a % 2 :][:2]
        ranks = {self.configs[self.adapters[n]]["r"] for n in of}
        if not of or name in self.adapters or not self.enabled or self.doubtful:
            return None
        if len(ranks) > 1 and how != "cat" and not how.endswith("svd"):
            return None
        self.note(combine=True)
        self.adapters[name], self.sums[name] = self.adapters[of[0]], how if len(of) > 1 else "linear"
        more: Structure = {"density": 0.6} if how.removesuffix("_svd") in PRUNING else {}
        more |= {"sign": "frequency"} if "ties" in how and a % 3 == 2 else {}
        return do("combine", adapter=name, of=of, weights=weights[: len(of)], how=how, **more)


SUMS = ("cat", "linear", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties", "magnitude_prune_svd",
        "ties_svd", "dare_linear_svd", "dare_ties_svd")  # fmt: skip
DARE = ("dare_linear", "dare_ties")  # of A and B; of ΔW, they are among the others
PRUNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
NEEDED: Mapping[str, Sequence[str]] = {  # moves → the features that they are about
    "merge": ("merge",), "unmerge": ("merge", "unmerge"), "disable": ("disable",), "enable": ("disable",),
    "train": ("train",), "delete": ("several", "delete"), "save": ("save",), "load": ("save",),
    "load_as": ("several", "save"), "replace": ("several", "save"), "swap": ("save", "swap"),
    "combine": ("several", "combine"), "thin": ("several", "combine"),
    "activate": ("several",), "add": (),
}  # fmt: skip


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Can the one be put in the other's place, tensor by tensor? Ranks and α may differ."""
    kept = ("target_modules", "modules_to_save", "alpha_pattern", "rank_pattern")
    return all(one.get(name) == other.get(name) for name in kept)


def plain(config: Mapping[str, Any]) -> bool:
    return not config.get("modules_to_save")


def summable(config: Mapping[str, Any]) -> bool:
    """Nothing besides A and B, all of one rank."""
    return plain(config) and not config.get("rank_pattern")


def told(
    moves: Sequence[Move], able: Sequence[str], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Step], dict[str, bool]]:
    """The steps that moves come to, and what happens in them. Move 0 is to do nothing, n is `able[n − 1]`."""
    teller, steps = Teller(configs), list[Step]()
    for n, a, b in moves:
        step = getattr(teller, able[n - 1])(a, b) if 0 < n <= len(able) else None
        if step is not None:
            steps.append(step)
    return steps, teller.facts


TARGETS = (["q"], ["q2", "down"], ["q", "q2"], ["block.q"], ["down"])
OPTIONS: Sequence[Structure] = ({}, {"alpha_pattern": {"q": 5.0}}, {"rank_pattern": {"block.q": 1}})
HEADS: Sequence[Structure] = ({}, {"modules_to_save": ["head"]})


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────────


def story(
    name: str,
    statement: str,
    moves: Sequence[str],
    corners: Sequence[Sequence[Any]],
    needs: Sequence[str] = (),
    heads: Sequence[Structure] = HEADS,
    where: Sequence[Sequence[str]] = TARGETS,
    tied: Sequence[bool] = (False, True),
    dtypes: Sequence[str] = ("float32", "float64"),
    **more: Any,
) -> Property:
    """Stories of these moves; `corners` are some that are always told, as names of moves, or (name, a, b)."""

    def able(info: Info) -> list[str]:
        return [m for m in moves if set(NEEDED[m]) <= set(info["features"])]

    def drawn(method: str, info: Info) -> Strategy:
        n = len(able(info))
        move = st.tuples(st.integers(0, n), st.integers(0, 2), st.integers(0, 10))
        fields = {
            "moves": st.lists(move, min_size=LONGEST, max_size=LONGEST),
            "configs": configurations(method, heads, where),
            "tied": st.sampled_from(list(tied)),
            "dtype": st.sampled_from([d for d in dtypes if d in info["dtypes"]]),
            "draw": st.integers(0, 3),
        }
        return st.fixed_dictionaries(fields).map(lambda s: {**s, "able": able(info)})

    def always(method: str, info: Info) -> Sequence[Structure]:
        there, found = able(info), []
        for n, corner in enumerate(corners):
            named = [(m, 0, 0) if isinstance(m, str) else m for m in corner]
            if all(m in there for m, _, _ in named):
                found.append({
                    "moves": [[there.index(m) + 1, a, b] for m, a, b in named], "able": there, "draw": n,
                    "configs": plainly(method, n, heads, where), "tied": tied[n % len(tied)],
                    "dtype": dtypes[n % len(dtypes)],
                })  # fmt: skip
        return found

    def make(method: str, s: Structure, seed: int) -> Case:
        return case(method, name, s, seed)

    return Property(name, "story", statement, drawn, always, make, needs, smaller=shorter, **more)


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


BOTH: Sequence[Any] = (("add", 0, 0), ("add", 1, 0))
ACTIVE = ("activate", 0, 2)  # both
SECOND = ("activate", 1, 0)
STORIES: Sequence[Property] = [
    story(
        "any-order",
        "Add, switch, merge, unmerge, disable, train and delete, in any order: the model says what it says of the "
        "adapters active now.",
        ["add", "activate", "merge", "unmerge", "disable", "enable", "train", "delete"],
        [
            ["add", "merge", "merge"],
            [*BOTH, SECOND, ("delete", 1, 0), "train"],
            [*BOTH, "merge", SECOND, "merge", "unmerge"],
            ["add", "train", "merge", "unmerge", "train"],
            ["add", ("add", 2, 0), ("delete", 0, 0), "train"],
            [*BOTH, ACTIVE, "train", "merge", "disable", "enable"],
            [*BOTH, ACTIVE, ("delete", 0, 0), "merge", "unmerge"],
            [*BOTH, "merge", ("delete", 0, 0), "unmerge"],
            [*BOTH, "train", SECOND],
            ["add", "disable", "enable", "merge", "disable", "enable"],
        ],
        ["merge", "several"],
    ),
    story(
        "files",
        "What was saved is what is loaded, into a fresh model, or beside others under another name.",
        ["add", "activate", "train", "save", "load", "load_as", "merge", "unmerge", "delete"],
        [
            ["add", "save", "train", ("load_as", 0, 0), ("activate", 1, 0)],
            ["add", "train", "save", "train", "load"],
            [*BOTH, ("save", 0, 0), ("save", 1, 0), ("load", 1, 1), "train"],
            [*BOTH, ("save", 0, 0), "merge", ("load_as", 0, 0), "unmerge", ("activate", 2, 0)],
            [*BOTH, ("save", 1, 0), ("delete", 1, 0), ("load_as", 0, 1), ("activate", 1, 0)],
        ],
        ["several", "save"],
    ),
    story(
        "hot-swap",
        "An adapter put in the place of another runs with its own scale, and the others are as before.",
        ["add", "activate", "train", "save", "swap", "merge", "unmerge"],
        [
            [*BOTH, ("save", 1, 0), ("swap", 0, 0), "train", ("activate", 1, 0)],
            ["add", ("add", 2, 0), ("save", 1, 0), ("swap", 0, 0), "merge", "unmerge"],
            [*BOTH, ("save", 0, 0), ("swap", 1, 0), "train", ("activate", 1, 0)],
            [*BOTH, ("save", 0, 0), "train", ("swap", 0, 0)],
        ],
        ["several", "save", "swap"],
    ),
    story(
        "replaced",
        "An adapter loaded under a name that is taken is the one of that name from then on, unless that is refused.",
        ["add", "activate", "train", "save", "replace"],
        [[*BOTH, ("save", 1, 0), ("replace", 0, 0)], ["add", "save", "train", "replace"]],
        ["several", "save"],
        required=False,
    ),
    story(
        "tied",
        "Of two tied layers, the one that is not adapted is as it was, whatever was done to the other.",
        ["add", "activate", "merge", "unmerge", "disable", "enable", "train", "delete"],
        [["add", "merge"], ["add", "train", "merge", "unmerge"], [*BOTH, ACTIVE, "train"]],
        ["tied", "embedding", "merge"],
        heads=[{}],
        where=(["wte"], ["head"], ["wte"]),
        tied=[True],
        required=False,
    ),
    story(
        "combined",
        "A combination of adapters is what its definition makes of them, at that time.",
        ["add", "activate", "train", "merge", "unmerge", "delete", "combine"],
        [[*BOTH, ("combine", 0, n), ("activate", 2, 0)] for n in range(len(SUMS))]
        + [
            [*BOTH, ("combine", 2, 4), ("activate", 2, 0), "train"],
            [*BOTH, "train", ("combine", 0, 0), ("activate", 2, 0), "train", ("delete", 0, 0), "merge"],
        ],
        ["several", "combine"],
        heads=[{}],
        dtypes=["float32"],
        methods=["lora", "rslora"],
    ),
    story(
        "dare",
        "What DARE leaves of an adapter is the original over the density.",
        ["add", "activate", "train", "thin"],
        [[*BOTH, ("thin", 0, n), ("activate", 2, 0)] for n in range(len(DARE))],
        ["several", "combine"],
        heads=[{}],
        dtypes=["float32"],
        methods=["lora", "rslora"],
    ),
]
