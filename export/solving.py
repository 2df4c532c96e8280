"""Linear equations in a graph: ONNX has neither an inverse of a matrix nor a solution.

    A X = B      A [… p, p], B [… p, q] → X [… p, q]

by Gauss and Jordan: for k = 0, 1, …   row k ← row k/a_kk,   every other row i ← row i − a_ik · row k:   eight nodes for
each k. Rows are never exchanged, so A must not need it. It does not if its symmetric part is positive definite, and the
matrices of Cayley's transform are I ± Q with Q = −Qᵀ: what is left of I + Q after some steps is D = I + Q₂₂ +
Q₁₂ᵀ (I + Q₁₁)⁻¹ Q₁₂, whose symmetric part is at least I again, so that no pivot is below 1. What rounding adds is at
most of the order of p (1 + ‖Q‖²) of its unit (Golub & Van Loan 1979, Linear Algebra Appl. 28, §3).
"""

from typing import Any

import numpy as np


def solve(g: Any, A: Any, B: Any) -> Any:
    """X. The columns of A are dropped as soon as they are those of the identity."""
    p = A.shape[-1]
    x = np.concatenate([A, B], axis=-1)
    for k in range(p):
        column, rest = x[..., :1], x[..., 1:]
        row = rest[..., k : k + 1, :] / column[..., k : k + 1, :]
        x = rest - (column - np.eye(p, dtype=x.dtype)[:, k : k + 1]) * row
    return x
