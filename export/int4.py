"""Weights of 4 bits: blocks of a row with a scale each, as onnxruntime's operator MatMulNBits reads them.

    W [o, i] in blocks of k columns: w of one row, the last one filled up with zeros

    symmetric      s = −w_j/8, w_j the w of the largest |w|;       z = 8          (Q1)
    zero points    s = (max(w, 0) − min(w, 0))/15;                 z = ⌊−min(w, 0)/s⌉
                   q = ⌊w/s⌉ + z, cut to 0 … 15;                   ŵ = (q − z) s  (Q2)

⌊·⌉ rounds halves to even; s is float32, and a block of zeros has s = 0 and q = z. Symmetric, the w of the largest size
is −8 s, and kept to rounding; of the other sign 7 s is the most there is. With zero points 0 is ŵ of some q, so that
zeros stay zeros.                                                                 (Q3)

Two q share a byte, the first in its lower half. Packed: q [o, ⌈i/k⌉, k/2], s [o, ⌈i/k⌉], z [o, ⌈⌈i/k⌉/2⌉] (none: 8).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
MIDDLE, LARGEST = 8, 15
ROWS = 1 << 20  # numbers that are quantised at a time


@dataclass(frozen=True)
class Blocks:
    """`size`: columns to a scale. `head`: that of a language model too, with the embedding if it is tied to it.
    `accuracy_level`, of the operator: 1 computes in float32; 4 may round activations to
    8 bits, where the runtime has such a kernel."""

    size: int = 128
    zero_points: bool = False
    accuracy_level: int = 1
    head: bool = False

    def __post_init__(self) -> None:
        if self.size < 16 or self.size & (self.size - 1):
            raise ValueError(f"block_size must be a power of two, 16 or more, found {self.size}")
        if self.accuracy_level not in (0, 1, 4):
            raise ValueError(f"accuracy_level must be 0, 1 or 4, found {self.accuracy_level}")


@dataclass(frozen=True)
class Packed:
    q: Array
    s: Array
    z: Array | None = None


def quantise(W: Array, blocks: Blocks) -> Packed:
    """W [o, i], some rows at a time."""
    step = max(1, ROWS // W.shape[1])
    parts = [of_rows(W[n : n + step], blocks) for n in range(0, len(W), step)]
    z = np.concatenate([p.z for p in parts if p.z is not None]) if blocks.zero_points else None
    return Packed(np.concatenate([p.q for p in parts]), np.concatenate([p.s for p in parts]), z)


def of_rows(W: Array, blocks: Blocks) -> Packed:
    w = np.asarray(W, np.float32)
    w = np.pad(w, ((0, 0), (0, -w.shape[1] % blocks.size))).reshape(len(w), -1, blocks.size)
    s, z = ranged(w) if blocks.zero_points else symmetric(w)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(s[..., None] == 0, 0, w / s[..., None])
    q = np.clip(np.rint(steps) + z[..., None], 0, LARGEST).astype(np.uint8)
    return Packed(pack(q), s, pack(z.astype(np.uint8)) if blocks.zero_points else None)


def symmetric(w: Array) -> tuple[Array, Array]:
    """s and z of each block."""
    j = np.abs(w).argmax(-1)[..., None]
    s = np.take_along_axis(w, j, -1)[..., 0] / np.float32(-MIDDLE)
    return s, np.full_like(s, MIDDLE)


def ranged(w: Array) -> tuple[Array, Array]:
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    s = (high - low) / np.float32(LARGEST)
    with np.errstate(divide="ignore", invalid="ignore"):
        return s, np.where(s == 0, 0, np.clip(np.rint(-low / s), 0, LARGEST))


def dequantise(p: Packed, columns: int) -> Array:
    """Ŵ [o, i]"""
    z = np.uint8(MIDDLE) if p.z is None else unpack(p.z)[:, : p.s.shape[1], None]
    Ŵ: Array = scaled(unpack(p.q), z, p.s)[:, :columns]
    return Ŵ


def scaled(q: Any, z: Any, s: Any) -> Any:
    """(q − z) s, of arrays or of symbols: q [… n, k], z [… n, 1] or [], s [… n] → [… n k]"""
    ŵ = (q.astype(np.float32) - z.astype(np.float32)) * s[..., None]
    return ŵ.reshape(*ŵ.shape[:-2], -1)


def pack(q: Array) -> Array:
    """Two to a byte along the last axis, which a zero fills up."""
    q = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, q.shape[-1] % 2)])
    return np.asarray(q[..., ::2] | q[..., 1::2] << 4)


def unpack(packed: Array) -> Array:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
