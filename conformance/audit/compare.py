"""Two tensors, as far as rounding can explain their difference.

The unit of an element is the spacing of the dtype's numbers at the largest of what was added and what came out: |base|,
|want|, and the root mean square of the change Δ = want − base (a sum of products has errors of its terms' size, not of
its own). A merge is a sum that is rounded a few times; a correct one is off by a few units at most.

In 16 bits a whole adapter may be smaller than one unit, so that a merge which left it out is within it too. Hence a
second question: how much of Δ is there?

    kept = ⟨got − base, Δ⟩ / ⟨Δ, Δ⟩      due = ⟨round(want) − base, Δ⟩ / ⟨Δ, Δ⟩      noise = ½ √Σ(unit² Δ²) / ⟨Δ, Δ⟩

`due` is what correct rounding leaves of it, `noise` how far from it independent roundings bring `kept`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]

BLOCK = 1 << 20  # elements that are looked at together
LIMIT = 4.0  # units: a product rounded to 16 bits, a scaled one, a sum, and one to spare
WIDE = 32.0  # from 32 bits on, where the sums of r products are rounded to the dtype too, term by term
CAST = 1.0  # where nothing was added: a number rounded twice
KEPT, SIGMAS = 0.05, 6.0
DIGITS = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126), "float64": (52, -1022)}
NARROWER: tuple[DType, ...] = tuple(np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32))


@dataclass(frozen=True)
class Gap:
    """How far a tensor is from what it should be."""

    equal: bool  # every element is the correctly rounded one
    worst: float  # the largest difference, in units
    kept: float
    due: float
    noise: float
    off: float  # ‖got − want‖
    change: float  # ‖Δ‖
    limit: float  # of `worst`

    @property
    def fits(self) -> bool:
        """Is the difference what rounding explains?"""
        return self.equal or (self.worst <= self.limit and abs(self.kept - self.due) <= KEPT + SIGMAS * self.noise)


def is_float(dtype: DType) -> bool:
    return dtype.kind == "f" or dtype == NARROWER[0]


def blocks(*arrays: Array) -> Iterator[list[Array]]:
    """The arrays, all of one shape, row by row in float64, so that no copy of a whole one is made."""
    shape = arrays[0].shape
    if not shape:
        yield [a.astype(np.float64) for a in arrays]
        return
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield [a[start : start + step].astype(np.float64) for a in arrays]


def spacing(dtype: DType, size: Array) -> Array:
    """The distance between neighbouring numbers of the dtype, at numbers of this size."""
    digits, least = DIGITS[dtype.name]
    _, exponent = np.frexp(size)
    unit: Array = np.ldexp(1.0, np.maximum(exponent - 1, least) - digits)
    return unit


def compare(got: Array, want: Array, base: Array, dtype: DType, change: Array | None = None) -> Gap:
    """`got` against `want`, in units of `dtype`; `change`: the direction in which to ask how much was kept, want − base
    unless said otherwise."""
    Δ2 = sum(float(np.sum((x if change is not None else w - b) ** 2)) for w, b, x in paired(want, base, change))
    rms = math.sqrt(Δ2 / got.size) if got.size else 0.0
    equal, worst, off2, kept, due, noise2 = True, 0.0, 0.0, 0.0, 0.0, 0.0
    for g, w, b, x in blocks(got, want, base, want if change is None else change):
        Δ = w - b if change is None else x
        rounded = narrowed(w, dtype)
        same = (g == rounded) | (np.isnan(g) & np.isnan(rounded))
        unit = spacing(dtype, np.maximum(np.maximum(np.abs(w), np.abs(b)), rms))
        far = np.where(same, 0.0, np.abs(g - w) / unit)
        equal &= bool(same.all())
        worst = max(worst, float(np.nan_to_num(far, nan=np.inf).max(initial=0.0)))
        off2 += float(np.sum(np.where(same, 0.0, g - w) ** 2))
        Δ = np.where(np.isfinite(g) & np.isfinite(rounded), Δ, 0.0)
        kept += float(np.nansum((g - b) * Δ))
        due += float(np.nansum((rounded - b) * Δ))
        noise2 += float(np.sum((unit * Δ) ** 2))
    per = 1 / Δ2 if Δ2 else 0.0
    noise, limit = math.sqrt(noise2) / 2 * per, CAST if not Δ2 else LIMIT if dtype.itemsize == 2 else WIDE
    return Gap(equal, worst, kept * per, due * per, noise, math.sqrt(off2), math.sqrt(Δ2), limit)


def paired(want: Array, base: Array, change: Array | None) -> Iterator[list[Array]]:
    return blocks(want, base, want if change is None else change)


def narrowed(x: Array, dtype: DType) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(np.float64)


def coarsest(got: Array) -> DType:
    """The narrowest dtype that holds every number of the tensor: its own, or the one that it has once been through."""
    for dtype in NARROWER:
        narrower = dtype.itemsize < got.dtype.itemsize or (dtype == NARROWER[0] and got.dtype == np.float16)
        if narrower and all((narrowed(g, dtype) == g).all() for (g,) in blocks(got)):
            return dtype
    own: DType = got.dtype
    return own


def fit(got: Array, base: Array, deltas: Sequence[Array]) -> Array:
    """The k that make base + Σ kₙ Δₙ closest to what is there, by least squares."""
    n = len(deltas)
    gram, right = np.zeros((n, n)), np.zeros(n)
    for g, b, *Δ in blocks(got, base, *deltas):
        flat = np.stack([x.ravel() for x in Δ])
        gram += flat @ flat.T
        right += flat @ (g - b).ravel()
    if not (np.isfinite(gram).all() and np.isfinite(right).all()):
        return np.full(n, np.nan)
    k: Array = np.linalg.lstsq(gram, right, rcond=1e-10)[0]
    return k


def rank(D: Array, noise: float, most: int = 64) -> int | None:
    """The rank of a matrix, up to noise of this norm: None if it is more than `most`, or more than a quarter of full.

    D Ω with a random Ω [i, most + 8] spans what D spans, if that is little (Halko et al. 2011, §4.1)."""
    most = min(most, min(D.shape) // 4)
    if D.ndim != 2 or most < 1 or not np.isfinite(D).all():
        return None
    Q, _ = np.linalg.qr(D @ np.random.default_rng(0).normal(size=(D.shape[1], most + 8)))
    S = np.linalg.svd(Q.T @ D, compute_uv=False)
    size = float(np.linalg.norm(D))
    if size < 10 * noise:
        return None
    rest = math.sqrt(max(0.0, size**2 - float(S @ S)))
    small = max(2 * noise, 1e-5 * size)
    tails = np.sqrt(np.maximum(0.0, np.cumsum(S[::-1] ** 2)[::-1] + rest**2))  # ‖D − its best part of rank n‖
    return next((n for n in range(1, most + 1) if n < len(tails) and tails[n] <= small), None)
