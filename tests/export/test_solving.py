"""Linear equations in a graph, on onnxruntime and on onnx's reference."""

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from refpeft.rotations import cayley
from tests.export.graphs import gap, run, traced

Array = np.ndarray[Any, Any]


def skew(p: int, size: float, dtype: Any) -> Array:
    A = np.random.default_rng(p).normal(size=(3, p, p))
    return (size * (A - A.swapaxes(1, 2))).astype(dtype)


@pytest.mark.ort
@pytest.mark.parametrize("size", [0.01, 1, 30])
@pytest.mark.parametrize("p", [1, 2, 4, 9, 32])
def test_cayley_on_onnxruntime(p: int, size: float) -> None:
    """The transform and its gradient, with no rows exchanged: within what the module says of rounding."""
    Q, dR = skew(p, size, np.float32), np.random.default_rng(0).normal(size=(3, p, p)).astype(np.float32)

    def f(Q: Any, dR: Any) -> Any:
        R, vjp = cayley(Q)
        (dQ,) = vjp(dR)
        assert dQ is not None
        return {"R": R, "dQ": dQ()}

    shape = (np.float32, (3, p, p))
    got = run(traced(f, {"Q": shape, "dR": shape}), {"Q": Q, "dR": dR})
    exact = f(Q.astype(np.float64), dR.astype(np.float64))
    allowed = 2.0**-24 * p * (1 + max(np.linalg.norm(q, 2) for q in Q) ** 2)
    assert gap(got["R"], exact["R"]) <= allowed
    assert gap(got["dQ"], exact["dQ"]) <= 4 * allowed  # of a solution, and of one more


@pytest.mark.parametrize("q", [1, 3])
def test_solve_is_numpys_in_float64(q: int) -> None:
    A, B = np.eye(5) + skew(5, 2.0, np.float64), np.random.default_rng(1).normal(size=(3, 5, q))
    model = traced(np.linalg.solve, {"A": (np.float64, (3, 5, 5)), "B": (np.float64, (3, 5, q))})
    (got,) = ReferenceEvaluator(model).run(None, {"A": A, "B": B})
    assert gap(got, np.linalg.solve(A, B)) < 1e-14


def test_no_pivot_is_below_1() -> None:
    """As the module says: of I + Q, whatever is left after some steps has a symmetric part of at least I."""
    for seed in range(20):
        A = np.random.default_rng(seed).normal(size=(8, 8)) * 10.0 ** (seed % 5 - 2)
        left = np.eye(8) + A - A.T
        while left.size:
            assert np.linalg.eigvalsh((left + left.T) / 2).min() >= 1 - 1e-9
            left = left[1:, 1:] - np.outer(left[1:, 0], left[0, 1:]) / left[0, 0]
