"""Fastfood: a random projection from d to D dimensions in O(D log D) time and O(D) memory.

    P θ = [H G Π H B pad(θ)]_{:D} / c,   c = √(D Σ G²)            Le, Sarlós & Smola 2013, arXiv 1408.3060, §3, eq. (8)

    H [L, L]  the Walsh-Hadamard matrix: H₁ = 1, H₂ₙ = [Hₙ Hₙ; Hₙ −Hₙ];   L = `length(D, d)`
    B [L]  signs ±1, (B x)ᵢ = Bᵢ xᵢ;    Π [L]  a permutation, (Π x)ᵢ = x[Πᵢ];    G [L]  normal, (G x)ᵢ = Gᵢ xᵢ
    pad  zeros behind, up to L;    [·]_{:D}  the first D.    θ [d] → P θ [D]

H is symmetric, so the transpose is the same factors in the other order:

    Pᵀ g = [B H Πᵀ G H pad(g)]_{:d} / c,   (Πᵀ x)[Πᵢ] = xᵢ

Claims:
    F1  H H = L I.
    F2  With D = L all columns of P have length 1: G Π H B eₖ has the entries ±G, and H makes any vector √L times as
        long. With D < L they have length 1 on average, being D of L entries that are of one size on average.
    F3  ⟨P θ, g⟩ = ⟨θ, Pᵀ g⟩: the gradient is the transpose.

How it is computed. H is the Kronecker product of any smaller ones whose sizes multiply to L: every factor is a matrix
product with H₁₆ or H₈, so small that BLAS does it about as fast as memory can be read, and all of them run on blocks
that stay in cache: first on consecutive entries, then on columns. And H of a short vector padded is H of the short
vector, repeated: (h, h, h, h) = H (θ, 0, 0, 0) with h = H_{L/4} θ.

Where implementations differ:
    * A widely circulated autograd function for H divides its backward by √L though the forward does not, so that all
      gradients are off by this factor. Here the gradient is the transpose.
    * It pads with L − d zeros even where that is negative, which drops the end of θ. Here L is at least d.
"""

import functools
import math
from typing import Any

import numpy as np

from refpeft.ops import Array, Vjp, op

BLOCK = 1 << 16  # entries that are worked on at a time, so that they and as many others stay in a core's own cache
LANES = 128  # columns of one small matrix product


def length(D: int, d: int = 1) -> int:
    """L: the smallest power of two that is at least D and at least d."""
    return 1 << (max(D, d) - 1).bit_length()


@op
def fastfood(θ: Array, B: Array, Π: Array, G: Array, D: int, c: float | None = None) -> tuple[Array, Vjp]:
    """y = P θ = [H G Π H B pad(θ)]_{:D} / c.      θ [d], B, Π, G [L] → y [D]

    dθ = Pᵀ dy = [B H Πᵀ G H pad(dy)]_{:d} / c.      c = √(D Σ G²), if not given; B, Π and G are constants.
    """
    d, L = θ.shape[0], G.shape[0]
    n = length(d)
    γ = 1 / (c or math.sqrt(D * np.vdot(G, G)))

    def dθ(dy: Array) -> Array:
        u = scattered(hadamard(padded(dy, L)), Π, G)
        h = hadamard(u if n == L else u.reshape(-1, n).sum(0))[:d]
        h *= B[:d]
        h *= γ
        return h

    x = padded(θ * B[:d] * γ, n)
    return hadamard(gathered(hadamard(x), Π, G))[:D], lambda dy: (lambda: dθ(dy), None, None, None)


def padded(x: Array, n: int) -> Array:
    """x and zeros behind it, n entries together: a new array."""
    return np.concatenate([x, np.zeros(n - x.shape[0], x.dtype)])


def gathered(h: Array, Π: Array, G: Array) -> Array:
    """G Π u,   u = (h, h, …) [L]      h [n], n a divisor of L"""
    if not isinstance(h, np.ndarray):
        u: Array = np.broadcast_to(h, (G.shape[0] // h.shape[0], h.shape[0])).reshape(-1)
        return u[Π] * G
    v, index = np.empty(Π.shape[0], h.dtype), np.empty(min(BLOCK, Π.shape[0]), np.intp)
    for k in range(0, Π.shape[0], BLOCK):
        part = v[k : k + BLOCK]
        np.bitwise_and(Π[k : k + BLOCK], h.shape[0] - 1, out=index)
        np.take(h, index, out=part, mode="wrap")  # the index is in range: this is the mode that checks it fastest
        part *= G[k : k + BLOCK]
    return v


def scattered(v: Array, Π: Array, G: Array) -> Array:
    """Πᵀ G v      v [L] → [L]"""
    if not isinstance(v, np.ndarray):
        u = np.zeros_like(v)
        np.put_along_axis(u, Π, v * G, 0)
        return u
    n = min(BLOCK, v.shape[0])
    u, part, index = np.empty_like(v), np.empty(n, v.dtype), np.empty(n, np.intp)
    for k in range(0, v.shape[0], n):
        np.copyto(index, Π[k : k + n])
        u[index] = np.multiply(v[k : k + n], G[k : k + n], out=part)
    return u


def hadamard(x: Array) -> Array:
    """x ← H x, in place: x [L] must be the caller's own."""
    if not isinstance(x, np.ndarray):
        return product(x)
    L = x.shape[0]
    n = min(L, BLOCK)
    width = max(BLOCK * n // L, min(n, LANES // 2))
    spare = np.empty(max(n, L // n * width), x.dtype)
    for row in x.reshape(-1, n):
        r = radices(n)[0]
        here, there = row.reshape(-1, r), spare[:n].reshape(-1, r)
        np.matmul(here, H(r, x.dtype), out=there)
        columns(there, here, row)
    if n < L:
        table = x.reshape(-1, n)
        for k in range(0, n, width):
            part = table[:, k : k + width]
            columns(part, spare[: part.size].reshape(part.shape), part)
    return x


def product(x: Array) -> Array:
    """H x, for an array that cannot be written into: the factors one after the other, on entries that lie `done` apart.
    Larger ones than where it can, since each is a pass over memory."""
    n, done = x.shape[0], 1
    for r in radices(n, bits=5):
        h = H(r, x.dtype)
        x = x.reshape(-1, r) @ h if done == 1 else h @ x.reshape(-1, r, done)
        done *= r
    return x.reshape(n)


def columns(a: Array, b: Array, out: Array) -> None:
    """out ← H a for every column.      a, b [n, w]: where the values are, and room for as many; out is one of them"""
    n, done = a.shape[0], 1
    dense = a.flags.c_contiguous and b.flags.c_contiguous
    for r in radices(n):
        np.matmul(H(r, a.dtype), tiles(a, r, done, dense), out=tiles(b, r, done, dense))
        a, b, done = b, a, done * r
    if not np.may_share_memory(a, out):
        out[...] = a.reshape(out.shape)


def tiles(a: Array, r: int, done: int, dense: bool) -> Array:
    """a [n, w] as a stack of matrices [r, lanes], each of r rows that lie `done` rows apart: a view."""
    w = a.shape[1]
    if dense:  # rows that follow one another are one long row
        done, w = 1, w * done
    lanes = min(w, LANES)
    return a.reshape(-1, r, done, w // lanes, lanes).transpose(0, 2, 3, 1, 4)


@functools.cache
def radices(n: int, bits: int = 4) -> tuple[int, ...]:
    """Factors of n, a power of two: as few as possible, at most 2^bits each, about equal."""
    all_bits = n.bit_length() - 1
    count = -(-all_bits // bits)
    return tuple(1 << (all_bits * (k + 1) // count - all_bits * k // count) for k in range(count)) or (1,)


@functools.cache
def H(n: int, dtype: Any) -> Array:
    """Hₙ, entries (−1)^(number of bits that i and j share)."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype)
