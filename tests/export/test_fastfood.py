"""The Fastfood projection in a graph: it cannot be written into, so its factors are products one after the other."""

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from refpeft.fastfood import fastfood, length
from tests.export.graphs import gap, ops_of, run, traced

Array = np.ndarray[Any, Any]
SIZES = [(1, 1), (1, 9), (3, 40), (40, 33), (70, 33), (64, 64), (200, 5000)]


def made(d: int, D: int, dtype: Any) -> tuple[Any, dict[str, Array]]:
    """The graph of y = P θ and Pᵀ g, and what it is given."""
    rng, L = np.random.default_rng([d, D]), length(D, d)
    given = {
        "θ": rng.normal(size=d).astype(dtype), "g": rng.normal(size=D).astype(dtype),
        "B": rng.choice(np.array([-1, 1], np.int8), L), "Π": rng.permutation(L).astype(np.int32),
        "G": rng.normal(size=L).astype(dtype),
    }  # fmt: skip

    def f(θ: Any, g: Any, B: Any, Π: Any, G: Any) -> Any:
        y, vjp = fastfood(θ, B, Π, G, D, 3.0)
        dθ, *_ = vjp(g)
        assert dθ is not None
        return {"y": y, "dθ": dθ()}

    return f, given


@pytest.mark.ort
@pytest.mark.parametrize(("d", "D"), SIZES)
def test_on_onnxruntime(d: int, D: int) -> None:
    f, given = made(d, D, np.float32)
    model = traced(f, {name: (a.dtype, a.shape) for name, a in given.items()})
    got = run(model, given)
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in given.items()}
    expected = f(**wide)
    assert all(gap(y, expected[name]) < 1e-6 for name, y in got.items())


@pytest.mark.parametrize(("d", "D"), SIZES)
def test_in_float64_on_onnxs_reference(d: int, D: int) -> None:
    f, given = made(d, D, np.float64)
    model = traced(f, {name: (a.dtype, a.shape) for name, a in given.items()})
    got = ReferenceEvaluator(model).run(None, given)
    assert all(gap(y, expected) < 1e-14 for y, expected in zip(got, f(**given).values(), strict=True))


def test_a_graph_is_small() -> None:
    """Of 2¹³ entries three products for each H, of 2⁸ two; what it holds is no larger than a vector."""
    f, given = made(200, 5000, np.float32)
    model = traced(f, {name: (a.dtype, a.shape) for name, a in given.items()})
    assert ops_of(model).count("MatMul") == (2 + 3) + (3 + 2)  # H of 256 and of 8192, there and back
    assert max(int(np.prod(t.dims)) for t in model.graph.initializer) <= 8192
