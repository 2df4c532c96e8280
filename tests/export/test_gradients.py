"""Forward and backward on onnxruntime: the specification's own lines, loss and hand-derived gradients, as one graph."""

from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.adapter import Adapter
from refpeft.conformance.numbers import signs
from refpeft.conformance.yardstick import UNIT
from refpeft.export.lowering import RULES
from refpeft.export.proto import tensor, to_model
from refpeft.export.symbols import Graph, Symbol
from refpeft.export.verification import LIMIT, distance, example, in_dtype, ratio
from refpeft.model import Model
from refpeft.ops import cross_entropy
from tests.export.graphs import run
from tests.models import tiny

Array = np.ndarray[Any, Any]
F32 = np.dtype(np.float32)

CASES = {
    "gpt2": ("gpt2", "LMHeadModel", "lora", {"target_modules": ["c_attn", "c_fc", "wte"]}),
    "llama": ("llama", "ForCausalLM", "lora", {"target_modules": "all-linear"}),
    "bert": ("bert", "ForSequenceClassification", "lora", {"target_modules": ["query", "dense", "word_embeddings"]}),
    "roberta": ("roberta", "ForMaskedLM", "lora", {"target_modules": "all-linear", "lora_bias": True}),
    "head": ("bert", "ForSequenceClassification", "lora", {"modules_to_save": ["classifier"], "bias": "lora_only"}),
    "rslora": ("qwen2", "ForCausalLM", "rslora", {}),
    "dora": ("gpt2", "LMHeadModel", "dora", {"target_modules": "all-linear"}),
    "dora, norm differentiated": ("llama", "ForCausalLM", "dora", {"detach_norm": False}),
}


def loss_and_gradients(model: Model, adapter: Adapter, labels: Any, *inputs: Any) -> dict[str, Any]:
    """L = cross_entropy(model(x)), and ∂L by the name of each of the adapter's parameters."""
    ids, *rest = inputs
    out, vjp = model(ids, adapter, *rest)
    loss, back = cross_entropy(out, labels)
    dx, _ = back(1.0)
    assert dx is not None
    return {"loss": loss, **{f"d {name}": d for name, d in vjp(dx()).items()}}


def graph_of(model: Model, adapter: Adapter, labels: Array, inputs: dict[str, Array]) -> Any:
    """The same as a graph: tokens, labels and the adapter are its inputs, the base weights are inside."""
    g = Graph(RULES)
    dims = ("batch", "sequence")
    tokens = [g.input(name, np.int64, dims) for name in inputs]
    params = {name: g.input(name, a.dtype, a.shape) for name, a in model.params.items()}
    φ = {name: g.input(f"φ {name}", a.dtype, a.shape) for name, a in adapter.params.items()}
    outputs = loss_and_gradients(
        Model(model.config, model.sites, params),
        adapter.replace(params=φ),
        g.input("labels", np.int64, dims[: labels.ndim]),
        *tokens,
    )
    assert all(isinstance(y, Symbol) for y in outputs.values())
    weights = {name: tensor(name, a) for name, a in model.params.items()}
    return to_model(g, [*inputs, "labels", *(f"φ {name}" for name in φ)], outputs, weights)


def dithered(model: Model, adapter: Adapter, labels: Any, draw: int, *inputs: Any) -> dict[str, Any]:
    """In float64, with every parameter moved by half a unit in its last place in float32."""

    def moved(values: Any) -> dict[str, Array]:
        return {n: a.astype(np.float64) * (1 + UNIT["float32"] * signs(draw, n, a.shape)) for n, a in values.items()}

    base = Model(model.config, model.sites, moved(model.params))
    return loss_and_gradients(base, adapter.replace(params=moved(adapter.params)), labels, *inputs)


@pytest.mark.ort
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str) -> None:
    family, architecture, method, config = CASES[case]
    model = tiny(family, architecture, dtype=np.float32)
    adapter = in_dtype(refpeft.init(method, {"r": 2, "init_lora_weights": False, **config}, model, seed=1), np.float32)
    graph = None
    for batch, length in ((1, 4), (3, 9)):
        inputs = dict(example(model, batch, length))
        ids, *rest = inputs.values()
        out, _ = model(ids, None, *rest)
        labels = np.random.default_rng(0).integers(0, out.shape[-1], out.shape[:-1])
        labels[..., ::3] = -100 if labels.ndim == 2 else labels[..., ::3]
        graph = graph or graph_of(model, adapter, labels, inputs)
        feeds = {**inputs, "labels": labels, **{f"φ {name}": a for name, a in adapter.params.items()}}
        got = run(graph, feeds)
        spec = loss_and_gradients(model, adapter, labels, *inputs.values())
        ref = loss_and_gradients(model.astype(np.float64), in_dtype(adapter, np.float64), labels, *inputs.values())
        assert got.keys() == ref.keys()
        off = {name: ratio(y, np.asarray(ref[name]), np.asarray(spec[name]), F32) for name, y in got.items()}
        if max(off.values()) > LIMIT / 4:  # as the suite's yardstick has it: what moves of the inputs by ½ ulp explain
            moved = [dithered(model, adapter, labels, draw, *inputs.values()) for draw in range(8)]
            allowed = {n: max(distance(np.asarray(m[n]), np.asarray(ref[n])) for m in moved) for n in got}
            off = {n: min(off[n], distance(y, np.asarray(ref[n])) / allowed[n]) for n, y in got.items()}
        assert max(off.values()) <= LIMIT, off
        assert all(np.linalg.norm(d) > 0 for d in ref.values())
