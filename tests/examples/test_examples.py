"""The examples run and say what their docstrings promise."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import refpeft
from refpeft.conformance.engine import check
from tests.models import tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(script: str, *words: str | Path) -> str:
        command = [sys.executable, str(EXAMPLES / script), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_own_gradient_tells_right_from_wrong(run: Run) -> None:
    right, wrong = run("own_gradient.py").splitlines()
    assert right.startswith("swish")
    assert right.endswith("rounding")
    assert wrong.startswith("hasty")
    assert wrong.endswith("wrong")


def test_intrinsic_dimension_of_digits(run: Run, tmp_path: Path) -> None:
    """The assertions are its own."""
    said = run("intrinsic_dimension.py", "--quick", "--out", tmp_path)
    assert "d₉₀" in said
    assert (tmp_path / "intrinsic-dimension.png").read_bytes().startswith(b"\x89PNG")


def test_staged_vocabulary(run: Run, tmp_path: Path) -> None:
    """The assertions are its own; and its last folder is a model as any other."""
    said = run("staged_vocabulary.py", "--quick", "--out", tmp_path)
    assert "lower loss stage by stage" in said
    assert (tmp_path / "staged-vocabulary.png").read_bytes().startswith(b"\x89PNG")
    model = refpeft.load(tmp_path / "new" / "instructions")
    again = refpeft.load_adapter(
        tmp_path / "new" / "instructions-adapter", refpeft.load(tmp_path / "new" / "attention")
    )
    merged = refpeft.merge(refpeft.load(tmp_path / "new" / "attention"), again)
    assert all(np.array_equal(a, model.params[name]) for name, a in merged.params.items())


@pytest.mark.ort
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_export_and_run(run: Run, tmp_path: Path, family: str) -> None:
    model = tiny(family, dtype=np.float32)
    refpeft.save(model, tmp_path / "model")
    refpeft.save_adapter(refpeft.init("lora", {"r": 2, "init_lora_weights": False}, model), tmp_path / "adapter")
    said = run("export_and_run.py", tmp_path / "model", tmp_path / "adapter", tmp_path / "onnx")
    assert float(said.split("differ by ")[1].split()[0]) < 1e-5


def judge(source: str, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The status of each property that the LoRA in a file declares."""
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    events = list(check(f"python:{module}:Mine", ["lora"], ["layer"], examples=10, folder=folder))
    return {e["property"]: e["status"] for e in events if e["type"] == "result" and e["status"] != "undeclared"}


def test_my_lora_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = judge((EXAMPLES / "my_lora.py").read_text(encoding="utf-8"), "right_lora", tmp_path, monkeypatch)
    assert {"forward", "merge", "batch"} <= statuses.keys()
    assert set(statuses.values()) == {"pass"}


def test_my_lora_without_its_scale_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = (EXAMPLES / "my_lora.py").read_text(encoding="utf-8")
    wrong = right.replace("W + s * (B @ A)", "W + B @ A")
    assert wrong != right
    statuses = judge(wrong, "wrong_lora", tmp_path, monkeypatch)
    assert statuses["merge"] == "fail"
    assert statuses["forward"] == "pass"
