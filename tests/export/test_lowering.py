"""Every fused node against the formula it stands for, on onnxruntime; and that the node is really there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import checker

from refpeft import ops
from refpeft.export.lowering import RULES
from refpeft.export.proto import to_model
from refpeft.export.signature import KNOWN
from refpeft.export.symbols import Graph
from refpeft.export.verification import ratio
from tests.export.graphs import Array, ops_of, run, traced

F32 = np.dtype(np.float32)
LIMIT = 5.0  # of one layer
B, S, T = "batch", "sequence", "keys"
sizes = {B: 2, S: 3, T: 5}


def causal(s: int, t: int) -> Array:
    return np.arange(t)[None, :] <= np.arange(s)[:, None] + t - s


# op, arguments (shapes; a callable makes the value), options, the nodes that must appear
CASES: dict[str, tuple[str, list[Any], dict[str, Any], set[str]]] = {
    "linear": ("linear", [(B, S, 4), (6, 4), (6,)], {}, {"MatMul", "Add", "Transpose"}),
    "linear, no bias": ("linear", [(B, S, 4), (6, 4)], {}, {"MatMul", "Transpose"}),
    "linear, rows": ("linear", [(B, 4), (6, 4), (6,)], {}, {"Gemm"}),
    "linear, rows, no bias": ("linear", [(B, 4), (6, 4)], {}, {"MatMul", "Transpose"}),
    "layer_norm": ("layer_norm", [(B, S, 4), (4,), (4,)], {"eps": 1e-12}, {"LayerNormalization"}),
    "layer_norm, large eps": ("layer_norm", [(B, S, 4), (4,), (4,)], {"eps": 0.5}, {"LayerNormalization"}),
    "rms_norm": ("rms_norm", [(B, S, 4), (4,)], {"eps": 1e-6}, {"RMSNormalization"}),
    "rms_norm, large eps": ("rms_norm", [(B, S, 4), (4,)], {"eps": 0.5}, {"RMSNormalization"}),
    "gelu": ("gelu", [(B, S, 4)], {}, {"Gelu"}),
    "gelu_new": ("gelu_new", [(B, S, 4)], {}, {"Gelu"}),
    "silu": ("silu", [(B, S, 4)], {}, {"Sigmoid", "Mul"}),
    "relu": ("relu", [(B, S, 4)], {}, {"Relu"}),
    "tanh": ("tanh", [(B, S, 4)], {}, {"Tanh"}),
    "pick": ("pick", [(B, S, 4), ((B,), lambda: np.array([2, 0]))], {}, {"GatherND"}),
    "embedding": ("embedding", [((B, S), lambda: np.array([[0, 5, 1], [2, 2, 0]])), (6, 4)], {}, {"Gather"}),
    "rope": ("rope", [(B, S, 2, 4), (B, S, 1, 2), (B, S, 1, 2)], {}, {"RotaryEmbedding"}),
    "rope, shared angles": ("rope", [(B, S, 2, 4), (1, S, 1, 2), (1, S, 1, 2)], {}, {"RotaryEmbedding", "Expand"}),
    "attention": ("attention", [(B, S, 4, 2), (B, T, 4, 2), (B, T, 4, 2)], {}, {"Attention"}),
    "attention, scale": ("attention", [(B, S, 4, 2)] + [(B, T, 4, 2)] * 2, {"scale": 2.0}, {"Attention"}),
    "attention, grouped": ("attention", [(B, S, 4, 2)] + [(B, T, 2, 2)] * 2, {}, {"Attention"}),
    "attention, one key-value head": ("attention", [(B, S, 4, 2)] + [(B, T, 1, 2)] * 2, {}, {"Attention"}),
    "attention, causal": (
        "attention", [(B, S, 4, 2)] + [(B, T, 2, 2)] * 2 + [((1, 1, S, T), lambda: causal(3, 5)[None, None])],
        {}, {"Attention", "Expand"},
    ),
    "attention, padding": (
        "attention", [(B, S, 4, 2)] + [(B, T, 4, 2)] * 2
        + [((B, 1, 1, T), lambda: np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)[:, None, None])],
        {}, {"Attention", "Expand"},
    ),
    "attention, bias": (
        "attention", [(B, S, 4, 2)] + [(B, T, 4, 2)] * 2
        + [((1, 1, S, T), lambda: causal(3, 5)[None, None]), (1, 4, S, T)],
        {"scale": 1.0}, {"Attention"},
    ),
    "attention, bias and a row that sees nothing": (
        "attention", [(B, S, 4, 2)] + [(B, T, 2, 2)] * 2
        + [((B, 1, S, T), lambda: np.array([causal(3, 5), causal(3, 5) & False])[:, None]), (1, 4, S, T)],
        {}, {"Attention"},
    ),
    "attention, a row that sees nothing": (
        "attention", [(B, S, 4, 2)] + [(B, T, 4, 2)] * 2
        + [((B, 1, S, T), lambda: np.array([causal(3, 5), causal(3, 5) & False])[:, None])],
        {}, {"Attention"},
    ),
}  # fmt: skip


def values(arguments: list[Any]) -> list[tuple[tuple[Any, ...], Array]]:
    """(symbolic shape, numbers) of each argument."""
    rng = np.random.default_rng(0)
    made = []
    for a in arguments:
        shape, make = a if callable(a[-1]) else (a, None)
        numbers = rng.normal(size=[sizes.get(d, d) for d in shape]).astype(np.float32) if make is None else make()
        made.append((shape, numbers))
    return made


@pytest.mark.ort
@pytest.mark.parametrize("case", CASES)
def test_fused_node_equals_the_formula(case: str) -> None:
    name, arguments, options, nodes = CASES[case]
    f: Callable[..., Any] = getattr(ops, name)
    made = values(arguments)
    feeds = {f"x{k}": numbers for k, (_, numbers) in enumerate(made)}
    inputs = {f"x{k}": (numbers.dtype, shape) for k, (shape, numbers) in enumerate(made)}
    args = list(feeds.values())
    ref = f(*(a.astype(np.float64) if a.dtype == F32 else a for a in args), **options)[0]
    spec = f(*args, **options)[0]

    fused = traced(lambda *xs: f(*xs, **options)[0], inputs)
    formula = traced(lambda *xs: f(*xs, **options)[0], inputs, rules={})
    assert nodes <= set(ops_of(fused))
    for model in (fused, formula):
        assert ratio(run(model, feeds)["y"], ref, spec, F32) <= LIMIT


@pytest.mark.ort
@pytest.mark.parametrize(("known", "new"), [(5, 0), (0, 5)])
def test_attention_to_what_is_known_or_new(known: int, new: int) -> None:
    """One of two pasts is empty: the formula on both joined, which the graph does not do."""
    rng = np.random.default_rng(0)
    feeds = {"q": rng.normal(size=(2, 3, 4, 2))} | {n: rng.normal(size=(2, 4, known, 2)) for n in ("K", "V")}
    feeds |= {n: rng.normal(size=(2, new, 4, 2)) for n in ("k", "v")}
    feeds = {n: a.astype(np.float32) for n, a in feeds.items()}
    seen = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)[:, None, None]

    def f(q: Any, K: Any, V: Any, k: Any, v: Any, mask: Any) -> Any:
        pair = (np.concatenate([a.swapaxes(1, 2), b], axis=1) for a, b in ((K, k), (V, v)))
        return ops.attention(q, *pair, mask, scale=0.5)[0]

    past, fresh = (F32, (B, 4, KNOWN, 2)), (F32, (B, "fresh", 4, 2))
    inputs = {"q": (F32, (B, S, 4, 2)), "K": past, "V": past, "k": fresh, "v": fresh}
    graph = Graph(RULES)
    symbols = {n: graph.input(n, dtype, shape) for n, (dtype, shape) in inputs.items()}
    mask = graph.input("mask", bool, (B, 1, 1, symbols["K"].shape[2] + symbols["k"].shape[1]))
    model = to_model(graph, [*inputs, "mask"], {"y": f(**symbols, mask=mask)}, {})
    checker.check_model(model, full_check=True)
    assert "If" in ops_of(model)
    assert {n.op_type for n in model.graph.node if {"K", "V"} & set(n.input)} == {"Shape"}
    ref = f(**{n: a.astype(np.float64) for n, a in feeds.items()}, mask=seen)
    got = run(model, {**feeds, "mask": seen})["y"]
    assert ratio(got, ref, f(**feeds, mask=seen), F32) <= LIMIT


def test_every_rule_is_tested_and_names_an_op() -> None:
    assert set(RULES) <= {name for name, *_ in CASES.values()}
    assert all(callable(getattr(ops, name)) for name in RULES)


def test_an_op_without_a_rule_is_its_formula() -> None:
    model = traced(lambda x: ops.softmax(x)[0], {"x": (np.float32, ("rows", 4))})
    assert "Softmax" not in ops_of(model)
    assert {"Exp", "Div"} <= set(ops_of(model))


@pytest.mark.ort
def test_cross_entropy_and_its_gradient() -> None:
    def f(x: Any, labels: Any) -> dict[str, Any]:
        loss, vjp = ops.cross_entropy(x, labels)
        dx, _ = vjp(1.0)
        assert dx is not None
        return {"loss": loss, "dx": dx()}

    x = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    labels = np.array([[1, -100, 6], [0, 0, -100]])
    got = run(traced(f, {"x": (np.float32, (B, S, 7)), "labels": (np.int64, (B, S))}), {"x": x, "labels": labels})
    ref, spec = f(x.astype(np.float64), labels), f(x, labels)
    assert max(ratio(got[k], np.asarray(ref[k]), np.asarray(spec[k]), F32) for k in ref) <= LIMIT
