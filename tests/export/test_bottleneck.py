"""Bottleneck adapters as graphs: loss and hand-derived gradients on onnxruntime, for any batch size and length."""

from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.export.verification import LIMIT, example, in_dtype, ratio
from tests.export.graphs import run
from tests.export.test_gradients import F32, distance, dithered, graph_of, loss_and_gradients
from tests.models import tiny

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "houlsby": ("bert", "ForSequenceClassification", "houlsby", {"modules_to_save": ["classifier"]}),
    "gated": ("gpt2", "LMHeadModel", "pfeiffer", {"use_gating": True, "scaling": "learned", "ln_before": True}),
    "parallel": ("llama", "ForCausalLM", "parallel", {"scaling": "channel", "ln_after": True}),
    "linear": ("roberta", "ForMaskedLM", "pfeiffer", {"non_linearity": "linear", "residual_before_ln": "post_add"}),
}


@pytest.mark.ort
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str) -> None:
    family, architecture, method, config = CASES[case]
    model = tiny(family, architecture, dtype=np.float32)
    adapter = refpeft.init(method, {"reduction_factor": 4, **config}, model)
    r = np.random.default_rng(1)
    adapter = adapter.replace(
        params={n: (p + 0.2 * r.normal(size=p.shape)).astype(np.float32) for n, p in adapter.params.items()}
    )
    graph = None
    for batch, length in ((1, 4), (3, 9)):
        inputs = dict(example(model, batch, length))
        ids, *rest = inputs.values()
        out, _ = model(ids, None, *rest)
        labels = np.random.default_rng(0).integers(0, out.shape[-1], out.shape[:-1])
        graph = graph or graph_of(model, adapter, labels, inputs)
        got = run(graph, {**inputs, "labels": labels, **{f"φ {n}": a for n, a in adapter.params.items()}})
        spec = loss_and_gradients(model, adapter, labels, *inputs.values())
        ref = loss_and_gradients(model.astype(np.float64), in_dtype(adapter, np.float64), labels, *inputs.values())
        assert got.keys() == ref.keys()
        off = {n: ratio(y, np.asarray(ref[n]), np.asarray(spec[n]), F32) for n, y in got.items()}
        moved = [dithered(model, adapter, labels, draw, *inputs.values()) for draw in range(8)]
        allowed = {n: max(distance(np.asarray(m[n]), np.asarray(ref[n])) for m in moved) for n in got}
        off = {n: min(off[n], distance(y, np.asarray(ref[n])) / allowed[n]) for n, y in got.items()}
        assert max(off.values()) <= LIMIT, off
