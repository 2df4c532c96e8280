"""--form multi: each row of a batch gets what its adapter gives it alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import refpeft
from refpeft.export.generation import Options, open_writer, write
from refpeft.export.program import export
from refpeft.export.runtime import open_folder
from refpeft.export.verification import LIMIT, example
from tests.export.adapters import moved
from tests.models import tiny

F32 = np.float32
LORAS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 2, "lora_alpha": 6}),
    ("adalora", {"init_r": 4, "target_r": 1, "total_step": 9}),
    ("rslora", {"r": 5, "rank_pattern": {"1.attn.c_attn": 1}}),
    ("lora", {"r": 3, "target_modules": "all-linear", "init_lora_weights": "pissa"}),
]
OTHERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "dora and lora": [("dora", {"r": 2}), ("lora", {"r": 2})],
    "prefixes": [("prefix_tuning", {"num_virtual_tokens": n}) for n in (2, 4)],
    "tasks with heads": [("p_tuning_v2", {"num_virtual_tokens": n}) for n in (2, 4)],
    "vectors and lora": [("ia3", {}), ("lora", {"r": 2})],
    "projections": [("vera", {"r": 2}), ("vera", {"r": 3, "projection_prng_key": 1})],
    "subspaces": [("did", {"d": 5}), ("said", {"d": 80})],
    "butterflies": [("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": n}) for n in (1, 2)],
    "biases and norms": [("bitfit", {}), ("ln_tuning", {})],
    "embeddings": [("lora", {"r": 2, "target_modules": ["wte", "embed_tokens", "word_embeddings"]})],
    "with a bias": [("lora", {"r": 2, "lora_bias": True, "target_modules": ["c_attn", "q_proj", "query"]})],
    "tokens": [("trainable_tokens", {"token_indices": [3, 1]}), ("trainable_tokens", {"token_indices": [2]})],
}


def adapters_of(model: Any, methods: list[tuple[str, dict[str, Any]]]) -> list[refpeft.Adapter]:
    return [moved(refpeft.init(method, config, model, seed), seed) for seed, (method, config) in enumerate(methods)]


def alone(model: Any, adapters: list[refpeft.Adapter], inputs: Any, which: Any) -> Any:
    """Each row by itself, in float64."""
    ids, *rest = inputs.values()
    wide = model.astype(np.float64)
    rows = [
        wide(ids[k : k + 1], [] if w < 0 else adapters[w], *(a[k : k + 1] for a in rest))[0]
        for k, w in enumerate(which)
    ]
    return np.concatenate(rows)


def answer(folder: Path, inputs: Any, which: Any) -> Any:
    runner = open_folder(folder).feeding({"adapter_ids": np.asarray(which)})
    return runner.run({n: inputs[n] for n in runner.inputs})[runner.outputs[0]]


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_stacked_lora(family: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(family, "ForSequenceClassification" if family == "bert" else None, dtype=F32)
    adapters = adapters_of(model, LORAS)
    result = export(model, adapters, tmp_path / "out", "multi", dtype)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert result.inputs["adapter_ids"] == ["batch"]
    inputs, which = example(model, 6, 5), [2, -1, 0, 1, 1, 2]
    got = answer(tmp_path / "out", inputs, which)
    assert np.allclose(got, alone(model, adapters, inputs, which), atol=1e-4 if dtype == "float32" else 2e-2)
    assert not np.allclose(got, alone(model, adapters, inputs, [-1] * 6), atol=0.05)


def test_the_cost_does_not_grow_with_the_adapters(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    adapters = adapters_of(model, LORAS[:1] * 5)
    counts = []
    for n in (1, 5):
        export(model, adapters[:n], tmp_path / str(n), "multi", verify=False)
        counts.append(len(onnx.load(str(tmp_path / str(n) / "model.onnx")).graph.node))
    assert counts[0] == counts[1]


@pytest.mark.ort
@pytest.mark.parametrize("family", ["gpt2", "roberta"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_methods(case: str, family: str, tmp_path: Path) -> None:
    model = tiny(family, "ForSequenceClassification", dtype=F32)
    adapters = adapters_of(model, OTHERS[case])
    result = export(model, adapters, tmp_path / "out", "multi")
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    inputs, which = example(model, 4, 5), [len(adapters) - 1, -1, 0, 0]
    assert np.allclose(answer(tmp_path / "out", inputs, which), alone(model, adapters, inputs, which), atol=1e-4)


@pytest.mark.ort
@pytest.mark.parametrize("methods", [LORAS, OTHERS["dora and lora"]])
def test_writing(methods: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    """Each row writes what its own adapter writes."""
    model = tiny("gpt2", dtype=F32)
    adapters = adapters_of(model, methods)
    result = export(model, adapters, tmp_path / "out", "multi", decode=True)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    prompts, which = [[3, 1, 4], [1, 5, 9, 2], [3, 1, 4]], [0, -1, 1]
    steps = list(write(open_writer(tmp_path / "out", adapter_ids=which), prompts, Options(max_new_tokens=6)))
    for prompt, k, row in zip(prompts, which, zip(*steps, strict=True), strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(np.array([ids]), [] if k < 0 else adapters[k])[0][0, -1].argmax()))
        assert list(row) == ids[len(prompt) :]
    for wrong, message in (([0], "for each of 3 prompts, found 1"), ([0, 1, len(adapters)], "from -1 to")):
        with pytest.raises(ValueError, match=message):
            next(write(open_writer(tmp_path / "out", adapter_ids=wrong), prompts, Options()))


@pytest.mark.ort
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_that_is_not_there_is_an_error(method: str, tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    export(model, adapters_of(model, [(method, {"r": 2})] * 2), tmp_path / "out", "multi", verify=False)
    with pytest.raises(Exception, match="out of data bounds"):
        answer(tmp_path / "out", example(model, 2, 5), [0, 2])


def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    with pytest.raises(ValueError, match="the form multi needs adapters"):
        export(model, None, tmp_path / "out", "multi", verify=False)
    with pytest.raises(ValueError, match="prompt_tuning makes a row longer"):
        export(model, adapters_of(model, [("prompt_tuning", {})]), tmp_path / "out", "multi", verify=False)
