"""--decode: keys and values as inputs and outputs; one graph reads a prompt and writes on."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from refpeft.export.program import export
from refpeft.export.verification import LIMIT
from tests.export.adapters import made
from tests.models import tiny

F32 = np.float32
WRITERS = ("gpt2", "llama", "qwen2")
FORMS = ("merged", "unmerged", "inputs")


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", WRITERS)
def test_every_family_and_form(family: str, form: str, dtype: str, tmp_path: Path) -> None:
    """In two steps, with empty keys and values at first, rows padded on either side."""
    model, adapter = made("dora", family)
    result = export(model, adapter, tmp_path / "out", form, dtype, decode=True)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert {c["what"] for c in result.cases} <= {"decoding", "no adapter, decoding"}
    g, e = model.config.num_kv_heads, model.config.head_dim
    past = ["batch_size", g, "past_sequence", e]
    layers = [f"past_key_values.{n}.{what}" for n in range(2) for what in ("key", "value")]
    assert list(result.inputs) == ["input_ids", "attention_mask", "position_ids", *layers]
    assert result.inputs["past_key_values.1.value"] == past
    assert result.inputs["attention_mask"] == ["batch", "past_sequence + sequence"]
    assert list(result.outputs) == ["logits", *(name.replace("past_key_values", "present") for name in layers)]
    assert result.outputs["present.0.key"] == ["batch", g, "past_sequence + sequence", e]


def test_the_cache_is_not_transposed(tmp_path: Path) -> None:
    """Past keys and values go into a concatenation and nowhere else; what comes out of it is used as it is."""
    model = tiny("llama", dtype=F32)
    export(model, None, tmp_path / "out", verify=False, decode=True)
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    readers = [(n.op_type, name) for n in graph.node for name in n.input if name.startswith(("past", "present"))]
    assert Counter(op for op, name in readers if name.startswith("past")) == {"Concat": 4, "Shape": 1}
    assert Counter(op for op, name in readers if name.startswith("present")) == {"Attention": 4}


@pytest.mark.ort
@pytest.mark.parametrize("form", ["merged", "unmerged"])
@pytest.mark.parametrize("family", WRITERS)
def test_logits_of_the_last_position(family: str, form: str, tmp_path: Path) -> None:
    """The same numbers, and neither the head nor the last MLP is computed for the others."""
    model, adapter = made("lora", family)
    result = export(model, adapter, tmp_path / "last", form, decode=True, last_logits=True)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert result.outputs["logits"] == ["batch", 1, 29]
    late, early = weights_behind_a_slice(onnx.load(str(tmp_path / "last" / "model.onnx")).graph)
    for part in (".1.mlp.", "wte" if family == "gpt2" else "lm_head"):
        assert any(part in name for name in late)
        assert not any(part in name for name in early)
    assert any(".0.mlp." in name for name in early)
    assert not any(".0.mlp." in name for name in late)


def weights_behind_a_slice(graph: Any) -> tuple[set[str], set[str]]:
    """The weights that multiply something that was cut, and the others."""
    turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
    cut: set[str] = set()
    found: tuple[set[str], set[str]] = (set(), set())
    for n in graph.node:
        if (n.op_type == "Slice" and len(n.input) == 4) or cut & set(n.input):
            cut |= set(n.output)
        if n.op_type == "MatMul":
            found[n.input[0] not in cut].add(turned.get(n.input[1], n.input[1]))
    return found


def test_what_does_not_write_is_refused(tmp_path: Path) -> None:
    for family, architecture in (
        ("bert", "BertForMaskedLM"),
        ("gpt2", "GPT2Model"),
        ("llama", "LlamaForSequenceClassification"),
    ):
        with pytest.raises(ValueError, match=f"decoding needs a causal language model, and {architecture} is none"):
            export(tiny(family, architecture, dtype=F32), None, tmp_path / "out", verify=False, decode=True)


@pytest.mark.parametrize("form", ["unmerged", "inputs"])
def test_prompts_and_prefixes_have_forms_of_their_own(form: str, tmp_path: Path) -> None:
    for method, own in (("prompt_tuning", "prompt"), ("p_tuning", "prompt"), ("prefix_tuning", "prefix")):
        model, adapter = made(method, "gpt2")
        with pytest.raises(ValueError, match=f"{method} .* --form {own}$"):
            export(model, adapter, tmp_path / "out", form, verify=False, decode=True)
