"""--form prompt and --form prefix: soft prompts named by ids, prefixes as the past of the first run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.export import adapters as files
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from refpeft.export.runtime import open_folder
from refpeft.export.verification import LIMIT
from tests.export.adapters import FAMILIES, made, moved
from tests.models import tiny

F32 = np.float32
WRITERS = ("gpt2", "llama", "qwen2")


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_by_its_ids(family: str, dtype: str, tmp_path: Path) -> None:
    model, adapter = made("prompt_tuning", family)
    for decode in (False, True)[: 1 + (family in WRITERS)]:
        result = export(model, adapter, tmp_path / str(decode), "prompt", dtype, decode=decode)
        assert max(c["ratio"] for c in result.cases) <= LIMIT
        assert len(result.cases) == 8
        assert result.optional_inputs == {"adapter.prompt_embeddings": ["virtual_tokens", 16]}


@pytest.mark.ort
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_a_prompt_before_the_text_is_the_adapter(method: str, tmp_path: Path) -> None:
    model, adapter = made(method, "llama")
    export(model, adapter, tmp_path / "out", "prompt", verify=False)
    runner = open_folder(tmp_path / "out")
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    wide = np.concatenate([np.repeat([[29, 30, 31]], 2, axis=0), ids], axis=1)
    feeds = {"input_ids": wide, "attention_mask": np.ones_like(wide)}
    got = runner.using(runner.load(tmp_path / "out" / "adapter.onnx_adapter")).run(feeds)["logits"]
    assert np.allclose(got, model.astype(np.float64)(ids, adapter)[0], atol=1e-4)


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("family", WRITERS)
def test_a_prefix_is_the_past(family: str, shift: bool, dtype: str, tmp_path: Path) -> None:
    model, adapter = made("prefix_tuning", family, position_shift=shift)
    result = export(model, adapter, tmp_path / "out", "prefix", dtype)
    assert result.decode
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    prefix = files.read(tmp_path / "out" / "adapter.onnx_adapter")
    assert prefix.keys() == {name for name in result.inputs if name.startswith("past_key_values")}
    assert {a.shape for a in prefix.values()} == {(1, model.config.num_kv_heads, 3, model.config.head_dim)}


@pytest.mark.ort
def test_a_prefix_beside_other_adapters(tmp_path: Path) -> None:
    """Two prefixes are one longer one; what else there is stays beside the weights."""
    model, adapter = made("prefix_tuning", "gpt2")
    lora = moved(refpeft.init("lora", {"r": 2, "modules_to_save": ["lm_head"]}, model))
    head = moved(refpeft.init("prefix_tuning", {"num_virtual_tokens": 2, "modules_to_save": ["lm_head"]}, model))
    for n, adapters in enumerate(([adapter, lora], [lora, head], [adapter, head])):
        result = export(model, adapters, tmp_path / str(n), "prefix")
        assert max(c["ratio"] for c in result.cases) <= LIMIT


@pytest.mark.ort
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_another_one_for_the_same_graph(method: str, tmp_path: Path) -> None:
    model = tiny("qwen2", dtype=F32)
    first, second = (moved(refpeft.init(method, {"num_virtual_tokens": n}, model, n), n) for n in (2, 5))
    form = method.removesuffix("_tuning")
    export(model, first, tmp_path / "first", form, decode=True)
    export(model, second, tmp_path / "second", form, decode=True)
    refpeft.save_adapter(second, tmp_path / "other")
    adapter_only(tmp_path / "first", [tmp_path / "other"], tmp_path / "out")
    expected = files.read(tmp_path / "second" / "adapter.onnx_adapter")
    got = files.read(tmp_path / "out")
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], a) for name, a in expected.items())


def refused(
    tmp_path: Path, message: str, form: str, *adapters: tuple[str, dict[str, Any]], family: str = "gpt2"
) -> None:
    model = tiny(family, dtype=F32)
    made = [refpeft.init(method, config, model) for method, config in adapters]
    with pytest.raises(ValueError, match=message):
        export(model, made, tmp_path / "out", form, verify=False)


def test_what_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "needs one adapter that is a soft prompt, found 0", "prompt", ("lora", {}))
    refused(tmp_path, "needs an adapter that is a prefix", "prefix", ("lora", {}))
    refused(tmp_path, "--form prompt", "prefix", ("prefix_tuning", {}), ("prompt_tuning", {}))
    mixed = [("prefix_tuning", {"position_shift": on}) for on in (True, False)]
    refused(tmp_path, "some of these prefixes", "prefix", *mixed)
    refused(tmp_path, "leave_out is .0., and the past has one length", "prefix", ("prefix_tuning", {"leave_out": [0]}))
    refused(tmp_path, "needs a causal language model", "prefix", ("prefix_tuning", {}), family="bert")
    refused(tmp_path, "'after_embedding'", "prompt", ("prompt_tuning", {"placement": "after_embedding"}))
