"""Symbols: the same NumPy code on arrays and on symbols gives the same numbers, dtypes and shapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import special

from refpeft.export.proto import to_model
from refpeft.export.symbols import END, Graph
from tests.export.graphs import ops_of, run, traced

B, S = "batch", "sequence"
rng = np.random.default_rng(0)
ARRAYS = {  # name → symbolic shape, numbers
    "x": ((B, S, 6), rng.normal(size=(2, 3, 6)).astype(np.float32)),
    "W": ((4, 6), rng.normal(size=(4, 6)).astype(np.float32)),
    "d": ((B, S, 6), rng.normal(size=(2, 3, 6))),
    "ids": ((B, S), np.array([[1, 0, 3], [3, 3, 2]])),
    "on": ((B, S), np.array([[True, False, True], [False, False, True]])),
}


def in_place(x: Any) -> Any:
    y = x * 2
    z = y
    y += 1
    y *= x
    return np.exp(y, out=y) + z


def scattered(W: Any, ids: Any) -> Any:
    out = np.zeros_like(W)
    zero = np.zeros_like(W)
    np.add.at(out, ids, W[ids] * 2)
    return out + zero


def put(x: Any, ids: Any) -> Any:
    y = x * 1
    np.put_along_axis(y, ids[..., None], 7.0, axis=-1)
    return y


CASES: dict[str, Callable[..., Any]] = {
    "the first places, and the others": lambda x: np.concatenate([x[:, 1:], x[:, :1] * 2], axis=1),
    "places that were added": lambda x: np.concatenate([x[:1], x, x], axis=0)[2:],
    "parts of a whole laid out flat": lambda x: x.reshape(-1).reshape(-1, 3).T @ (x + 1).reshape(-1).reshape(-1, 3),
    "full, ones, broadcast": lambda x: np.full_like(x, 7) + np.ones_like(x) * np.broadcast_to(x[:, :1], x.shape),
    "vdot": lambda x: np.vdot(x, x + 1),
    "arithmetic": lambda x: (1 - x) * 2.5 / (x * x + 3) ** 2 - -x,
    "promotion, float32 with float64": lambda x, d: x + d,
    "promotion, int with float": lambda x, ids: x * ids[..., None],
    "promotion, bool with float": lambda x, on: x * on[..., None],
    "promotion, int64 / int64": lambda ids: ids / (ids + 1),
    "promotion, Python numbers adapt": lambda x: 2 * x + 1.0,
    "promotion, NumPy's do not": lambda x: np.float64(2) * x,
    "functions": lambda x: np.tanh(x) + np.exp(-x) + np.sqrt(x * x) + np.log(x * x + 1) + np.cos(x) * np.sin(x),
    "erf": lambda x: special.erf(x),
    "maximum, minimum": lambda x: np.maximum(x, 0) + np.minimum(x, 0.5),
    "comparisons": lambda x: (x > 0) & (x <= 1) | (x < -1) & (x >= -2),
    "equal": lambda ids: (ids == 3) | (ids != 1),
    "matmul": lambda x, W: x @ W.T,
    "matmul, array first": lambda W: np.ones((2, 4), np.float32) @ W,
    "matmul of a batch": lambda x: x @ x.swapaxes(1, 2),
    "sum": lambda x: x.sum(),
    "sum of an axis": lambda x: x.sum(-1) + np.sum(x, axis=2),
    "sum, several axes": lambda x: x.sum((0, 2), keepdims=True),
    "sum of booleans": lambda on: on.sum(axis=1),
    "add.reduce": lambda x: np.add.reduce(x, axis=-1, keepdims=True) + np.add.reduce(x),
    "max": lambda x: np.max(x, axis=-1, keepdims=True, initial=0.5) + x.max(axis=1, keepdims=True),
    "maximum.reduce": lambda x: np.maximum.reduce(x, axis=-1, initial=-9.0),
    "reshape, rows": lambda x: x.reshape(-1, x.shape[-1]),
    "reshape, back": lambda x: (x.reshape(-1, 6) * 2).reshape(*x.shape[:-1], 6),
    "reshape, heads": lambda x: x.reshape(x.shape[0], x.shape[1], 2, 3).transpose(0, 2, 1, 3),
    "reshape, folded": lambda x: (x + 1).reshape(x.shape[0], 2, 3 * x.shape[1]).reshape((x.shape[0], -1)),
    "transposes": lambda x: x.T.T.swapaxes(0, 2).transpose(1, 0, 2),
    "slices": lambda x: x[..., :2] + x[..., 2:4] + x[:, :, 4:],
    "slices with steps": lambda x: x[..., 1::2],
    "ints": lambda x: x[0] + x[:, -1][:, None] + x[..., 2][..., None],
    "new axes": lambda on: on[:, None, None, :] & on[:, None, :, None],
    "rows by index": lambda W, ids: W[ids],
    "arange": lambda ids: np.arange(ids.shape[1], like=ids) + np.arange(3, like=ids)[:, None, None] + ids,
    "causal mask": lambda ids: np.arange(ids.shape[1], like=ids)[None, :] <= np.arange(ids.shape[1], like=ids)[:, None],
    "where": lambda x, on: np.where(on[..., None], x, -np.inf),
    "where of numbers": lambda on: np.where(on, 0.0, -np.inf),
    "concatenate": lambda x: np.concatenate([x, 2 * x], axis=1),
    "concatenate and reshape": lambda x: np.concatenate([x, x[:, 0][:, None]], axis=1).reshape(-1, 3),
    "take_along_axis": lambda x, ids: np.take_along_axis(x, ids[..., None], axis=-1),
    "put_along_axis": put,
    "cumsum": lambda ids: np.cumsum(ids, axis=1),
    "zeros_like": lambda ids: np.zeros_like(ids) + np.zeros_like(ids[:, 0], dtype=np.float32)[:, None],
    "add.at": scattered,
    "astype": lambda x: x.astype(np.float64) + (x > 0).astype(np.float32),
    "in place": in_place,
    "a mean over a size": lambda x: x.sum(1) / x.shape[1],
}


@pytest.mark.ort
@pytest.mark.parametrize("case", CASES)
def test_symbols_compute_what_numpy_computes(case: str) -> None:
    f = CASES[case]
    names = f.__code__.co_varnames[: f.__code__.co_argcount]
    model = traced(f, {name: (ARRAYS[name][1].dtype, ARRAYS[name][0]) for name in names})
    arrays = {name: ARRAYS[name][1] for name in names}
    expected = f(*arrays.values())
    got = run(model, arrays)["y"]
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    declared = [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    assert [d for d in declared if isinstance(d, int)] == [
        n for d, n in zip(declared, got.shape, strict=True) if isinstance(d, int)
    ]


def made(f: Callable[..., Any], **shapes: Any) -> list[str]:
    return ops_of(traced(f, {name: (np.float32, shape) for name, shape in shapes.items()}))


def test_equal_nodes_are_made_once() -> None:
    assert made(lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True), x=(B, 4)) == ["Exp", "ReduceSum", "Div"]


def test_what_no_output_needs_is_left_out() -> None:
    def f(x: Any) -> Any:
        np.exp(x)
        return x + 1

    assert made(f, x=(B, 4)) == ["Add"]


def test_transposes_and_reshapes_collapse() -> None:
    assert made(lambda x: x.T.T + 1, x=(B, 4)) == ["Add"]
    assert made(lambda x: x.reshape(x.shape[0], 2, 2).reshape(-1, 4).reshape(x.shape) + 1, x=(B, 4)) == ["Add"]
    assert made(lambda x: x.reshape(*x.shape[:2], 2, 3).reshape(x.shape[0], -1), x=(B, 5, 6)) == ["Reshape"]


def test_a_known_reshape_needs_no_computed_shape() -> None:
    assert made(lambda x: x.reshape(*x.shape[:2], 2, 3), x=(B, S, 6)) == ["Reshape"]


def test_sizes_are_polynomials() -> None:
    graph = Graph()
    past, new = graph.input("x", np.float32, ("past", "new")).shape
    assert past + new == new + past != past
    assert (past + 1) * (new + 2) == past * new + 2 * past + new + 2
    assert str(past * new + 3) == "3 + new*past"
    assert past * 0 + 1 != past


def test_what_cannot_be_exported_says_so() -> None:
    x = Graph().input("x", np.float32, (B, 4))
    for f, message in {
        (lambda: np.arctan(x), "np.arctan"),
        (lambda: np.linalg.norm(x), "cannot be exported"),
        (lambda: x[:2], "a slice of an axis of batch places"),
        (lambda: x[::2], "a slice of an axis of batch places"),
        (lambda: x[:-1], "a slice of an axis of batch places"),
        (lambda: np.concatenate([x[:1], x])[:3], "a slice of an axis of 1 . batch places"),
        (lambda: bool(x > 0), "not known before the graph runs"),
        (lambda: list(x), "iterated"),
        (lambda: x @ np.ones((3, 4), np.float32), "inner sizes differ"),
        (lambda: x + np.ones(3, np.float32), "do not broadcast"),
        (lambda: x.reshape(-1).reshape(-1, 3), "cannot be reshaped"),
        (lambda: x.reshape(7, -1).reshape(x.shape[0], -1, 3).reshape(x.shape[0] * 5, -1), "cannot be reshaped"),
    }:
        with pytest.raises((NotImplementedError, TypeError, ValueError), match=message):
            f()


def test_what_changes_nothing_is_no_node() -> None:
    g = Graph()
    x, n = g.input("x", np.float32, ("batch", 4)), g.input("n", np.int64, ("batch",))
    assert [y.node.name for y in (1.0 * x, x * 1, x + 0, 0 + n, n * 1)] == ["x", "x", "x", "n", "n"]
    assert (n * 1.0).dtype == np.float64
    assert [(2 * x).node.op, (x + 1).node.op, (x - 0).node.op] == ["Mul", "Add", "Sub"]
    y = x + 0
    y += 1
    assert (x.node.name, y.node.op) == ("x", "Add")


@pytest.mark.ort
@pytest.mark.parametrize("known", [0, 2, 3])
def test_axes_may_be_without_places(known: int) -> None:
    """[b (s − known), 4] → [b, s − known, 2, 2], whatever is left: beside 0 places nothing else can be worked out."""
    x, past = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.zeros((2, known), np.float32)
    graph = Graph()
    a, b = graph.input("x", np.float32, (B, S, 4)), graph.input("past", np.float32, (B, "known"))
    places = [graph.ints([b.shape[1]]), *(graph.constant([k], np.int64) for k in (END, 1))]
    rest = graph.emit("Slice", (a, *places), np.float32, (a.shape[0], a.shape[1] - b.shape[1], 4))
    flat = np.exp(rest.reshape(rest.shape[0] * rest.shape[1], 4))
    y = flat.reshape(*rest.shape[:2], 2, 2)
    assert str(y.shape[1]) == "sequence - known"
    model = to_model(graph, ["x", "past"], {"y": y + 1}, {})
    got = run(model, {"x": x, "past": past})["y"]
    assert np.allclose(got, np.exp(x[:, known:]).reshape(2, -1 if known < 3 else 0, 2, 2) + 1, rtol=1e-6)


@pytest.mark.ort
def test_each_file_asks_its_own_inputs() -> None:
    """A size is told by the first input that has it, or by those of the file that is made."""
    graph = Graph()
    x = graph.input("x", np.float32, (B, 2))
    z = graph.input("z", np.float32, (S, B))
    first = to_model(graph, ["x"], {"y": (x * 2).reshape(2, x.shape[0])}, {})
    graph.tell([z])
    second = to_model(graph, ["z"], {"y": (z * 2).reshape(x.shape[0], z.shape[0])}, {})
    for model, feeds, shape in ((first, {"x": np.ones((3, 2))}, (2, 3)), (second, {"z": np.ones((4, 3))}, (3, 4))):
        assert run(model, {n: a.astype(np.float32) for n, a in feeds.items()})["y"].shape == shape
