"""Bottleneck adapters as graphs: loss and hand-derived gradients on onnxruntime, for any batch size and length; and as
inputs of one graph, which is the base model without them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from refpeft.export.runtime import open_folder
from refpeft.export.verification import LIMIT, example, in_dtype, ratio
from tests.export.adapters import moved
from tests.export.graphs import gap, run
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


# ── as inputs ────────────────────────────────────────────────────────────────────────────────────────────────────────

INPUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "houlsby": ("bert", "houlsby", {"train_norms": True}), "pfeiffer": ("gpt2", "pfeiffer", {"scaling": "channel"}),
    "parallel": ("llama", "parallel", {"scaling": "learned", "ln_after": True}),
    "gated": ("roberta", "pfeiffer", {"use_gating": True, "ln_before": True, "scaling": 4.0}),
}  # fmt: skip


def neck(model: Any, method: str, seed: int, **config: Any) -> refpeft.Adapter:
    return moved(refpeft.init(method, config, model, seed), seed)


@pytest.mark.ort
@pytest.mark.parametrize("case", INPUTS)
def test_one_graph_for_many_adapters(case: str, tmp_path: Path) -> None:
    """Of other widths and scales, in other layers; without one it is the base model."""
    family, method, config = INPUTS[case]
    model = tiny(family, dtype=F32)
    one = neck(model, method, 1, reduction_factor=4, **config)
    assert max(c["ratio"] for c in export(model, one, tmp_path / "out", "inputs").cases) <= LIMIT
    other = neck(model, method, 2, **{**config, "reduction_factor": 2, "scaling": 0.5, "leave_out": [0]})
    refpeft.save_adapter(other, tmp_path / "other")
    adapter_only(tmp_path / "out", [tmp_path / "other"], tmp_path / "file")
    runner = open_folder(tmp_path / "out")
    feeds = {name: a for name, a in example(model, 2, 7).items() if name in runner.inputs}
    ids, *rest = feeds.values()
    files = {"adapter.onnx_adapter": one, "file": other}
    found = {f: runner.using(runner.load(tmp_path / ("out" if f[0] == "a" else "") / f)).run(feeds) for f in files}
    for file, adapter in files.items():
        expected, _ = model.astype(np.float64)(ids, in_dtype(adapter, np.float64), *rest)
        (got,) = found[file].values()
        assert gap(got, expected) < 1e-5
    export(model, None, tmp_path / "base", verify=False)
    bare, base = (next(iter(r.run(feeds).values())) for r in (runner, open_folder(tmp_path / "base")))
    assert gap(bare, base) < 1e-6
    assert gap(next(iter(found["file"].values())), base) > 1e-2


def test_what_is_no_input_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    for config in ({"original_ln_after": False}, {"residual_before_ln": False}, {"residual_before_ln": "post_add"},
                   {"ln_after": True, "adapter_residual_before_ln": True}):  # fmt: skip
        with pytest.raises(ValueError, match="pfeiffer cannot be exported in the form inputs: with nothing fed"):
            export(model, neck(model, "pfeiffer", 1, **config), tmp_path / "out", "inputs", verify=False)
    export(model, neck(model, "pfeiffer", 1), tmp_path / "out", "inputs", verify=False)
    refpeft.save_adapter(neck(model, "pfeiffer", 1, non_linearity="tanh"), tmp_path / "tanh")
    with pytest.raises(ValueError, match="non_linearity is tanh in the pfeiffer adapter, and relu in the graph"):
        adapter_only(tmp_path / "out", [tmp_path / "tanh"], tmp_path / "file")
