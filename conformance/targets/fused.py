"""Layers that are Q, K and V in one, with a mask of those that have a LoRA: the case's layer as one of the three.

The other two have other numbers, and other LoRA where the mask says so: none of it may show in ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refpeft.ops import Array

MASKS = ("", "..v", "q.v", "qkv")  # '': the plain layer; ours is the last that is adapted


@dataclass(frozen=True)
class Fused:
    """A mask, as 'q.v'. Rows of W are [q; k; v]; those of A and B are there for the adapted parts alone."""

    mask: str

    @property
    def enabled(self) -> Sequence[bool]:
        return [letter != "." for letter in self.mask]

    @property
    def copies(self) -> int:
        return sum(self.enabled)

    def base(self, a: Array) -> Array:
        """[o, …] → [3o, …], ours the last."""
        return np.concatenate([a - 1, -a, a])

    def last(self, a: Array) -> Array:
        return a[-(len(a) // len(self.mask)) :]

    def adapter(self, a: Array) -> Array:
        """[n, …] → [copies n, …], ours the last."""
        return np.concatenate([a * (k - self.copies) for k in range(1, self.copies)] + [a])

    def ours(self, a: Array) -> Array:
        return a[-(len(a) // self.copies) :]
