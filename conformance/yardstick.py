"""The yardstick: how far may a correct implementation be from the specification? No tolerance is chosen anywhere.

exact   The numbers are small integers and powers of two: every order of summation gives the same bits, so the answer
        must have them too.
float   ratio = ‖got − ref‖ / max(dither, ‖spec − ref‖, u ‖ref‖), with ref the specification in float64, spec the
        specification in the case's dtype, u that dtype's unit roundoff, and dither the largest change of ref in 8
        draws that move every input by half a unit in its last place. Correct code stays below 5 for a layer and 10
        for a model: it differs by what rounding the inputs would have changed anyway.

A story in which something is merged, of a model in 16 bits, is excused one thing more: what rounding merged weights
leads to. That is a run in float64 in which these are rounded, each time, and nothing else, and what that changed stays
in the weights when the adapter is taken out; its distance from ref stands beside the dither. (In 32 and 64 bits the
limit is multiplied by 1 + the number of merges instead.)

The dither costs eight more runs of the specification, so it is drawn only for what the other two do not excuse: a ratio
below a quarter of the limit is an upper bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refpeft.conformance.case import Case, is_float
from refpeft.conformance.numbers import signs
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Spec
from refpeft.conformance.targets.spec_stories import Folding
from refpeft.ops import Array

LIMIT = {"layer": 5.0, "model": 10.0, "lifecycle": 10.0, "story": 10.0, "export": 10.0}
DRAWS = 8
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Verdict:
    """kind is None where got is right, else value, shape, dtype, names, error:Type, or, of what should be refused,
    accepted or unclear; detail is one sentence."""

    kind: str | None = None
    ratio: float | None = None
    detail: str = ""


SAME = Verdict(None, 0.0)


def wrong(detail: str, ratio: float | None = None) -> Verdict:
    return Verdict("value", ratio, detail)


class Yardstick:
    """What the specification answers to a case: in its own dtype, in float64, and in float64 from dithered inputs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.exact = case.meta["regime"] == "exact"
        merges = sum(step["do"] == "merge" for step in case.meta.get("steps", ())) if case.level == "story" else 0
        self.folds = merges > 0 and UNIT[case.meta["dtype"]] > UNIT["float32"]
        self.limit = LIMIT[case.level] * (1 if self.folds else 1 + merges)  # each rounds the weights once more

    @cached_property
    def spec(self) -> Arrays:
        return Spec().run(self.case)

    @cached_property
    def ref(self) -> Arrays:
        return Spec().run(self.case.in_float64())

    @cached_property
    def dithered(self) -> list[Arrays]:
        return [Spec().run(dither(self.case, draw)) for draw in range(DRAWS)]

    @cached_property
    def folded(self) -> Arrays:
        return Folding(self.case).run(self.case.meta["steps"]) if self.folds else {}

    def ratio(self, name: str, got: Array) -> float:
        ref = self.ref[name].astype(np.float64)
        off = distance(got, ref)
        if not off > 0:
            return off
        own = max(distance(self.spec[name], ref), unit(self.spec[name]) * norm(ref))
        if off > self.limit / 4 * own:
            explained = [*self.dithered, self.folded] if self.folds else self.dithered
            own = max(own, *(distance(d[name], ref) for d in explained))
        return off / own if own else float("inf")

    def judge(self, got: Mapping[str, Array]) -> Verdict:
        """Everything the specification answers, and nothing else, is in `got`, and equal to it."""
        missing, extra = sorted(self.spec.keys() - got.keys()), sorted(got.keys() - self.spec.keys())
        if missing or extra:
            return Verdict("names", None, f"{(missing or extra)[0]} is {'missing' if missing else 'not expected'}")
        worst = Verdict(None, 0.0)
        for name, expected in self.spec.items():
            verdict = self.compare(name, np.asarray(got[name]), expected)
            if verdict.kind:
                return verdict
            worst = max(worst, verdict, key=lambda v: v.ratio or 0.0)
        return worst

    def compare(self, name: str, got: Array, expected: Array) -> Verdict:
        if got.shape != expected.shape:
            return Verdict("shape", None, f"{name}: expected shape {list(expected.shape)}, found {list(got.shape)}")
        if not is_float(expected):
            same = bool((got == expected).all())
            return SAME if same else wrong(f"{name}: expected {show(expected)}, found {show(got)}")
        if got.dtype != expected.dtype:
            return Verdict("dtype", None, f"{name}: expected {expected.dtype}, found {got.dtype}")
        if self.exact:
            n = int((got != expected).sum())
            return wrong(f"{name}: {n} of {got.size} entries differ, {first(got, expected)}") if n else SAME
        ratio = self.ratio(name, got)
        if ratio <= self.limit:
            return Verdict(None, ratio)
        return wrong(f"{name}: {self.told(name, got, ratio)}", ratio if np.isfinite(ratio) else None)

    def told(self, name: str, got: Array, ratio: float) -> str:
        """How an array that is not right differs."""
        ref, got = self.ref[name].astype(np.float64), got.astype(np.float64)
        bad = np.isfinite(ref) & ~np.isfinite(got)
        if n := int(bad.sum()):
            return f"nan or infinite in {n} of {got.size} entries where the specification is finite"
        size = norm(ref)
        if not size:
            return f"expected zeros, found up to {np.abs(got).max():.2g}"
        return f"off by {distance(got, ref) / size:.2g} of its size, {ratio:.3g} times what rounding explains"


def dither(case: Case, draw: int) -> Case:
    """Every floating input moved by half a unit in the last place of its dtype, up or down."""
    return case.map(lambda name, a: a.astype(np.float64) * (1 + unit(a) * signs(draw, name, a.shape)))


def unit(a: Array) -> float:
    """Unit roundoff: half the distance from 1 to the next number."""
    return UNIT[a.dtype.name]


def norm(a: Array) -> float:
    a = np.asarray(a, np.float64)
    return float(np.sqrt((a * a).sum()))


def distance(got: Array, ref: Array) -> float:
    """‖got − ref‖; infinite where got is not a number."""
    with np.errstate(invalid="ignore"):
        d = norm(got.astype(np.float64) - ref)
    return d if np.isfinite(d) else float("inf")


def show(a: Array) -> str:
    return str(a.reshape(-1)[:8].tolist()) if a.size < 9 else f"{a.size} entries"


def first(got: Array, expected: Array) -> str:
    at = tuple(int(k) for k in np.argwhere(got != expected)[0])
    return f"at {list(at)} expected {float(expected[at]):g}, found {float(got[at]):g}"
