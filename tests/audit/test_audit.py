"""`refpeft audit`: merges that are right are found right, and every mistake is found and named."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

import refpeft
from refpeft.cli import app
from tests.audit.wrong import MISTAKES, merge
from tests.models import tiny

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "o_proj"],
    "gpt2": ["attn.c_proj", "c_fc"],
    "bert": ["query", "intermediate.dense"],
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Folders = dict[str, Path]


def made(where: Path, family: str = "llama", dtype: Any = np.float32, methods: tuple[str, ...] = ("lora",)) -> Folders:
    """A base model, and adapters of it whose s is neither 1 nor √r."""
    model = tiny(family, "ForMaskedLM" if family == "bert" else None, dtype=dtype, tie_word_embeddings=family == "gpt2")
    refpeft.save(model, where / "base")
    folders = {"base": where / "base"}
    for n, method in enumerate(methods):
        fields = {"r": 3, "lora_alpha": 4.5, "target_modules": TARGETS[family], "init_lora_weights": False}
        refpeft.save_adapter(refpeft.init(method, fields, model, seed=n), where / f"{method}{n}")
        folders[f"{method}{n}"] = where / f"{method}{n}"
    return folders


def audit(merged: Path, folders: Folders, *words: str) -> Result:
    """Runs as a user would; what was found is in merged.json beside the folder."""
    chosen = [w for name, f in folders.items() if name != "base" for w in ("--adapter", str(f))]
    told = ["--json", str(merged.parent / "found.json")]
    result = CliRunner().invoke(app, ["audit", str(merged), "--base", str(folders["base"]), *chosen, *told, *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def findings(merged: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((merged.parent / "found.json").read_text())["tensors"]
    return found


def wrong(merged: Path) -> list[dict[str, Any]]:
    return [f for f in findings(merged) if f["verdict"] not in ("equal", "rounding")]


def adapters(folders: Folders) -> list[Path]:
    return [f for name, f in folders.items() if name != "base"]


# ── right ones ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_by_another_program_holds(family: str, dtype: str, tmp_path: Path) -> None:
    folders = made(tmp_path, family, DTYPES[dtype], ("lora", "rslora"))
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    result = audit(merged, folders)
    assert result.exit_code == 0, result.output
    assert "It holds what the base and the adapters say." in result.stdout
    assert {f["verdict"] for f in findings(merged)} <= {"equal", "rounding"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_merge_stored_in_a_narrower_dtype_holds(dtype: str, tmp_path: Path) -> None:
    folders = made(tmp_path)
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged", dtype=DTYPES[dtype])
    assert audit(merged, folders).exit_code == 0
    assert {f["dtype"] for f in findings(merged)} == {dtype}


@pytest.mark.parametrize("method", refpeft.METHODS)
@pytest.mark.parametrize("family", TARGETS)
def test_our_own_merges_are_equal_in_float64(method: str, family: str, tmp_path: Path) -> None:
    folders = made(tmp_path, family, np.float64, (method,))
    model = refpeft.load(folders["base"])
    merged = refpeft.merge(model, refpeft.load_adapter(folders[method + "0"], model))
    refpeft.save(merged, tmp_path / "merged")
    assert audit(tmp_path / "merged", folders).exit_code == 0
    assert {f["verdict"] for f in findings(tmp_path / "merged")} == {"equal"}


def test_shards_are_read(tmp_path: Path) -> None:
    folders = made(tmp_path)
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, merged / file)
    where = {n: file for file, own in parts.items() for n in own}
    (merged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (merged / "model.safetensors").unlink()
    assert audit(merged, folders).exit_code == 0


def test_other_prefixes_are_understood(tmp_path: Path) -> None:
    folders = made(tmp_path)
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    save_file({f"base_model.model.{n}": v for n, v in tensors.items()}, merged / "model.safetensors")
    result = audit(merged, folders)
    assert result.exit_code == 0
    assert "under another name" in result.stdout


# ── wrong ones ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mistake_is_found_and_named(family: str, mistake: str, tmp_path: Path) -> None:
    folders = made(tmp_path, family)
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged", mistake)
    result = audit(merged, folders)
    assert result.exit_code == 1
    assert "It does not hold what the base and the adapter say" in result.stdout
    kind, words = MISTAKES[mistake]
    named = [f for f in wrong(merged) if f["verdict"] == kind and words in f["detail"]]
    assert named, result.output
    assert all(f["name"] in result.stdout for f in named)


SCALES = [m for m, (kind, _) in MISTAKES.items() if kind in ("scaled", "base")]


@pytest.mark.parametrize("mistake", SCALES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits_as_well(dtype: str, mistake: str, tmp_path: Path) -> None:
    folders = made(tmp_path, dtype=DTYPES[dtype])
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged", mistake)
    assert audit(merged, folders).exit_code == 1
    kind, words = MISTAKES[mistake]
    assert wrong(merged)
    assert all(f["verdict"] == kind and words in f["detail"] for f in wrong(merged))


def test_one_layer_forgotten_is_one_line(tmp_path: Path) -> None:
    folders = made(tmp_path)
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged", "layer forgotten")
    result = audit(merged, folders)
    (one,) = wrong(merged)
    assert one["name"] == "model.layers.0.mlp.down_proj.weight"
    assert result.stdout.count("✗") == 1
    assert "was not applied to model.layers.0.mlp.down_proj.weight" in result.stdout


def test_one_of_two_adapters_left_out_is_named(tmp_path: Path) -> None:
    folders = made(tmp_path, methods=("lora", "rslora"))
    merged = merge(folders["base"], [folders["lora0"]], tmp_path / "merged")
    assert audit(merged, folders).exit_code == 1
    assert all(f["verdict"] == "scaled" and f["detail"] == "rslora1: k = 0: left out" for f in wrong(merged))
    assert [f["k"] for f in wrong(merged)] == [[1, 0]] * 8


def test_each_adapter_has_a_constant_of_its_own(tmp_path: Path) -> None:
    folders = made(tmp_path, methods=("lora", "rslora"))
    twice = [folders["lora0"], folders["rslora1"], folders["rslora1"]]
    merged = merge(folders["base"], twice, tmp_path / "merged")
    audit(merged, folders)
    assert {f["detail"] for f in wrong(merged)} == {"rslora1: k = 2: applied twice"}
