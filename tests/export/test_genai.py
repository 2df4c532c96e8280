"""genai_config.json: what onnxruntime-genai is told of a folder. That it runs them is in test_clients.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import refpeft
from refpeft.export.program import export
from tests.export.adapters import made
from tests.models import tiny


def told(tmp_path: Path, model: Any, settings: Any = None) -> Any:
    refpeft.save(model, tmp_path / "model")
    if settings is not None:
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    export(model, None, tmp_path / "out", decode=True, verify=False, source=tmp_path / "model")
    return json.loads((tmp_path / "out" / "genai_config.json").read_text())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_it_describes_the_graph_that_lies_beside_it(family: str, tmp_path: Path) -> None:
    found = told(tmp_path, tiny(family, dtype=np.float32))["model"]["decoder"]
    graph = onnx.load(tmp_path / "out" / found["filename"], load_external_data=False).graph
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        layers = range(found["num_hidden_layers"])
        named = {name % n if "%d" in name else name for name in found[side].values() for n in layers}
        assert named == {v.name for v in values}
    shape = next(v for v in graph.input if v.name == found["inputs"]["past_key_names"] % 0).type.tensor_type.shape
    assert [d.dim_value for d in shape.dim][1::2] == [found["num_key_value_heads"], found["head_size"]]


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ({}, None, {}),
        ({"eos_token_id": 5}, None, {"eos_token_id": 5, "pad_token_id": 5}),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, {"eos_token_id": [6, 7], "pad_token_id": 6}),
        ({"eos_token_id": 5, "pad_token_id": 0}, {}, {"eos_token_id": 5, "pad_token_id": 0}),
        ({"bos_token_id": 3, "pad_token_id": None}, {"bos_token_id": 4}, {"bos_token_id": 4}),
    ],
)
def test_special_tokens_are_those_of_the_checkpoint(config: Any, settings: Any, expected: Any, tmp_path: Path) -> None:
    found = told(tmp_path, tiny("llama", dtype=np.float32, **config), settings)["model"]
    assert {name: value for name, value in found.items() if name.endswith("token_id")} == expected


@pytest.mark.peft
@pytest.mark.parametrize(("family", "kind"), [("llama", "LlamaConfig"), ("qwen2", "Qwen2Config")])
def test_where_config_json_says_no_length_it_is_that_of_transformers(family: str, kind: str, tmp_path: Path) -> None:
    import transformers

    model = tiny(family, dtype=np.float32)
    source = {name: value for name, value in model.source.items() if name != "max_position_embeddings"}
    bare = refpeft.Model(model.config, model.sites, model.params, source)
    room = getattr(transformers, kind)().max_position_embeddings
    assert told(tmp_path, bare)["model"]["context_length"] == room


def test_where_genai_cannot_run_it_there_is_no_such_file(tmp_path: Path) -> None:
    for name, method, form, decode in (("plain", "lora", "merged", False), ("prefix", "prefix_tuning", "prefix", True)):
        export(*made(method, "gpt2"), tmp_path / name, form, decode=decode, verify=False)
        assert not (tmp_path / name / "genai_config.json").exists()
