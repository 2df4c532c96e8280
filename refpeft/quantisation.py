"""NF4: weights in four bits, the base of QLoRA.      Dettmers et al. 2023, arXiv 2305.14314, §3, eq. (4)-(5), App. E

    W [o, i] is read row by row as blocks w of 64 numbers, the last of which may be shorter. Of each block

        a = maxⱼ |wⱼ|,   cⱼ = argminₖ |qₖ − wⱼ/a|,   w̃ⱼ = a q[cⱼ]              a float32, c ∈ 0 … 15

    Two codes are a byte, the first of them in its upper four bits; the last byte may end with the code of 0.
    A layer computes with W̃ [o, i]; what is trained is beside it:   y = x W̃ᵀ + b + s x Aᵀ Bᵀ,   dx = dy (W̃ + s B A).

The table q are quantiles of the normal distribution Φ, so that about equally many weights have each code: with
δ = ½ (31/32 + 29/30),

    Φ⁻¹(δ + (½ − δ) k/8), k < 8;   −Φ⁻¹(δ + (½ − δ) k/7), k < 7;   and 0;      all of them over Φ⁻¹(δ)

The paper prints q in float32, and what it prints is what implementations have: `TABLE`, within 2 · 10⁻⁷ of this.

Claims:
    NF1  The table is that of the formula, to 2 · 10⁻⁷.
    NF2  Numbers that are read back are stored again as they were: nf4(w̃) = (a, c), and so read(nf4(w̃)) = w̃.
    NF3  −a, 0 and a are kept exactly, and a block of zeros stays one.
    NF4  |w̃ − w| ≤ a/2 · max (qₖ₊₁ − qₖ): half the widest step of the table.

Where implementations differ:
    * bitsandbytes writes 10⁻³⁸ for a where a block is zero; we write 0. All codes are then that of 0.
    * torchao 0.15 computes a table of its own, whose numbers differ by up to 5 · 10⁻⁵.
    * A number exactly in the middle of two of the table gets the smaller code, here as in bitsandbytes.
    * With double quantisation (§3) the a of 256 blocks are stored in 8 bits. It is not part of this module.
"""

import numpy as np

from refpeft.ops import Array

BLOCK = 64
TABLE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
ZERO = 7  # TABLE[ZERO] = 0


def nf4(W: Array, block: int = BLOCK) -> tuple[Array, Array]:
    """c, packed, uint8 [⌈n/2⌉];   a, float32 [⌈n/64⌉].      W [o, i] of n numbers, in any float dtype"""
    w = blocks(W.astype(np.float32).reshape(-1), block)
    a = np.abs(w).max(1, initial=0)
    middle = (TABLE[1:].astype(np.float64) + TABLE[:-1]) / 2
    c = np.searchsorted(middle, w / np.where(a > 0, a, 1)[:, None]).reshape(-1)[: W.size]
    return pack(c), a


def read(c: Array, a: Array, W: Array, block: int = BLOCK) -> Array:
    """W̃ [o, i], of the shape and dtype of W."""
    w = TABLE[unpack(c)[: W.size]]
    return (blocks(w, block) * a[:, None]).reshape(-1)[: W.size].reshape(W.shape).astype(W.dtype)


def rounded(W: Array, block: int = BLOCK) -> Array:
    """W̃ = read(nf4(W))."""
    return read(*nf4(W, block), W, block)


def blocks(w: Array, block: int) -> Array:
    """[n] → [⌈n/block⌉, block], zeros behind."""
    return np.pad(w, (0, -len(w) % block)).reshape(-1, block)


def pack(c: Array) -> Array:
    """Two codes in a byte, the first in the upper half."""
    c = np.pad(c, (0, len(c) % 2), constant_values=ZERO).astype(np.uint8)
    packed: Array = c[0::2] << 4 | c[1::2]
    return packed


def unpack(packed: Array) -> Array:
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
