"""Telling stories: from moves, which Hypothesis draws and makes fewer, to steps, which a case stores.

A story is drawn as a list of moves, each a few small integers that mean nothing by themselves. `told` reads them one
after the other: what is possible at that point becomes a step, what is not is left out. So any shorter list is a
story too, which is all that shrinking asks for. The steps are what a case stores and targets see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refpeft.conformance import chain
from refpeft.conformance.property import do
from refpeft.conformance.strategies import Structure
from refpeft.method import matches

Step = Mapping[str, Any]
Move = Sequence[int]  # n, a, b: which move, of which adapter, how
NAMES = ("foo", "foobar", "foob")  # each the beginning of another


@dataclass
class Teller:
    """What is known of a story so far: enough to know what can be done next."""

    configs: Mapping[str, Mapping[str, Any]]
    lacks: Sequence[str] = ()  # features without which some of it is not possible
    adapters: dict[str, str] = field(default_factory=dict)  # those there are, with whose config
    active: list[str] = field(default_factory=list)
    merged: bool = False
    enabled: bool = True
    last: str | None = None  # the one that was active alone before
    trained: str | None = None  # the only one that can be, where that is so
    files: dict[str, str] = field(default_factory=dict)  # what is saved, with whose config
    loaded: set[str] = field(default_factory=set)
    sides: dict[str, bool] = field(default_factory=dict)  # layer → does an (IA)³ adapter scale what it takes?
    sums: dict[str, str] = field(default_factory=dict)  # made of others → how
    doubtful: bool = False  # a step may have been refused
    facts: dict[str, bool] = field(default_factory=dict)  # what happened in it, for known failures to match

    def note(self, **facts: bool) -> None:
        self.facts |= {name.replace("_", "-"): True for name, holds in facts.items() if holds}

    @property
    def held(self) -> bool:
        """Is something merged that only `unmerge` takes out?"""
        return self.merged and "over-merged" in self.lacks

    def config(self, name: str) -> Mapping[str, Any]:
        return self.configs[self.adapters[name]]

    def named(self, n: int) -> str | None:
        return sorted(self.adapters)[n % len(self.adapters)] if self.adapters else None

    def came(self, name: str) -> None:
        """An adapter is there now; in HF peft, a layer's first (IA)³ adapter settles which side of it all scale, and
        what is merged is taken out."""
        takes = self.config(name).get("feedforward_modules", ())
        for path in chain.LAYERS:
            if matches(self.config(name).get("target_modules"), path):
                side = any(path.endswith(n) for n in takes)
                self.note(other_side=self.sides.setdefault(path, side) != side, taken_out=self.merged)

    # moves: each gives a step, or None where it is not possible

    def add(self, a: int, b: int) -> Step | None:
        name = NAMES[a % len(NAMES)]
        if name in self.adapters or name not in self.configs or not self.enabled or self.doubtful:
            return None
        self.adapters[name] = name
        self.came(name)
        self.loaded.discard(name)
        self.active = self.active or [name]
        self.last, self.trained = self.last or name, self.trained or name
        return do("add", adapter=name)

    def activate(self, a: int, b: int) -> Step | None:
        first, second = self.named(a), self.named(a + 1)
        if first is None or second is None or not self.enabled or self.held:
            return None
        both = (
            "together" not in self.lacks
            and first != second
            and (plain(self.config(first)) or plain(self.config(second)))
        )
        self.active = [first, second] if b % 3 == 2 and both else [first]
        self.note(taken_out=self.merged, two_active=len(self.active) > 1)
        self.merged = False
        self.last = first if len(self.active) == 1 else self.last
        return do("activate", adapters=list(self.active))

    def merge(self, a: int, b: int) -> Step | None:
        if not self.active or self.doubtful or ("over-merged" in self.lacks and not self.enabled):
            return None
        self.merged = True
        self.note(taken_out=not self.enabled, written=True)
        return do("merge", **({"safe": True} if b % 2 else {}))

    def unmerge(self, a: int, b: int) -> Step | None:
        if not self.merged:
            return None
        self.note(taken_out=True)
        self.merged = False
        return do("unmerge")

    def disable(self, a: int, b: int) -> Step | None:
        if not (self.adapters and self.enabled) or self.held:
            return None
        self.note(taken_out=self.merged)
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
        if "train-any" in self.lacks and self.active != [self.trained]:
            return None
        if "train-loaded" in self.lacks and any(name in self.loaded for name in self.active):
            return None
        self.note(trained=True)
        return do("train")

    def delete(self, a: int, b: int) -> Step | None:
        name = self.named(a)
        if name is None or len(self.adapters) < 2 or not self.enabled or self.doubtful or self.held:
            return None
        if self.active == [name] and len(self.adapters) > 2:
            return None  # which of the others would be active, nobody says
        if self.active == [name] and "heir" in self.lacks:
            return None
        self.doubtful, config = self.merged, self.config(name)
        del self.adapters[name]
        self.sums.pop(name, None)
        left = [n for n in self.active if n != name]
        heir = self.config(next(iter(self.adapters)))
        self.note(
            heir_has_head=not left and not plain(heir),
            head_beside_two=len(left) > 1 and not plain(config),
            of_active=name in self.active and bool(left),
            two_left=len(left) > 1 and name == self.last,
            heir_elsewhere=not left and set(heir.get("target_modules", ())) != set(config.get("target_modules", ())),
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
        self.active, self.merged, self.enabled, self.sums, self.sides = names[:1], False, True, {}, {}
        for n in names:
            self.came(n)
        self.last, self.loaded = names[0], set(names)
        self.trained = names[0]
        self.note(loaded=True)
        return do("load", adapters=names)

    def load_as(self, a: int, b: int) -> Step | None:
        free = [n for n in ("other", *NAMES) if n not in self.adapters]
        if not (self.files and free and self.adapters and self.enabled) or self.doubtful:
            return None
        file, name = sorted(self.files)[a % len(self.files)], free[b % len(free)]
        self.adapters[name] = self.files[file]
        self.loaded.add(name)
        self.note(loaded=True, renamed=name != file)
        self.came(name)
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
        self.doubtful, file = True, sorted(self.files)[b % len(self.files)]
        self.note(replaced=True, renamed=name != file)
        return do("load_as", adapter=name, file=file, may="refuse")

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
        self.note(combine=True, taken_out=self.merged)
        self.adapters[name], self.sums[name] = self.adapters[of[0]], how if len(of) > 1 else "linear"
        more: Structure = {"density": 0.6} if how.removesuffix("_svd") in PRUNING else {}
        more |= {"sign": "frequency"} if "ties" in how and a % 3 == 2 else {}
        return do("combine", adapter=name, of=of, weights=weights[: len(of)], how=how, **more)

    def average(self, a: int, b: int) -> Step | None:
        """Of two with one config, or of one, with weights that do not add up to 1."""
        there, name = sorted(self.adapters), f"mean{len(self.sums)}"
        if not there or name in self.adapters or not self.enabled or self.doubtful or self.held:
            return None
        first = there[a % len(there)]
        self.note(taken_out=self.merged)
        of = [n for n in (first, *there) if self.config(n) == self.config(first)][1:][: 1 + b % 2] or [first]
        self.adapters[name], self.sums[name] = self.adapters[first], "average"
        return do("average", adapter=name, of=of, weights=[0.75, -1.5][: len(of)])


SUMS = ("cat", "linear", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties", "magnitude_prune_svd",
        "ties_svd", "dare_linear_svd", "dare_ties_svd")  # fmt: skip
DARE = ("dare_linear", "dare_ties")  # of A and B; of ΔW, they are among the others
PRUNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
NEEDED: Mapping[str, Sequence[str]] = {  # moves → the features that they are about
    "merge": ("merge",), "unmerge": ("merge", "unmerge"), "disable": ("disable",), "enable": ("disable",),
    "train": ("train",), "delete": ("several", "delete"), "save": ("save",), "load": ("save",),
    "load_as": ("several", "save"), "replace": ("several", "save"), "swap": ("save", "swap"),
    "combine": ("several", "combine"), "thin": ("several", "combine"), "average": ("several", "average"),
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
    moves: Sequence[Move], able: Sequence[str], configs: Mapping[str, Mapping[str, Any]], lacks: Sequence[str] = ()
) -> tuple[list[Step], dict[str, bool]]:
    """The steps that moves come to, and what happens in them. Move 0 is to do nothing, n is `able[n − 1]`."""
    teller, steps = Teller(configs, lacks), list[Step]()
    for n, a, b in moves:
        step = getattr(teller, able[n - 1])(a, b) if 0 < n <= len(able) else None
        if step is not None:
            steps.append(step)
    return steps, teller.facts
