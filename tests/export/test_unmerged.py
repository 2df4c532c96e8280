"""--form unmerged: every method on every family equals the specification on onnxruntime; the base is left alone."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import refpeft
from refpeft.export.program import export
from refpeft.export.verification import LIMIT
from tests.export.adapters import CASES, made, moved
from tests.models import tiny

F32 = np.float32


def stored(folder: Path) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(folder / "model.onnx")).graph.initializer}


@pytest.mark.ort
@pytest.mark.parametrize(("method", "family"), CASES)
def test_every_method_on_every_family(method: str, family: str, tmp_path: Path) -> None:
    model, adapter = made(method, family)
    for dtype in ("float32", "float16")[: 1 + (family in ("gpt2", "qwen2", "roberta"))]:
        result = export(model, adapter, tmp_path / dtype, "unmerged", dtype)
        assert max(c["ratio"] for c in result.cases) <= LIMIT
        assert len(result.cases) == 4
    weights = stored(tmp_path / "float32")
    base = {n: a for n, a in weights.items() if n in model.params}
    assert all(np.array_equal(a, model.params[n]) for n, a in base.items())
    if method not in ("full", "partial"):
        assert len(base) > len(model.params) / 2
    assert any(n.startswith("adapter.") for n in weights)


VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora on embeddings": ("lora", "gpt2", {"target_modules": ["wte", "c_attn"]}),
    "lora that started from pissa": ("lora", "llama", {"init_lora_weights": "pissa"}),
    "lora with a head and biases": ("lora", "bert", {"modules_to_save": ["pooler"], "bias": "all"}),
    "a tied embedding trained whole": ("lora", "gpt2", {"modules_to_save": ["wte"], "target_modules": ["c_attn"]}),
    "loha with cores": ("loha", "llama", {"taps": 2}),
    "dora on embeddings": ("dora", "gpt2", {"target_modules": ["wte"]}),
    "dora, norm differentiated": ("dora", "qwen2", {"detach_norm": False}),
    "a prompt after the embeddings": ("prompt_tuning", "roberta", {"placement": "after_embedding"}),
    "a prompt in a template": ("p_tuning", "bert", {"placement": "template"}),
    "a prompt made by an LSTM": ("p_tuning", "gpt2", {"encoder_reparameterization_type": "LSTM"}),
    "a prefix that moves nothing": ("prefix_tuning", "roberta", {"position_shift": False}),
    "a prefix of one layer": ("prefix_tuning", "llama", {"leave_out": [0], "prefix_projection": False}),
    "a subspace of norms and biases": ("did", "gpt2", {"target_modules": ["ln_1", "c_attn.bias", "wte"], "d": 40}),
    "a subspace beyond a tensor": ("said", "bert", {"target_modules": ["query"], "d": 600, "columns": "tensor"}),
    "tokens that a head shares": ("trainable_tokens", "roberta", {"target_modules": ["word_embeddings"]}),
}


@pytest.mark.ort
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    method, family, config = VARIANTS[variant]
    model, adapter = made(method, family, **config)
    result = export(model, adapter, tmp_path / "out", "unmerged")
    assert max(c["ratio"] for c in result.cases) <= LIMIT


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_several_adapters(dtype: str, tmp_path: Path) -> None:
    """In their order: DoRA after LoRA is not LoRA after DoRA."""
    model = tiny("llama", dtype=F32)
    lora, dora = (moved(refpeft.init(m, {"r": 2}, model, seed), seed) for seed, m in enumerate(("lora", "dora")))
    prefix = moved(refpeft.init("prefix_tuning", {"num_virtual_tokens": 2}, model))
    prompt = moved(refpeft.init("prompt_tuning", {"num_virtual_tokens": 2}, model))
    did = moved(refpeft.init("did", {"d": 5}, model))
    each = ([lora, dora], [dora, lora], [prefix, lora, prompt], [prefix, prefix], [did, lora], [dora, did])
    for n, adapters in enumerate(each):
        result = export(model, adapters, tmp_path / str(n), "unmerged", dtype)
        assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert any(n.startswith("adapter.1.") for n in stored(tmp_path / "0"))


@pytest.mark.ort
def test_networks_of_training_are_left_out(tmp_path: Path) -> None:
    for method in ("p_tuning", "prefix_tuning"):
        model, adapter = made(method, "gpt2")
        export(model, adapter, tmp_path / method, "unmerged")
        names = [n for n in stored(tmp_path / method) if n.startswith("adapter.")]
        assert names == ["adapter.prompt_embeddings"]


@pytest.mark.ort
@pytest.mark.parametrize("form", ["merged", "unmerged", "inputs", "multi"])
def test_weights_beside_the_graph(form: str, tmp_path: Path) -> None:
    model, adapter = made("lora", "gpt2")
    result = export(model, adapter, tmp_path / "out", form, "float16", external=True)
    assert result.external_data
    assert max(c["ratio"] for c in result.cases) <= LIMIT


def test_methods_without_a_merge_say_so(tmp_path: Path) -> None:
    model, adapter = made("prefix_tuning", "gpt2")
    with pytest.raises(ValueError, match=r"prefix_tuning has no merge.*--form unmerged"):
        export(model, adapter, tmp_path / "out", verify=False)


@pytest.mark.ort
@pytest.mark.parametrize("stored_as", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["unmerged", "inputs", "multi", "prefix", "prompt"])
def test_half_checkpoints(form: str, stored_as: Any, tmp_path: Path) -> None:
    """Adapters of a model of 16 bits are float32, and the base weights are what the checkpoint has."""
    model = tiny("llama", dtype=stored_as)
    method = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}.get(form, "dora")
    adapter = moved(refpeft.init(method, {} if form in ("prefix", "prompt") else {"r": 2}, model))
    for dtype in ("float32", "float16"):
        result = export(model, adapter, tmp_path / dtype, form, dtype, decode=True)
        assert max(c["ratio"] for c in result.cases) <= LIMIT
