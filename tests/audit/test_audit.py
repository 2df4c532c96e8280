"""`refpeft audit`: merges that are right are found right, and every mistake is found and named."""

import json
import shutil
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
        adapter = refpeft.init(method, fields, model, seed=n)
        moved = {k: v * v.dtype.type(1.25) if "magnitude" in k else v for k, v in adapter.params.items()}
        refpeft.save_adapter(adapter.replace(params=moved), where / f"{method}{n}")
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


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
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


def test_the_mistakes_of_all_tensors_together_tell_more_than_those_of_one(tmp_path: Path) -> None:
    """Where s = 2 in one layer, 'twice' and 's²' look the same; where it is 1.5 they do not."""
    folders = made(tmp_path, methods=())
    model = refpeft.load(folders["base"])
    fields = {"r": 3, "lora_alpha": 4.5, "alpha_pattern": {"v_proj": 6}, "init_lora_weights": False}
    refpeft.save_adapter(refpeft.init("lora", fields | {"target_modules": TARGETS["llama"]}, model), tmp_path / "lora")
    folders["lora"] = tmp_path / "lora"
    merged = tmp_path / "merged"
    adapter = refpeft.load_adapter(tmp_path / "lora", model)
    squared = adapter.replace(
        params={
            n: v * adapter.at(n.partition(".lora_")[0]).scale if "lora_B" in n else v for n, v in adapter.params.items()
        }
    )
    refpeft.save(refpeft.merge(model, squared), merged)
    result = audit(merged, folders)
    assert {f["verdict"] for f in wrong(merged)} == {"scaled"}
    assert {len(f["means"][0]) for f in wrong(merged)} == {1, 2}
    assert "applied twice (s²)" in result.stdout


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"lora_alpha": 4.5 * 3**0.5}, "α/√r in place of α/r"),
        ({"lora_alpha": 0.0}, "B A left out, the magnitude m applied"),
        ({"use_dora": False}, "the magnitude m left out: merged as plain LoRA"),
    ],
)
def test_mistakes_with_dora_are_named(mistake: dict[str, Any], words: str, tmp_path: Path) -> None:
    folders = made(tmp_path, methods=("dora",))
    model = refpeft.load(folders["base"])
    wrongly = tmp_path / "wrongly"
    shutil.copytree(folders["dora0"], wrongly)
    config = json.loads((wrongly / "adapter_config.json").read_text())
    (wrongly / "adapter_config.json").write_text(json.dumps(config | mistake))
    if "use_dora" in mistake:
        tensors = load_file(wrongly / "adapter_model.safetensors")
        save_file({n: v for n, v in tensors.items() if "magnitude" not in n}, wrongly / "adapter_model.safetensors")
    merged = refpeft.merge(model, refpeft.load_adapter(wrongly, model))
    refpeft.save(merged, tmp_path / "merged")
    assert audit(tmp_path / "merged", folders).exit_code == 1
    assert {(f["verdict"], f["detail"]) for f in wrong(tmp_path / "merged")} == {("mistaken", words)}


def test_adapters_that_do_not_commute_are_found_in_the_wrong_order(tmp_path: Path) -> None:
    folders = made(tmp_path, methods=("dora", "lora"))
    model = refpeft.load(folders["base"])
    both = [refpeft.load_adapter(f, model) for f in adapters(folders)]
    refpeft.save(refpeft.merge(model, both[::-1]), tmp_path / "merged")
    assert audit(tmp_path / "merged", folders).exit_code == 1
    assert {f["detail"] for f in wrong(tmp_path / "merged")} == {"the adapters applied in reverse order"}
    refpeft.save(refpeft.merge(model, both[:1]), tmp_path / "one")
    audit(tmp_path / "one", folders)
    assert {f["detail"] for f in wrong(tmp_path / "one")} == {"lora1: k = 0: left out"}


# ── a change smaller than one unit ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [0, 0.5, 1, 1.5, 2])
def test_an_adapter_far_below_rounding_is_still_seen_or_missed(k: float) -> None:
    """In bfloat16 every element is within a unit of the base's; only all of them together tell."""
    from refpeft.conformance.audit import Expected, judge

    rng = np.random.default_rng(0)
    W = rng.normal(size=(300, 300)).astype(ml_dtypes.bfloat16)
    Δ = 1e-4 * rng.normal(size=(300, 4)) @ rng.normal(size=(4, 300))
    assert np.median(np.abs(Δ / W.astype(float))) < 2**-10
    e = Expected("W", W + Δ, W, ["a"], [{"left out": 0.0, "applied twice": 2.0}], True, lambda: [Δ])
    found = judge(e, (W + k * Δ).astype(ml_dtypes.bfloat16))
    if k == 1:
        assert found.right
    else:
        assert found.verdict == ("base" if k == 0 else "scaled")
        assert found.k == pytest.approx((k,), abs=0.1)


# ── tied layers, and config.json ─────────────────────────────────────────────────────────────────────────────────────


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def test_a_tied_head_may_be_stored_or_not_or_alone(tmp_path: Path) -> None:
    folders = made(tmp_path, "gpt2")
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    assert HEAD not in load_file(merged / "model.safetensors")
    rewrite(merged, lambda t: t.update({HEAD: t[EMBEDDING]}))
    assert audit(merged, folders).exit_code == 0
    rewrite(merged, lambda t: t.pop(EMBEDDING))
    assert audit(merged, folders).exit_code == 0


def test_a_tied_head_that_was_changed_is_found(tmp_path: Path) -> None:
    folders = made(tmp_path, "gpt2")
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    rewrite(merged, lambda t: t.update({HEAD: 2 * t[EMBEDDING]}))
    assert audit(merged, folders).exit_code == 1
    assert {(f["name"], f["verdict"]) for f in wrong(merged)} == {(HEAD, "foreign"), (HEAD, "tied")}


def test_an_untied_head_that_is_not_stored_is_missing(tmp_path: Path) -> None:
    folders = made(tmp_path, "gpt2")
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    reconfigure(merged, tie_word_embeddings=False)
    assert audit(merged, folders).exit_code == 1
    assert [(f["name"], f["verdict"]) for f in wrong(merged)] == [(HEAD, "missing")]


def on_the_embedding(tmp_path: Path) -> Folders:
    model = tiny("gpt2", dtype=np.float32, tie_word_embeddings=True)
    refpeft.save(model, tmp_path / "base")
    fields = {"r": 2, "target_modules": ["wte"], "init_lora_weights": False}
    refpeft.save_adapter(refpeft.init("lora", fields, model), tmp_path / "lora")
    return {"base": tmp_path / "base", "lora": tmp_path / "lora"}


def test_an_adapted_embedding_leaves_the_head_what_it_was(tmp_path: Path) -> None:
    folders = on_the_embedding(tmp_path)
    model = refpeft.load(folders["base"])
    merged = tmp_path / "merged"
    refpeft.save(refpeft.merge(model, refpeft.load_adapter(folders["lora"], model)), merged)
    assert audit(merged, folders).exit_code == 0
    rewrite(merged, lambda t: t.pop(HEAD))  # a tool that merges into the shared tensor
    reconfigure(merged, tie_word_embeddings=True)
    assert audit(merged, folders).exit_code == 1
    assert [(f["name"], f["verdict"]) for f in wrong(merged)] == [(HEAD, "foreign")]


def test_a_config_that_means_another_model_is_found(tmp_path: Path) -> None:
    folders = made(tmp_path)
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    reconfigure(merged, rms_norm_eps=1e-5, pad_token_id=7)
    assert audit(merged, folders).exit_code == 1
    assert [f["detail"] for f in wrong(merged)] == ["norm_eps: expected 1e-06, found 1e-05"]
    reconfigure(merged, model_type="mamba")
    assert audit(merged, folders).exit_code == 1
    (merged / "config.json").unlink()
    assert audit(merged, folders).exit_code == 0


def test_saved_modules_and_biases_are_part_of_the_merge(tmp_path: Path) -> None:
    model = tiny("llama", "ForSequenceClassification", dtype=np.float32)
    refpeft.save(model, tmp_path / "base")
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["score"], "lora_bias": True}
    adapter = refpeft.init("lora", fields, model)
    rng = np.random.default_rng(0)
    moved = {n: (v + rng.normal(size=v.shape)).astype(v.dtype) for n, v in adapter.params.items()}
    refpeft.save_adapter(adapter.replace(params=moved), tmp_path / "lora")
    folders = {"base": tmp_path / "base", "lora": tmp_path / "lora"}
    audit(tmp_path / "base", folders)
    names = {f["name"]: f["verdict"] for f in wrong(tmp_path / "base")}
    assert names.pop("score.weight") == "base"
    assert set(names.values()) == {"base", "missing"}  # q_proj has no bias in the base, and one from the adapter
    refpeft.merge(model, adapter)


# ── what cannot be audited ───────────────────────────────────────────────────────────────────────────────────────────


def refused(folders: Folders, merged: Path, words: str) -> None:
    result = audit(merged, folders)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("refpeft: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_each_thing_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    folders = made(tmp_path)
    refused(folders, tmp_path / "nothing", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(folders, tmp_path / "empty", "there is no model.safetensors")
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(folders, tmp_path / "model.bin", "expected a folder, a .safetensors or an .onnx file")
    (tmp_path / "a.safetensors").write_bytes(b"x" * 20)
    refused(folders, tmp_path / "a.safetensors", "header")
    for name in ("one.onnx", "two.onnx"):
        (tmp_path / "empty" / name).write_bytes(b"x")
    refused(folders, tmp_path / "empty", "there are several ONNX files, name one of them: one.onnx, two.onnx")
    refused(folders, tmp_path / "empty" / "one.onnx", "not an ONNX model")
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    (merged / "config.json").write_text("{")
    refused(folders, merged, "config.json: not JSON")


def test_a_single_file_is_audited_too(tmp_path: Path) -> None:
    folders = made(tmp_path)
    merged = merge(folders["base"], adapters(folders), tmp_path / "merged")
    assert audit(merged / "model.safetensors", folders).exit_code == 0


def test_help_teaches() -> None:
    text = " ".join(CliRunner().invoke(app, ["audit", "--help"]).stdout.split())
    for words in ("equal to rounding", "scaled by a constant", "refpeft audit merged --base llama", "Exit code 0"):
        assert words in text


def test_no_second_model_is_held(tmp_path: Path) -> None:
    """What is held at a time is a few copies of one tensor, not the model's 64."""
    import tracemalloc

    from refpeft.conformance.audit import Found
    from refpeft.conformance.audit import audit as run

    model = tiny("llama", dtype=np.float32, num_hidden_layers=8, hidden_size=64, intermediate_size=512)
    refpeft.save(model, tmp_path / "base")
    model = refpeft.load(tmp_path / "base")
    fields = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    adapter = refpeft.init("lora", fields, model)
    refpeft.save(refpeft.merge(model, adapter), tmp_path / "merged")
    tensors = dict(refpeft.load(tmp_path / "merged").params)
    tracemalloc.start()
    assert all(f.right for f in run(model, [adapter], ["a"], Found(tensors)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 512 * 64 * 8
    assert peak < 16 * largest
    assert sum(a.nbytes for a in tensors.values()) > 16 * largest / 2


MERGEABLE = [name for name, m in refpeft.METHODS.items() if hasattr(m, "merge") or hasattr(m, "merge_model")]
FIELDS = {
    "trainable_tokens": {"token_indices": [1, 2]},
    "bitfit": {"biases": "all"},
    "adalora": {"total_step": 10},
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", MERGEABLE)
def test_every_method_that_merges_is_found_merged_or_not(method: str, dtype: str) -> None:
    from refpeft.conformance.audit import Found
    from refpeft.conformance.audit import audit as run

    model = tiny("gpt2", dtype=np.dtype(dtype))
    adapter = refpeft.init(method, FIELDS.get(method, {}), model)
    rng = np.random.default_rng(0)
    moved = {n: (v + 0.1 * rng.normal(size=v.shape)).astype(v.dtype) for n, v in adapter.params.items()}
    adapter = adapter.replace(params=moved)
    merged = refpeft.merge(model, adapter)
    assert all(f.right for f in run(model, [adapter], ["a"], Found(dict(merged.params), merged.source)))
    found = [f for f in run(model, [adapter], ["a"], Found(dict(model.params), model.source)) if not f.right]
    assert found
    assert {f.verdict for f in found} <= {"base", "foreign"}
