"""Relative positions: a learned bias for each distance and head.      Raffel et al. 2020, arXiv 1910.10683, §2.1

    S_ij = q_i kⱼ + E[bucket(j − i)]            E [buckets, h], a row for every bucket; the bias B is [1, h, s, t]

Near distances have a bucket each, far ones share some that grow like a geometric series up to the distance M:

    bucket(r) = min(d, e) + #{j ≥ 1: d ≥ Tⱼ},   d = max(−r, 0),   e = ⌊n/2⌋,   Tⱼ = e (M/e)^(j/(n − e)),   j < n − e

of n buckets for what came before; where both sides are seen, d = |r|, n is half of all, and r > 0 has the other half.

Where implementations differ: T5's code takes ⌊(n − e) log(d/e)/log(M/e)⌋ in float32 instead of counting the Tⱼ. This is
the same in exact arithmetic; Tⱼ, rounded up, is computed here in integers, so there is nothing to round.
"""

import numpy as np

from refpeft.ops import Array


def thresholds(n: int, longest: int) -> list[int]:
    """The least distances d of the buckets e + 1, e + 2, …: d^(n − e) e^j ≥ M^j e^(n − e)."""
    e = n // 2
    found, d = [], max(e, 1)
    for j in range(1, n - e):
        while d ** (n - e) * e**j < longest**j * e ** (n - e):
            d += 1
        found.append(d)
    return found


def buckets(r: Array, n: int, longest: int, both: bool) -> Array:
    """The bucket of each distance r = j − i, of n for distances up to `longest`.      [s, t] → [s, t]"""
    side: Array = 0
    far = np.maximum(-r, 0)
    if both:
        n //= 2
        side, far = np.where(r > 0, n, 0), np.maximum(-r, r)
    T = np.array(thresholds(n, longest), np.int64)
    return side + np.minimum(far, n // 2) + (far[..., None] >= T).sum(-1)
