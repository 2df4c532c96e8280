"""Merges made by HF peft, and ONNX models made of them by torch, audited."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.audit.test_audit import audit, wrong
from tests.models import config_json

pytestmark = pytest.mark.peft

LINEAR = {"target_modules": "all-linear"}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "ForCausalLM", LINEAR),
    "rslora": ("llama", "ForCausalLM", {**LINEAR, "use_rslora": True}),
    "dora": ("llama", "ForCausalLM", {**LINEAR, "use_dora": True}),
    "patterns": ("llama", "ForCausalLM", {**LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}}),
    "conv1d": ("gpt2", "LMHeadModel", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases": ("bert", "ForSequenceClassification", {"bias": "all", "task_type": "SEQ_CLS"}),
    "t5": ("t5", "ForConditionalGeneration", LINEAR),
    "bart": ("bart", "ForConditionalGeneration", LINEAR),
    "lora_bias": ("bert", "ForMaskedLM", {"target_modules": ["query"], "lora_bias": True}),
}


def fresh(family: str, architecture: str, dtype: str) -> Any:
    import torch
    import transformers

    c = config_json(family, architecture)
    torch.manual_seed(0)
    model = getattr(transformers, c["architectures"][0])(transformers.AutoConfig.for_model(**c))
    return model.to(getattr(torch, dtype))


def tuned(model: Any, folder: Path, **fields: Any) -> Any:
    """With an adapter whose every parameter has moved."""
    import peft
    import torch

    fields = {"r": 3, "lora_alpha": 4.5, "init_lora_weights": False, **fields}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
    torch.manual_seed(1)
    for name, p in wrapped.named_parameters():
        if p.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
            p.data += 0.1 * torch.rand_like(p)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_merges_holds(name: str, dtype: str, tmp_path: Path) -> None:
    family, architecture, fields = CONFIGS[name]
    model = fresh(family, architecture, dtype)
    model.save_pretrained(tmp_path / "base")
    tuned(model, tmp_path / "lora", **fields).merge_and_unload().save_pretrained(tmp_path / "merged")
    folders = {"base": tmp_path / "base", "lora": tmp_path / "lora"}
    result = audit(tmp_path / "merged", folders)
    assert result.exit_code == 0, result.output
    assert audit(tmp_path / "base", folders).exit_code == 1
    assert {f["verdict"] for f in wrong(tmp_path / "base")} <= {"base", "missing"}


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_weighted_adapters_hold(how: str, tmp_path: Path) -> None:
    model = fresh("llama", "ForCausalLM", "float32")
    model.save_pretrained(tmp_path / "base")
    wrapped = tuned(model, tmp_path / "one", **LINEAR)
    wrapped.load_adapter(tmp_path / "one", "two")
    wrapped.add_weighted_adapter(["default", "two"], [0.7, 0.5], "sum", combination_type=how)
    wrapped.save_pretrained(tmp_path, selected_adapters=["sum"])
    wrapped.set_adapter("sum")
    wrapped.merge_and_unload(adapter_names=["sum"]).save_pretrained(tmp_path / "merged")
    result = audit(tmp_path / "merged", {"base": tmp_path / "base", "sum": tmp_path / "sum"})
    assert result.exit_code == 0, result.output


def test_several_adapters_merged_hold_and_one_of_them_does_not(tmp_path: Path) -> None:
    model = fresh("llama", "ForCausalLM", "float32")
    model.save_pretrained(tmp_path / "base")
    wrapped = tuned(model, tmp_path / "one", **LINEAR)
    wrapped.delete_adapter("default")
    folders = {"base": tmp_path / "base", "one": tmp_path / "one", "two": tmp_path / "two"}
    tuned(fresh("llama", "ForCausalLM", "float32"), tmp_path / "two", target_modules=["q_proj"], r=2)
    wrapped.load_adapter(tmp_path / "one", "one")
    wrapped.load_adapter(tmp_path / "two", "two")
    wrapped.base_model.merge_and_unload(adapter_names=["one", "two"]).save_pretrained(tmp_path / "merged")
    assert audit(tmp_path / "merged", folders).exit_code == 0
    half = audit(tmp_path / "merged", {k: f for k, f in folders.items() if k != "two"})
    assert half.exit_code == 1
    assert [f["verdict"] for f in wrong(tmp_path / "merged")] == ["differs"] * 2
    assert all("a matrix of rank 2, as other adapters make" in f["detail"] for f in wrong(tmp_path / "merged"))
    assert all(".q_proj." in f["name"] for f in wrong(tmp_path / "merged"))


def test_what_torch_exports_holds(tmp_path: Path) -> None:
    """Its matrices are transposed and called 'val_108'."""
    import torch

    model = fresh("llama", "ForCausalLM", "float32")
    model.save_pretrained(tmp_path / "base")
    merged = tuned(model, tmp_path / "lora", **LINEAR).merge_and_unload().eval()
    merged.config.use_cache = False
    with contextlib.redirect_stdout(io.StringIO()):
        ids = torch.tensor([[3, 1, 4, 1]])
        torch.onnx.export(merged, (ids,), tmp_path / "model.onnx", dynamo=True, input_names=["input_ids"])
    result = audit(tmp_path / "model.onnx", {"base": tmp_path / "base", "lora": tmp_path / "lora"})
    assert result.exit_code == 0, result.output
    assert "(transposed)" in result.stdout
