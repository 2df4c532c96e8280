"""Exports of T5 and BART: encoder and decoder in one graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import refpeft
from refpeft.export.program import export
from refpeft.export.verification import LIMIT, example
from refpeft.model import Model
from tests.models import ENCODER_DECODERS, tiny

pytestmark = pytest.mark.ort
F32 = np.float32


def made(name: str, dtype: Any = F32) -> Model:
    family, architecture, config = ENCODER_DECODERS[name]
    return tiny(family, architecture, dtype=dtype, **config)


def lora(model: Model) -> refpeft.Adapter:
    return refpeft.init("lora", {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}, model)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_every_encoder_decoder(name: str, dtype: str, tmp_path: Path) -> None:
    model = made(name)
    result = export(model, lora(model), tmp_path / "out", dtype=dtype)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert result.inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "decoder_input_ids": ["batch", "decoder_sequence"],
    }
    assert list(result.outputs) == ["last_hidden_state" if "Model" in name else "logits"]


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_the_graph_takes_any_lengths(name: str, tmp_path: Path) -> None:
    """Longer than the farthest distance of T5, and one token; against the specification with base and adapter apart."""
    model = made(name, np.float64)
    adapter = lora(model)
    export(model.astype(F32), adapter, tmp_path / "out", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    rng = np.random.default_rng(0)
    for b, t, s in ((1, 1, 1), (2, 20, 3), (3, 4, 18)):
        mask = np.ones((b, t), np.int64)
        mask[0, t // 2 + 1 :] = 0
        feed = {"input_ids": rng.integers(0, 29, (b, t)), "attention_mask": mask}
        feed["decoder_input_ids"] = rng.integers(0, 29, (b, s))
        ids, rest = feed["input_ids"], {n: a for n, a in feed.items() if n != "input_ids"}
        expected, _ = model(ids, adapter, **rest)
        (found,) = session.run(None, feed)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_table_that_is_used_four_times_is_stored_once(tmp_path: Path) -> None:
    model = made("T5")
    export(model, None, tmp_path / "out")
    stored = onnx.load(str(tmp_path / "out/model.onnx")).graph.initializer
    assert sum(list(t.dims) == [29, 16] for t in stored) == 1
    assert {t.name for t in stored} >= model.params.keys()


def test_examples_fit_the_model() -> None:
    """A classifier's have one end of text in each row, and its decoder reads as much as its encoder."""
    inputs = example(made("BART classifier"), 3, 12)
    assert ((inputs["input_ids"] == 2).sum(1) == 1).all()
    assert inputs["decoder_input_ids"].shape == inputs["input_ids"].shape
    assert example(made("T5"), 3, 50)["input_ids"].shape == (3, 50)
    assert example(made("BART"), 3, 50)["input_ids"].shape == (3, 24)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_what_cannot_be_merged_is_not_exported(method: str, tmp_path: Path) -> None:
    """Verified or not: a prompt is no weight."""
    for model in (made("T5"), tiny("gpt2", dtype=F32)):
        adapter = refpeft.init(method, {}, model)
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"{method} has no merge"):
                export(model, adapter, tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists()
