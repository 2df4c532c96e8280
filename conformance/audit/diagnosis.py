"""One tensor of a merge: is it what base and adapters say, and if not, what is it?

Every answer is a hypothesis that was tried: what the mistake would have made of the tensor, compared with what is there
by the same rule as what is right. A tensor is called scaled by k because base + k ΔW is there, to rounding.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refpeft.conformance.audit.compare import (
    KEPT,
    Gap,
    blocks,
    coarsest,
    compare,
    fit,
    is_float,
    narrowed,
    rank,
    spacing,
)
from refpeft.conformance.audit.constants import LEFT_OUT, RIGHT, UNKNOWN, Constants, meanings, nearest

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]

VERDICTS = {
    "equal": "the correctly rounded numbers",
    "rounding": "equal to rounding",
    "coarse": "right, but with more rounding than one merge in this dtype needs",
    "base": "the base's: the adapter was not applied",
    "scaled": "k times the change that it should have",
    "transposed": "transposed",
    "mistaken": "what a known mistake makes",
    "differs": "something else",
    "foreign": "not the base's, though no adapter changes it",
    "not finite": "NaN or infinity where a number should be",
    "shape": "of another shape",
    "dtype": "not of a float dtype",
    "tied": "two tensors where config.json promises one",
    "missing": "missing",
    "extra": "not a tensor of this model",
    "config": "config.json says something else than the base's",
}
RIGHT_ONES = ("equal", "rounding")


@dataclass(frozen=True)
class Finding:
    """What was found about one tensor."""

    name: str
    verdict: str
    detail: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    worst: float | None = None  # the largest difference, in units of dtype
    adapters: tuple[str, ...] = ()  # those that change it
    k: tuple[float, ...] = ()  # per adapter, where the tensor is base + Σ kₙ ΔWₙ
    means: tuple[tuple[str, ...], ...] = ()  # per adapter: the mistakes that make this k, several if they look the same
    stored_as: str | None = None  # the name in the file, where it is another one

    @property
    def right(self) -> bool:
        return self.verdict in RIGHT_ONES


@dataclass(frozen=True)
class Expected:
    """What one tensor should be, and what else it might be, computed when it is asked for."""

    name: str
    want: Array
    base: Array
    adapters: Sequence[str] = ()  # the names of those that change it
    known: Sequence[Constants] = ()  # per adapter
    alone_there: bool = True  # there are no other adapters, so that its name need not be said
    alone: Callable[[], list[Array]] = list  # what each adapter alone adds to the base
    mistakes: Callable[[], Iterable[tuple[str, Array]]] = list  # words → what the tensor would be


def judge(e: Expected, got: Array) -> Finding:
    """The verdict on one tensor."""
    found = Finding(e.name, "", "", tuple(got.shape), got.dtype.name, adapters=tuple(e.adapters))
    if not is_float(got.dtype):
        return replace(found, verdict="dtype", detail=f"expected floats, found {got.dtype.name}")
    if got.shape != e.want.shape:
        return replace(found, **misshapen(e, got))
    gap = compare(got, e.want, e.base, got.dtype)
    found = replace(found, worst=gap.worst)
    if gap.fits:
        words = "" if gap.equal else f"{gap.worst:.2g} units of {got.dtype.name} at most"
        return replace(found, verdict="equal" if gap.equal else "rounding", detail=words)
    if bad := unbounded(e, got):
        return replace(found, verdict="not finite", detail=bad)
    dtype = coarsest(got)
    if dtype != got.dtype and (coarse := compare(got, e.want, e.base, dtype)).fits:
        words = (
            f"{coarse.worst:.2g} units of {dtype.name} at most, through which it went before it became {got.dtype.name}"
        )
        return replace(found, verdict="coarse", detail=words)
    return replace(found, **(explained if e.adapters else foreign)(e, got, dtype, gap))


def misshapen(e: Expected, got: Array) -> dict[str, Any]:
    want = list(e.want.shape)
    if got.ndim == 2 and got.T.shape == e.want.shape:
        inner = judge(e, got.T)
        rest = "" if inner.right else f", and {VERDICTS[inner.verdict]}: {inner.detail}"
        words = f"expected shape {want}, found {list(got.shape)}, the transpose{rest}"
        return {"verdict": "transposed", "detail": words, "worst": inner.worst, "k": inner.k, "means": inner.means}
    return {"verdict": "shape", "detail": f"expected shape {want}, found {list(got.shape)}"}


def unbounded(e: Expected, got: Array) -> str:
    """Are there numbers that are none, where there should be numbers?"""
    bad = sum(int((~np.isfinite(g) & np.isfinite(narrowed(w, got.dtype))).sum()) for g, w in blocks(got, e.want))
    return f"{bad} of {got.size} elements are NaN or infinite" if bad else ""


# ── tensors that an adapter changes ──────────────────────────────────────────────────────────────────────────────────


def explained(e: Expected, got: Array, dtype: DType, gap: Gap) -> dict[str, Any]:
    """The first hypothesis that holds: not applied, scaled, transposed, a mistake of the method; or none of them."""
    if against(e, got, (), (), dtype).fits:
        none = tuple(0.0 for _ in e.adapters)
        return {"verdict": "base", "detail": left_out(e), "k": none, "means": ((LEFT_OUT,),) * len(none)}
    square = got.ndim == 2 and got.shape[0] == got.shape[1]
    if square and compare(got.T, e.want, e.base, dtype).fits:
        return {"verdict": "transposed", "detail": f"the whole tensor is transposed ({got.shape[0]} × {got.shape[1]})"}
    deltas = e.alone()
    k = fitted(e, got, deltas)
    if (known := of_mistakes(e, got, dtype, deltas, k)) is not None:
        return scaled(e, known)
    if square and (flipped := of_transposed(e, got, dtype, [Δ.T for Δ in deltas])) is not None:
        rest = "" if all(x == 1 for x in flipped) else f", and scaled by {shown(flipped)}"
        return {"verdict": "transposed", "detail": f"ΔW was added transposed{rest}", "k": tuple(flipped)}
    for words, made in e.mistakes():
        if compare(got, made, e.base, dtype).fits:
            return {"verdict": "mistaken", "detail": words, "means": ((words,),)}
    if (free := of_any(e, got, dtype, deltas, k)) is not None:
        return scaled(e, free)
    return unexplained(e, got, dtype, gap)


def left_out(e: Expected) -> str:
    return "the adapter was not applied" if len(e.adapters) == 1 else "none of the adapters was applied"


def fitted(e: Expected, got: Array, deltas: list[Array]) -> list[float]:
    """The k that come closest; none if there are numbers that are none."""
    k = [float(x) for x in fit(got, e.base, deltas)]
    return k if np.isfinite(k).all() else []


def of_mistakes(e: Expected, got: Array, dtype: DType, deltas: list[Array], k: list[float]) -> list[float] | None:
    """The k of known mistakes for which the tensor is base + Σ kₙ ΔWₙ to rounding."""
    if len(k) == 1:
        guesses = [[value] for value in nearest(k[0], e.known[0])[:4]]
    else:
        guesses = [[nearest(x, known)[0] for x, known in zip(k, e.known, strict=False)]]
    return next((g for g in guesses if any(g) and against(e, got, g, deltas, dtype).fits), None)


def of_any(e: Expected, got: Array, dtype: DType, deltas: list[Array], k: list[float]) -> list[float] | None:
    """Any other k. Rounding takes some of a small ΔW, and the fit too: k is right when as much is kept as is due."""
    for _ in range(8):
        gap = against(e, got, k, deltas, dtype)
        if gap.fits and any(k):
            return k
        if gap.due * gap.kept <= 0:
            return None
        k = [x * math.sqrt(gap.kept / gap.due) for x in k]  # what is kept grows faster than k
    return None


def of_transposed(e: Expected, got: Array, dtype: DType, deltas: list[Array]) -> list[float] | None:
    k = fitted(e, got, deltas)
    known = of_mistakes(e, got, dtype, deltas, k)
    return of_any(e, got, dtype, deltas, k) if known is None else known


def against(e: Expected, got: Array, k: Sequence[float], deltas: Sequence[Array], dtype: DType) -> Gap:
    """The tensor against base + Σ kₙ ΔWₙ."""
    made = e.base.astype(np.float64)
    for x, Δ in zip(k, deltas, strict=True):
        made += x * Δ
    return compare(got, made, e.base, dtype, e.want.astype(np.float64) - e.base)


def scaled(e: Expected, k: list[float]) -> dict[str, Any]:
    """k in words."""
    means = tuple((RIGHT,) if x == 1 else meanings(x, known) for x, known in zip(k, e.known, strict=True))
    said = [
        f"{'' if e.alone_there else name + ': '}k = {x:.4g}: {' or '.join(words) or UNKNOWN}"
        for name, x, words in zip(e.adapters, k, means, strict=True)
        if x != 1
    ]
    return {"verdict": "scaled", "detail": "; ".join(said), "k": tuple(k), "means": means}


def shown(k: Sequence[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in k)


def unexplained(e: Expected, got: Array, dtype: DType, gap: Gap) -> dict[str, Any]:
    """None of the hypotheses: too coarse, or how far it is, and in which direction."""
    share = gap.off / gap.change if gap.change else math.inf
    words = f"off by {gap.worst:.3g} units of {got.dtype.name} at most, by {share:.2g} of ‖ΔW‖"
    if abs(gap.kept - gap.due) <= KEPT and (gap.worst <= 4 * gap.limit or share < 2**-6):
        return {"verdict": "coarse", "detail": f"{words}: {coarseness(share, got.dtype)}"}
    n = low_rank(e.want, got, dtype)
    rest = f"; the rest is a matrix of rank {n}, as other adapters make" if n else ""
    return {"verdict": "differs", "detail": f"{words}; along ΔW it has {gap.kept:.3g} times its length{rest}"}


def coarseness(share: float, dtype: DType) -> str:
    """What loses this share of ΔW, or so many units of its sum with W."""
    if dtype.itemsize > 2 and share > 2**-10:
        return "as if ΔW had been computed in bfloat16"
    if dtype.itemsize > 2 and share > 2**-14:
        return "as if ΔW had been computed in float16 or TF32"
    return f"as if {dtype.name} had been rounded to after every step, or the factors been rounded"


# ── tensors that no adapter changes ──────────────────────────────────────────────────────────────────────────────────


def foreign(e: Expected, got: Array, dtype: DType, gap: Gap) -> dict[str, Any]:
    """Not the base's: transposed, a multiple of it, a low-rank change, or just something else."""
    if got.ndim == 2 and got.shape[0] == got.shape[1] and compare(got.T, e.want, e.base, dtype).fits:
        return {"verdict": "transposed", "detail": f"the whole tensor is transposed ({got.shape[0]} × {got.shape[1]})"}
    zero = np.broadcast_to(np.zeros((), np.float32), e.base.shape)
    (k,) = (float(x) for x in fit(got, zero, [e.base]))
    if abs(k - 1) > 1e-3 and compare(got, k * e.base.astype(np.float64), e.base, dtype).fits:
        return {"verdict": "foreign", "detail": f"the base's tensor: {k:.6g} times it", "k": (k,)}
    away = math.sqrt(sum(float(np.nansum((g - b) ** 2)) for g, b in blocks(got, e.base)))
    size = math.sqrt(sum(float(np.nansum(b**2)) for (b,) in blocks(e.base)))
    far = f"‖W′ − W‖/‖W‖ = {away / size:.3g}" if size else f"‖W′‖ = {away:.3g} where the base has zeros"
    n = low_rank(e.base, got, dtype)
    why = f", a change of rank {n}, as some other adapter makes" if n else ""
    return {"verdict": "foreign", "detail": f"differs from the base's: {far}{why}"}


def low_rank(base: Array, got: Array, dtype: DType) -> int | None:
    """The rank of the difference, where it is low and more than rounding."""
    if got.ndim != 2:
        return None
    D = got.astype(np.float64) - base
    noise = math.sqrt(sum(float(np.sum(spacing(dtype, np.abs(b)) ** 2)) for (b,) in blocks(base))) / 3
    return rank(D, noise)
