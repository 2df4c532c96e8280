"""Weights that stay in the checkpoint's files, and those that are written: the same graph, nothing twice on disk."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors import safe_open

import refpeft
from refpeft.checkpoint import safetensors
from refpeft.export import initialisers, linking
from refpeft.export.generation import Options, open_writer, write
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from refpeft.export.runtime import open_folder
from refpeft.export.verification import LIMIT
from refpeft.stream import merged
from tests.models import tiny

F32 = np.float32
FORMS = ["merged", "unmerged", "inputs", "multi", "training"]


def saved(
    folder: Path, family: str = "gpt2", architecture: str | None = None, dtype: Any = F32, shards: int = 1
) -> Any:
    """A checkpoint, its tensors in so many files, as it is loaded."""
    refpeft.save(tiny(family, architecture, dtype=dtype), folder)
    if shards > 1:
        tensors = safetensors.read(folder / "model.safetensors")
        where = {name: f"model-{k % shards}.safetensors" for k, name in enumerate(tensors)}
        for file in set(where.values()):
            safetensors.write(folder / file, {n: a for n, a in tensors.items() if where[n] == file})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        (folder / "model.safetensors").unlink()
    return refpeft.load(folder)


def lora(model: Any, method: str = "lora", seed: int = 0, **config: Any) -> refpeft.Adapter:
    own = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return refpeft.init(method, own, model, seed)


def places(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Where each tensor lies: file, offset, length."""
    found = {}
    for t in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.initializer:
        said = {e.key: e.value for e in t.external_data}
        if said:
            found[t.name] = (said["location"], int(said["offset"]), int(said["length"]))
    return found


def ratio(result: Any) -> float:
    return float(max(c["ratio"] for c in result.cases))


@pytest.mark.ort
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_linked_weights_are_the_checkpoints_own(family: str, form: str, shards: int, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", family, shards=shards)
    adapter = lora(model, target_modules=["c_attn", "q_proj"])
    kept = export(model, adapter, tmp_path / "linked", form, link=True, source=tmp_path / "model")
    copied = export(model, adapter, tmp_path / "copied", form, source=tmp_path / "model", external=True)
    assert ratio(kept) <= LIMIT
    assert kept.nodes == copied.nodes
    where = places(tmp_path / "linked")
    files = sorted(f.name for f in (tmp_path / "model").glob("*.safetensors"))
    assert sorted({file for file, _, _ in where.values()} - {"model.onnx.data"}) == files
    for file in files:
        assert (tmp_path / "linked" / file).stat().st_ino == (tmp_path / "model" / file).stat().st_ino
    changed = {f"{m}.weight" for m in adapter.by_module} if form == "merged" else set()
    assert {n for n in where if n in model.params and where[n][0] == "model.onnx.data"} == changed
    a, b = initialisers.read(tmp_path / "linked" / "model.onnx"), initialisers.read(tmp_path / "copied" / "model.onnx")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.ort
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_linked_file_keeps_its_dtype_and_the_graph_casts(
    family: str, dtype: str, stored: Any, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", family, dtype=stored)
    for form in ("merged", "inputs"):
        result = export(model, lora(model), tmp_path / form, form, dtype, link=True, source=tmp_path / "model")
        assert ratio(result) <= LIMIT
    own = initialisers.read(tmp_path / "inputs" / "model.onnx")
    assert {own[n].dtype for n in model.params if n in own} == {np.dtype(stored)}


def test_nothing_changed_means_nothing_written(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    result = export(model, None, tmp_path / "out", link=True, source=tmp_path / "model", verify=False)
    assert result.external_data
    assert not (tmp_path / "out" / "model.onnx.data").exists()


@pytest.mark.ort
def test_a_linked_folder_writes_and_takes_other_adapters(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "llama", shards=2)
    one, other = lora(model, "dora"), lora(model, "dora", seed=5, r=3)
    for name, link in (("linked", True), ("copied", False)):
        export(model, one, tmp_path / name, "inputs", decode=True, link=link, source=tmp_path / "model", verify=False)
    refpeft.save_adapter(other, tmp_path / "other")
    files = []
    for name in ("linked", "copied"):
        file = tmp_path / f"{name}.onnx_adapter"
        adapter_only(tmp_path / name, [tmp_path / "other"], file)
        writer = open_writer(tmp_path / name, file)
        files.append((file.read_bytes(), list(write(writer, [[3, 1, 4]], Options(max_new_tokens=6)))))
    assert files[0] == files[1]


@pytest.mark.ort
def test_a_checkpoint_of_symbolic_links(tmp_path: Path) -> None:
    """As in the cache of the Hub, where onnxruntime would refuse the links themselves."""
    saved(tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    model = refpeft.load(tmp_path / "model")
    result = export(model, lora(model), tmp_path / "out", link=True, source=tmp_path / "model")
    assert ratio(result) <= LIMIT
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


def refused(tmp_path: Path, message: str, **options: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    model = refpeft.load(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as e:
        export(model, None, tmp_path / "out", verify=False, **{"link": True, "source": tmp_path / "model", **options})
    assert "\n" not in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_linked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model")
    refused(tmp_path, "none of its tensors can stay as it is", dtype="bfloat16")
    refused(tmp_path, "linked weights lie in the files of `source`", source=None)
    refused(tmp_path, "linked weights lie in the files of `source`", external=False)

    def elsewhere(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    monkeypatch.setattr(linking, "cloned", lambda *files: False)
    refused(tmp_path, r"model\.safetensors cannot be linked into .*: it lies on another device \(--weights copy")
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(PermissionError(errno.EPERM, "Not permitted")))
    refused(tmp_path, r"cannot be linked into .*: not permitted \(--weights copy")


@pytest.mark.ort
def test_where_there_are_no_hard_links_files_are_cloned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stood in for by a copy: few file systems can clone."""
    model = saved(tmp_path / "model")

    def elsewhere(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def cloned(file: Path, new: Path) -> bool:
        shutil.copy(file, new)
        return True

    monkeypatch.setattr(os, "link", elsewhere)
    monkeypatch.setattr(linking, "cloned", cloned)
    assert ratio(export(model, lora(model), tmp_path / "out", link=True, source=tmp_path / "model")) <= LIMIT


def test_a_file_system_that_cannot_clone_leaves_nothing(tmp_path: Path) -> None:
    """A clone is the same bytes, or it is not there."""
    (tmp_path / "a").write_bytes(b"1234")
    made = linking.cloned(tmp_path / "a", tmp_path / "b")
    assert made == (tmp_path / "b").exists()
    assert not made or (tmp_path / "b").read_bytes() == b"1234"


def test_linked_offsets_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """Every tensor that the graph points at is, byte for byte, what another reader finds under its name."""
    model = saved(tmp_path / "model", "gpt2", shards=2)
    export(model, None, tmp_path / "out", link=True, source=tmp_path / "model", verify=False)
    where = places(tmp_path / "out")
    assert where.keys() == model.params.keys()
    for name, (file, offset, length) in where.items():
        with safe_open(tmp_path / "model" / file, "numpy") as f:
            want = f.get_tensor(name).tobytes()
        with (tmp_path / "out" / file).open("rb") as f:
            f.seek(offset)
            assert f.read(length) == want


@pytest.mark.ort
def test_a_checkpoint_that_is_edited_in_place_is_noticed(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    export(model, None, tmp_path / "out", link=True, source=tmp_path / "model")
    assert open_folder(tmp_path / "out").outputs == ["logits"]
    with (tmp_path / "model" / "model.safetensors").open("r+b") as f:
        f.seek(-4, os.SEEK_END)
        f.write(b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"model\.safetensors was changed since it was exported"):
        open_folder(tmp_path / "out")


# ── merging some rows at a time ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("methods", [["lora"], ["rslora"], ["dora"], ["lora", "dora"], ["biased"]])
def test_merging_by_rows_is_merging(methods: list[str], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers, Conv1D and embeddings; large matrices are those of more than 40 numbers here."""
    monkeypatch.setattr("refpeft.stream.LARGE", 40)
    model = tiny(family)
    everything = "|".join(site.path.replace(".", r"\.") for site in model.sites.values() if "norm" not in site.kind)
    adapters = [
        lora(model, seed=k, lora_bias=True) if name == "biased" else lora(model, name, k, target_modules=everything)
        for k, name in enumerate(methods)
    ]
    want = refpeft.merge(model, adapters)
    found = dict(merged(model, adapters, dict(model.sites)))
    assert all(np.abs(found[n] - a).max() <= 1e-14 for n, a in want.params.items() if n in found)
    assert {n for n, a in want.params.items() if a is not model.params.get(n)} <= found.keys()


def test_by_rows_a_matrix_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refpeft.stream.LARGE", 40)
    model = tiny("llama", dtype=np.float16)
    adapter = lora(model)
    want = refpeft.merge(model.astype(F32), adapter)
    found = dict(merged(model, [adapter], dict(model.sites), np.float16))
    assert {a.dtype for a in found.values()} == {np.dtype(np.float16)}
    close = [
        np.abs(a.astype(F32) - want.params[n]).max() <= 2**-11 * np.abs(want.params[n]).max() for n, a in found.items()
    ]
    assert all(close)
