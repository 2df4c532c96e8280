"""What can go wrong around an export: one sentence, nothing lost, no wrong answer."""

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import refpeft
from refpeft.cli import app
from refpeft.export import card, weights
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from refpeft.export.runtime import open_folder
from tests.export.test_generate_cli import words
from tests.export.test_weights import lora, saved
from tests.models import tiny

F32 = np.float32
IDS = {"input_ids": np.array([[3, 1, 4]]), "attention_mask": np.ones((1, 3), np.int64)}


def tree(folder: Path) -> dict[str, Any]:
    """All files by name, with what is in them."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in sorted(folder.rglob("*"))}


def sentence(command: list[Any]) -> str:
    """What the command line says of a mistake: one line, exit code 2."""
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") <= 1 + result.stderr.count("reading the checkpoint")
    return result.stderr


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A model, an adapter, and a folder of the form inputs that decodes, its weights beside the graph."""
    model = saved(tmp_path / "model")
    refpeft.save_adapter(lora(model), tmp_path / "lora")
    words().save(str(tmp_path / "model" / "tokenizer.json"))
    export(model, lora(model), tmp_path / "out", "inputs", decode=True, external=True, source=tmp_path / "model")
    return tmp_path


# ── a folder that is not as it was exported ──────────────────────────────────────────────────────────────────────────


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "{0} is missing, which was exported"),
    "cut short": (cut, "bytes, as it was exported, found"),
    "altered": (flip, "{0} was changed since it was exported: its SHA-256 is not that in refpeft.json"),
}


@pytest.mark.ort
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "config.json", "adapter.onnx_adapter"])
def test_a_missing_or_altered_file_is_noticed(file: str, change: str, served: Path) -> None:
    """By whoever opens the folder, from Python or from the command line."""
    f, text = CHANGES[change]
    f(served / "out" / file)
    before, message = tree(served), text.format(file)
    commands = [
        ["generate", served / "out", "a"],
        ["export", "--adapter-only", served / "out", "--adapter", served / "lora", "--out", served / "new"],
    ]
    for command in commands:
        assert message in sentence(command)
    if (file, change) != ("model.onnx", "missing"):
        with pytest.raises(ValueError, match=r"exported|SHA-256"):
            open_folder(served / "out")
    assert tree(served) == before


@pytest.mark.ort
def test_a_folder_without_its_card(served: Path) -> None:
    (served / "out" / "refpeft.json").unlink()
    with pytest.raises(ValueError, match=r"there is no refpeft\.json"):
        open_folder(served / "out")
    assert "there is no refpeft.json" in sentence(["generate", served / "out", "a"])


@pytest.mark.ort
def test_what_is_added_does_no_harm(served: Path) -> None:
    (served / "out" / "README.md").write_text("mine")
    assert "logits" in open_folder(served / "out").outputs


@pytest.mark.ort
@pytest.mark.parametrize("files", [{"../model/config.json": {}}, {"model.onnx": 3}, {"/etc/passwd": {"size": 1}}])
def test_a_card_names_no_files_elsewhere(files: Any, served: Path) -> None:
    where = served / "out" / "refpeft.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"files": files}))
    with pytest.raises(ValueError, match="files must map names to sizes and hashes"):
        open_folder(served / "out")


@pytest.mark.ort
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("facts", ["lora"], "facts must hold what is said of each adapter"),
     ("unread", [["x"]], "unread must hold names"),
     ("inputs", {"input_ids": 3}, "inputs must hold shapes, of numbers and names"),
     ("optional_inputs", {"x": [None]}, "optional_inputs must hold shapes"),
     ("base", 10**30, "base must be a natural number below"),
     ("base", -1, "base must be a natural number below")],
)  # fmt: skip
def test_what_a_card_holds_is_looked_at(field: str, value: Any, words: str, served: Path) -> None:
    where = served / "out" / "refpeft.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {field: value}))
    command = ["export", "--adapter-only", served / "out", "--adapter", served / "lora", "--out", served / "new"]
    assert f"refpeft.json: {words}" in sentence(command)
    assert "refpeft.json" in sentence(["generate", served / "out", "a"])


def test_hashes_of_large_files_see_pieces_of_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last byte too; what is small is read whole."""
    for name, number in {"WHOLE": 6400, "PIECES": 64, "PIECE": 100}.items():
        monkeypatch.setattr(card, name, number)
    file = tmp_path / "x"
    raw = np.random.default_rng(0).bytes(64_000)
    file.write_bytes(raw[:6400])
    assert card.digest(file).keys() == {"size", "sha256"}
    file.write_bytes(raw)
    whole = card.digest(file)
    assert whole.keys() == {"size", "sha256_of_pieces"}
    seen = []
    for at in range(0, 64_000, 50):
        changed = bytearray(raw)
        changed[at] ^= 1
        file.write_bytes(changed)
        seen.append(card.digest(file) != whole)
    assert seen[0]
    assert 0.08 < np.mean(seen) < 0.12  # a tenth is looked at
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert card.digest(file) != whole


# ── a graph that points elsewhere ────────────────────────────────────────────────────────────────────────────────────

PLACES = {
    "a parent": ("location", "../secret", "must lie in the model's folder"),
    "an absolute path": ("location", "/etc/passwd", "must lie in the model's folder"),
    "a link that leaves": ("location", "link", "is a link that leaves the model's folder"),
    "past the end": ("offset", "999999999", "it should end at byte"),
    "an overlap": ("offset", "8 behind another", "overlap in part"),
}


@pytest.mark.ort
@pytest.mark.parametrize("name", PLACES)
def test_a_graph_that_points_elsewhere_is_refused(name: str, served: Path) -> None:
    """Even if the hash in refpeft.json was brought in line."""
    key, value, message = PLACES[name]
    (served / "secret").write_bytes(bytes(100_000))
    (served / "out" / "link").symlink_to(served / "secret")
    path = served / "out" / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    first, second = [t for t in model.graph.initializer if t.external_data and len(t.dims) == 2][:2]
    at = next(int(e.value) for e in second.external_data if e.key == "offset")
    changed = next(e for e in first.external_data if e.key == key)
    changed.value = str(at + 8) if value == "8 behind another" else value
    path.write_bytes(model.SerializeToString())
    said = json.loads((served / "out" / "refpeft.json").read_text())
    said["files"]["model.onnx"] = card.digest(path)
    (served / "out" / "refpeft.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        open_folder(served / "out")
    assert message in sentence(["generate", served / "out", "a"])
    command = ["export", "--adapter-only", served / "out", "--adapter", served / "lora", "--out", served / "new"]
    assert message in sentence(command)
    assert not (served / "new").exists()


# ── adapters of other models ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ort
def test_an_adapter_file_of_another_model_is_refused(served: Path) -> None:
    """Of the same shapes and names too, which onnxruntime would take."""
    other = tiny("gpt2", seed=1, dtype=F32)
    wider = tiny("gpt2", n_embd=32, dtype=F32)
    for name, model in (("other", other), ("wider", wider)):
        export(model, lora(model), served / name, "inputs", decode=True, verify=False)
    export(refpeft.load(served / "model"), lora(other), served / "low", "inputs", "int4", decode=True, verify=False)
    runner = open_folder(served / "out")
    for name in ("other", "low"):
        with pytest.raises(ValueError, match="is for another base model than this graph's, or for other roundings"):
            runner.load(served / name / "adapter.onnx_adapter")
        command = ["generate", served / "out", "a", "--adapter", served / name / "adapter.onnx_adapter"]
        assert "is for another base model" in sentence(command)
    with pytest.raises(ValueError, match="is for another base model"):
        runner.load(served / "wider" / "adapter.onnx_adapter")
    with pytest.raises(ValueError, match="not an adapter file of onnxruntime"):
        runner.load(served / "out" / "model.onnx")


@pytest.mark.ort
def test_a_float16_graph_takes_the_adapter_files_of_a_float32_one(served: Path) -> None:
    """The base model is the same, and so are numbers that are fed."""
    model = refpeft.load(served / "model")
    export(model, lora(model), served / "half", "inputs", "float16", decode=True, verify=False)
    assert open_folder(served / "half").load(served / "out" / "adapter.onnx_adapter").names


@pytest.mark.ort
def test_files_for_a_folder_carry_its_number(served: Path) -> None:
    import onnxruntime

    adapter_only(served / "out", [served / "lora"], served / "new.onnx_adapter")
    base = json.loads((served / "out" / "refpeft.json").read_text())["base"]
    for file in (served / "new.onnx_adapter", served / "out" / "adapter.onnx_adapter"):
        assert onnxruntime.AdapterFormat.read_adapter(str(file)).get_model_version() == base
    assert base > 1


# ── an export that does not come to its end ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("link", [True, False])
def test_an_export_that_is_broken_off_changes_nothing(
    link: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint, which it is linked with, least of all."""
    model = saved(tmp_path / "model", shards=2)
    before = tree(tmp_path)

    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(weights if not link else refpeft.export.program, "write" if not link else "save", fails)
    with pytest.raises(type(error)):
        export(model, lora(model), tmp_path / "out", external=True, link=link, source=tmp_path / "model", verify=False)
    assert tree(tmp_path) == before
    assert all(f.stat().st_nlink == 1 for f in (tmp_path / "model").iterdir())


@contextlib.contextmanager
def full(size: int) -> Iterator[None]:
    """A disk that takes so many bytes of a file, and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.ort
@pytest.mark.parametrize("out", ["new.onnx_adapter", "new.safetensors", "new"])
def test_a_full_disk(out: str, served: Path) -> None:
    """Of real writes, onnxruntime's too. The sentence names what was to be written, and nothing is left of it."""
    before = tree(served)
    what = ["--adapter-only", served / "out"] if out != "new" else [served / "model"]
    command = ["export", *what, "--adapter", served / "lora", "--out", served / out]
    with full(1000):
        found = sentence(command if out != "new" else [*command, "--form", "inputs", "--external-data", "--no-verify"])
    assert f"{served / out}: could not be written: " in found
    assert tree(served) == before


@pytest.mark.ort
def test_a_full_disk_for_the_result(served: Path) -> None:
    json_file = served / "result.json"
    with full(10):
        found = sentence(["generate", served / "out", "a", "--json", json_file])
    assert f"{json_file}: could not be written: file too large" in found


def test_removing_a_linked_folder_leaves_the_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    before = tree(tmp_path)
    export(model, None, tmp_path / "out", link=True, source=tmp_path / "model", verify=False)
    shutil.rmtree(tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.ort
def test_nothing_is_written_over_what_is_read(served: Path) -> None:
    before = tree(served)
    model, out, adapter = served / "model", served / "out", served / "lora"
    for place in (model, adapter, out):
        for weights_ in ("copy", "link"):
            found = sentence(
                ["export", model, "--adapter", adapter, "--out", place, "--weights", weights_, "--no-verify"]
            )
            assert "exists already" in found
    for place in (out, adapter, out / "adapter.onnx_adapter", out / "model.onnx"):
        found = sentence(["export", "--adapter-only", out, "--adapter", adapter, "--out", place])
        assert "exists already" in found
    assert tree(served) == before


def test_mistakes_of_the_command_line(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    command = ["export", tmp_path / "model", "--out", tmp_path / "out", "--no-verify"]
    assert "--weights must be copy or link, found 'move'" in sentence([*command, "--weights", "move"])
    assert "are of int4, and the dtype is float32" in sentence([*command, "--block-size", "32"])
    assert "a power of two" in sentence([*command, "--dtype", "int4", "--block-size", "12"])
    assert "accuracy_level must be 0, 1 or 4" in sentence([*command, "--dtype", "int4", "--accuracy-level", "3"])
    found = sentence([*command, "--weights", "link", "--no-external-data"])
    assert "linked weights lie in the files of" in found
    assert not (tmp_path / "out").exists()


@pytest.mark.ort
def test_the_command_line_says_what_was_linked_and_rounded(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    refpeft.save_adapter(lora(model), tmp_path / "lora")
    command = ["export", tmp_path / "model", "--adapter", tmp_path / "lora", "--out", tmp_path / "out"]
    options = ["--form", "inputs", "--dtype", "int4", "--zero-points", "--block-size", "16", "--weights", "link"]
    result = CliRunner().invoke(app, [str(word) for word in [*command, *options]])
    assert result.exit_code == 0, result.output
    out = result.stdout
    for expected in (
        "inputs, int4",
        "model.safetensors",
        "shared with the model",
        "on the rounded weights",
    ):
        assert expected in out
    assert "outputs differ by 0." in out
