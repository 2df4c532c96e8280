"""LoRA on a linear layer, rows of x times W [i, o], with A [i, r], B [r, o] and a number as scale."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class LoRALinear:
    W: Array
    A: Array
    B: Array
    scale: float
    b: Array | None = None

    def __call__(self, x: Array) -> Array:
        y = x @ self.W + self.scale * (x @ self.A @ self.B)
        return y if self.b is None else y + self.b

    def merged(self) -> Array:
        """W + scale A B, which runs without the adapter."""
        W: Array = self.W + self.scale * self.A @ self.B
        return W

    def gradients(self, x: Array, dy: Array) -> dict[str, Array]:
        """Of A, B and x, given that of y."""
        x2, d2 = x.reshape(-1, x.shape[-1]), self.scale * dy.reshape(-1, dy.shape[-1])
        return {
            "A": x2.T @ (d2 @ self.B.T),
            "B": (x2 @ self.A).T @ d2,
            "x": dy @ self.W.T + self.scale * (dy @ self.B.T @ self.A.T),
        }
