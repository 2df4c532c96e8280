"""`refpeft merge` from the command line: stages of training, each merged to be the base of the next."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import refpeft
from refpeft.checkpoint.safetensors import read
from refpeft.cli import app
from tests.models import tiny

IDS = np.random.default_rng(0).integers(2, 29, (2, 6))


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def merged(*words: str) -> dict[str, Any]:
    result = run("merge", "model", *words, "--json", "r.json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(Path("r.json").read_text())
    return found


def model(family: str = "llama", dtype: Any = np.float64, **config: Any) -> refpeft.Model:
    made = tiny(family, dtype=dtype, **config)
    refpeft.save(made, "model")
    return made


def adapter(base: refpeft.Model, method: str, config: dict[str, Any], folder: str, seed: int = 1) -> refpeft.Adapter:
    made = refpeft.init(method, config, base, seed)
    rng = np.random.default_rng(seed)
    made = made.replace(
        params={n: (v + 0.1 * rng.normal(size=v.shape)).astype(v.dtype) for n, v in made.params.items()}
    )
    refpeft.save_adapter(made, folder)
    return made


def failed(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert not Path("out").exists()


def test_one_adapter_and_several() -> None:
    """What is written is what `refpeft.merge` computes, and what the adapters do beside the base."""
    base = model()
    one = adapter(base, "lora", {"r": 2}, "one")
    two = adapter(base, "dora", {"r": 2, "target_modules": ["q_proj", "down_proj"]}, "two", seed=2)
    found = merged("--adapter", "one", "--adapter", "two", "--out", "out")
    out = refpeft.load("out")
    for name, a in refpeft.merge(base, [one, two]).params.items():
        assert out.params[name].tobytes() == a.tobytes()
    np.testing.assert_allclose(out(IDS)[0], base(IDS, [one, two])[0], rtol=1e-12, atol=1e-12)
    assert len(found["changed"]) == 6
    assert found["untied"] == []
    assert found["bytes"] == Path("out/model.safetensors").stat().st_size
    assert found["adapters"] == ["lora: one", "dora: two"]


def test_a_tied_head_that_is_trained_apart_is_said_to_be() -> None:
    base = model(tie_word_embeddings=True)
    both = adapter(base, "lora", {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}, "both")
    found = merged("--adapter", "both", "--out", "out")
    assert found["untied"] == ["lm_head.weight"]
    assert refpeft.load("out").source["tie_word_embeddings"] is False
    np.testing.assert_allclose(refpeft.load("out")(IDS)[0], base(IDS, both)[0], rtol=1e-12, atol=1e-12)
    assert "no longer tied" in run("merge", "model", "--adapter", "both", "--out", "again").stdout


def test_the_dtype_is_the_bases_or_another() -> None:
    base = model(dtype=np.float32)
    adapter(base, "lora", {"r": 2}, "a")
    assert merged("--adapter", "a", "--out", "out")["dtypes"] == ["float32"]
    assert merged("--adapter", "a", "--out", "half", "--dtype", "bfloat16")["dtypes"] == ["bfloat16"]
    assert {a.dtype.name for a in read(Path("half/model.safetensors")).values()} == {"bfloat16"}


def test_what_lies_beside_the_weights_goes_along() -> None:
    adapter(model(), "lora", {"r": 2}, "a")
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "generation_config.json", "README.md"):
        Path("model", name).write_text(f"this is {name}")
    merged("--adapter", "a", "--out", "out")
    assert set(os.listdir("out")) == set(os.listdir("model")) - {"README.md"}
    assert Path("out/tokenizer.json").read_text() == "this is tokenizer.json"


def test_stages_are_a_chain_of_commands() -> None:
    """Embeddings; then attention, embeddings and head; then the MLP: every stage is trained on the one before, and each
    brings the loss down."""
    model("llama", dtype=np.float32)
    rng = np.random.default_rng(0)
    lines = [{"input_ids": [int(s + k) % 29 for k in range(8)]} for s in rng.integers(0, 29, 12)]
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages: list[list[str]] = [
        ["-m", "partial", "-s", "layers=0", "-s", "head=false", "-s", "modules_to_save=embed_tokens"],
        ["-s", "target_modules=q_proj,k_proj,v_proj,o_proj", "-s", "modules_to_save=embed_tokens,lm_head"],
        ["-s", "target_modules=gate_proj,up_proj,down_proj"],
    ]
    base, first, last = "model", [], []
    for n, options in enumerate(stages):
        result = run("train", base, "-d", "data.jsonl", "-o", f"stage{n}", "--steps", "30", "--lr", "0.01",
                     "--schedule", "constant", "--json", "t.json", *options)  # fmt: skip
        assert result.exit_code == 0, result.output
        losses = json.loads(Path("t.json").read_text())["losses"]
        first.append(losses[0])
        last.append(np.mean(losses[-3:]))
        result = run("merge", base, "--adapter", f"stage{n}", "--out", f"base{n}")
        assert result.exit_code == 0, result.output
        base = f"base{n}"
    assert first[0] > first[1] > first[2]
    assert all(a > b for a, b in zip(first, last, strict=True))
    audit = run("audit", "base1", "--base", "base0", "--adapter", "stage1")
    assert audit.exit_code == 0, audit.output


def test_mistakes_are_one_sentence() -> None:
    base = model()
    adapter(base, "lora", {"r": 2}, "a")
    adapter(base, "prompt_tuning", {"num_virtual_tokens": 3}, "prompt")
    failed(run("merge", "model", "--adapter", "prompt", "--out", "out"), "prompt_tuning has no merge")
    failed(run("merge", "model", "--adapter", "none", "--out", "out"), "none: no such folder")
    failed(run("merge", "none", "--adapter", "a", "--out", "out"), "none: no such folder")
    failed(run("merge", "model", "--adapter", "a", "--out", "out", "--dtype", "int8"), "dtype must be one of float64")
    failed(run("merge", "model", "--adapter", "a", "--out", "out", "--json", "no/r.json"), "there is no folder no")
    failed(run("merge", "model", "--adapter", "a", "--out", "a"), "a: exists already, and nothing is overwritten")
    refpeft.save(tiny("gpt2"), "other")
    failed(run("merge", "other", "--adapter", "a", "--out", "out"), "target_modules")
    assert sorted(os.listdir()) == ["a", "model", "other", "prompt"]


def test_help_teaches() -> None:
    result = run("merge", "--help")
    assert result.exit_code == 0
    for said in ("refpeft merge llama --adapter my-lora", "modules_to_save=embed_tokens,lm_head", "refpeft audit"):
        assert said in result.stdout
