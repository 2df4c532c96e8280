"""Rotations: skew-symmetric matrices, the Cayley transform of them, exact or as a series, and blocks of them at work.

v [n, p (p − 1)/2]  →  Q [n, p, p], Q = −Qᵀ  →  R [n, p, p], R Rᵀ = I  →  x R, block by block
"""

import math
from functools import cache

import numpy as np

from refpeft.ops import Array, Vjp, op, rows


@op
def skew(v: Array) -> tuple[Array, Vjp]:
    """Q_ij = v_ij, Q_ji = −v_ij for i < j; v holds the upper triangle row by row.      v [n, p (p − 1)/2] → Q [n, p, p]

    dv_ij = dQ_ij − dQ_ji.
    """
    n, p = v.shape[0], width(v.shape[1])
    at, upper, lower = entries(p)
    padded = np.concatenate([v, -v, np.zeros((n, 1), v.dtype)], axis=1)
    Q = np.take_along_axis(padded, np.tile(at, (n, 1)), 1)

    def dv(dQ: Array) -> Array:
        d = dQ.reshape(n, p * p)
        return np.take_along_axis(d, np.tile(upper, (n, 1)), 1) - np.take_along_axis(d, np.tile(lower, (n, 1)), 1)

    return Q.reshape(n, p, p), lambda dQ: (lambda: dv(dQ),)


def width(entries: int) -> int:
    """p, of a skew-symmetric matrix with so many entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


@cache
def entries(p: int) -> tuple[Array, Array, Array]:
    """Where Q's entries are found in [v, −v, 0]; where v's are found in Q, and those of −v."""
    i, j = np.triu_indices(p, 1)
    at = np.full((p, p), 2 * len(i))
    at[i, j], at[j, i] = np.arange(len(i)), len(i) + np.arange(len(i))
    return at.reshape(-1), i * p + j, j * p + i


@op
def cayley(Q: Array) -> tuple[Array, Vjp]:
    """R = (I + Q)(I − Q)⁻¹ = (I − Q)⁻¹ (I + Q).      Q [n, p, p] → R [n, p, p]

    dQ = (I − Q)⁻ᵀ dR (I + R)ᵀ.      I − Q has an inverse, because the eigenvalues of Q are imaginary.
    """
    I = np.eye(Q.shape[-1], dtype=Q.dtype)  # noqa: E741
    R = np.linalg.solve(I - Q, I + Q)

    def dQ(dR: Array) -> Array:
        return np.linalg.solve((I - Q).swapaxes(-1, -2), dR @ (I + R).swapaxes(-1, -2))

    return R, lambda dR: (lambda: dQ(dR),)


@op
def cayley_series(Q: Array, terms: int = 5) -> tuple[Array, Vjp]:
    """R = I + 2 Q + 2 Q² + … + 2 Q^(k−2) + Q^(k−1) = (I + Q)(I + Q + … + Q^(k−2)),   k = terms.      Q [n, p, p] → R

    With R = (I + Q) S, S by Horner's rule S ← I + Q S:   dS = (I + Q)ᵀ dR,   dQ = dR Sᵀ + Σ over its steps.
    """
    I = np.eye(Q.shape[-1], dtype=Q.dtype)  # noqa: E741
    steps = [Q * 0 + I]
    for _ in range(terms - 2):
        steps.append(I + Q @ steps[-1])

    def dQ(dR: Array) -> Array:
        d, dS = dR @ steps[-1].swapaxes(-1, -2), (I + Q).swapaxes(-1, -2) @ dR
        for S in reversed(steps[:-1]):  # of S′ = I + Q S:   dQ += dS′ Sᵀ,   dS = Qᵀ dS′
            d = d + dS @ S.swapaxes(-1, -2)
            dS = Q.swapaxes(-1, -2) @ dS
        return d

    return steps[-1] + Q @ steps[-1], lambda dR: (lambda: dQ(dR),)


@op
def rotate(x: Array, R: Array) -> tuple[Array, Vjp]:
    """y_k = x_k R_k: blocks of p entries, each with its own R_k, or all with one.      x [… n p], R [n or 1, p, p] → y

    dx_k = dy_k R_kᵀ,   dR_k = Σ x_kᵀ dy_k      (Σ over leading axes, and over the blocks that share R)
    """
    p = R.shape[-1]
    n = x.shape[-1] // p

    def blocks(x: Array) -> Array:  # [n, rows, p]
        return rows(x).reshape(-1, n, p).swapaxes(0, 1)

    def turned(x: Array, R: Array) -> Array:
        return (blocks(x) @ R).swapaxes(0, 1).reshape(x.shape)

    def dR(dy: Array) -> Array:
        d = blocks(x).swapaxes(1, 2) @ blocks(dy)
        return d if R.shape[0] == n else d.sum(0, keepdims=True)

    return turned(x, R), lambda dy: (lambda: turned(dy, R.swapaxes(1, 2)), lambda: dR(dy))
