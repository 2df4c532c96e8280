"""`refpeft export` from the command line: the folder, the table, and one sentence for each thing that can go wrong."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import refpeft
from refpeft.cli import app
from tests.models import tiny

runner = CliRunner()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model folder with a LoRA adapter folder beside it."""
    model = tiny("gpt2", dtype=np.float32)
    refpeft.save(model, tmp_path / "model")
    refpeft.save_adapter(refpeft.init("lora", {"init_lora_weights": False}, model), tmp_path / "lora")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path


def export(folder: Path, *options: str) -> Result:
    return runner.invoke(app, ["export", str(folder / "model"), "--out", str(folder / "out"), *options])


def failed(result: Result, *words: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.count("\n") <= 1 + result.stderr.count("reading the checkpoint")
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.output


@pytest.mark.ort
def test_export_with_an_adapter(checkpoint: Path) -> None:
    result = export(checkpoint, "--adapter", str(checkpoint / "lora"), "--json", str(checkpoint / "result.json"))
    assert result.exit_code == 0, result.output
    for words in ("input_ids", "logits", "batch 3 × length 12", "Equal to the specification"):
        assert words in result.stdout
    assert json.loads((checkpoint / "result.json").read_text())["provider"].endswith("ExecutionProvider")
    assert (checkpoint / "out" / "tokenizer.json").read_text() == "{}"


def test_export_without_verification_says_so(checkpoint: Path) -> None:
    result = export(checkpoint, "--no-verify", "--external-data", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "Not verified" in result.stdout
    assert (checkpoint / "out" / "model.onnx.data").is_file()


def test_each_mistake_is_one_sentence(checkpoint: Path) -> None:
    failed(export(checkpoint, "--form", "folded", "--no-verify"), "form must be one of merged", "folded")
    failed(export(checkpoint, "--dtype", "int8", "--no-verify"), "dtype must be one of float32, float16", "int8")
    failed(export(checkpoint, "--adapter", str(checkpoint / "none"), "--no-verify"), "none")
    assert not (checkpoint / "out").exists()
    (checkpoint / "out").mkdir()
    failed(export(checkpoint, "--no-verify"), "exists already")
    assert not list((checkpoint / "out").iterdir())


def test_without_onnxruntime_it_says_which_extra(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("refpeft.export.runtime.installed", list)
    failed(export(checkpoint), "refpeft[cpu]", "--no-verify")
    assert not (checkpoint / "out").exists()


def test_a_wrong_graph_ends_with_exit_code_1(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refpeft.export import verification

    def different(*args: object) -> None:
        raise verification.MismatchError("the exported graph differs")

    monkeypatch.setattr(verification, "ready", lambda device: None)
    monkeypatch.setattr(verification, "verify", different)
    result = export(checkpoint)
    assert result.exit_code == 1
    assert "differs" in result.stderr
    assert not (checkpoint / "out").exists()


def test_termination_leaves_nothing(checkpoint: Path) -> None:
    """A process that is told to end while it writes removes what it wrote."""
    code = (
        "import sys, time\n"
        "from refpeft.export import weights\n"
        "weights.write = lambda *args: (print('writing', flush=True), time.sleep(60))\n"
        "from refpeft.cli import main\n"
        "main()\n"
    )
    before = sorted(checkpoint.rglob("*"))
    command = [sys.executable, "-c", code, "export", str(checkpoint / "model"), "--no-verify", "--external-data"]
    process = subprocess.Popen(
        [*command, "--out", str(checkpoint / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert sorted(checkpoint.rglob("*")) != before
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    process.wait(timeout=30)
    process.stdout.close()
    assert time.monotonic() - started < 30
    assert process.returncode != 0
    assert sorted(checkpoint.rglob("*")) == before


def test_help_teaches_every_form() -> None:
    from refpeft.export.forms import FORMS

    lines = runner.invoke(app, ["export", "--help"]).stdout.splitlines()
    start = next(k for k, line in enumerate(lines) if line.strip() == "--form")
    told = itertools.takewhile(str.strip, lines[start + 1 :])
    assert [line.split()[0] for line in told if not line.startswith("  ")] == list(FORMS)


@pytest.mark.parametrize("width", ["80", "120"])
def test_help_groups_the_options(width: str) -> None:
    """Each in a panel that says what it decides; only --help is in none of them."""
    shown = runner.invoke(app, ["export", "--help"], env={"COLUMNS": width, "TERMINAL_WIDTH": width}).stdout
    titles = ["What is exported", "Its form", "Numbers", "Writing text, and speed", "Where it goes", "Safety"]
    shown = re.sub("\x1b\\[[0-9;]*m", "", shown)  # colours, where a terminal is forced
    panels = [(m.group(1), m.end()) for m in re.finditer("╭─ (.*?) ─+╮", shown)]
    assert [title.split(":")[0] for title, _ in panels] == ["Arguments", "Options", *titles]
    found = {title.split(":")[0]: shown[at:].partition("╰")[0] for title, at in panels}
    own = {title: re.findall(r"^│ [*]? *--([a-z0-9-]+)", text, re.MULTILINE) for title, text in found.items()}
    assert own["Options"] == ["help"]
    assert own["What is exported"] == ["adapter", "adapter-only"]
    assert own["Its form"] == ["form", "optimizer", "set"]
    assert own["Numbers"] == ["dtype", "block-size", "zero-points", "int4-head", "accuracy-level"]
    assert own["Writing text, and speed"] == ["decode", "last-logits", "graph"]
    assert own["Where it goes"] == ["out", "weights", "external-data", "json"]
    assert own["Safety"] == ["verify", "device"]
    assert max(map(len, shown.splitlines())) <= int(width)


@pytest.mark.ort
def test_an_adapter_file_for_a_folder(checkpoint: Path) -> None:
    assert export(checkpoint, "--adapter", str(checkpoint / "lora"), "--form", "inputs").exit_code == 0
    command = ["export", "--adapter-only", str(checkpoint / "out"), "--adapter", str(checkpoint / "lora"), "--out"]
    result = runner.invoke(app, [*command, str(checkpoint / "other"), "--json", str(checkpoint / "other.json")])
    assert result.exit_code == 0, result.output
    assert "4 tensors for the graph" in result.stdout.replace("\n", "")
    assert (checkpoint / "other").read_bytes() == (checkpoint / "out" / "adapter.onnx_adapter").read_bytes()
    assert len(json.loads((checkpoint / "other.json").read_text())["tensors"]) == 4
    failed(runner.invoke(app, [*command, str(checkpoint / "other")]), "exists already")
    failed(runner.invoke(app, ["export", "--out", str(checkpoint / "none")]), "either MODEL", "--adapter-only FOLDER")
