"""What the export tests share: tracing a function into an ONNX model and running it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import checker

from refpeft.export.lowering import RULES
from refpeft.export.proto import to_model
from refpeft.export.symbols import Graph, Symbol

Array = np.ndarray[Any, Any]
Spec = tuple[Any, Sequence[int | str]]  # dtype and shape


def traced(f: Callable[..., Any], inputs: Mapping[str, Spec], rules: Any = RULES) -> Any:
    """The ONNX model of f, which takes symbols and returns one, or several by name."""
    graph = Graph(rules)
    made = f(*(graph.input(name, dtype, shape) for name, (dtype, shape) in inputs.items()))
    model = to_model(graph, list(inputs), {"y": made} if isinstance(made, Symbol) else made, {})
    checker.check_model(model, full_check=True)
    return model


def run(model: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(inputs)), strict=True))


def ops_of(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def gap(got: Array, expected: Array) -> float:
    """Relative distance."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(got.astype(np.float64) - expected)) / (size or 1.0)
