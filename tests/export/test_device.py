"""Devices: what is not there is an error; runs that are bound are runs; `make gpu-check` on the CPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import refpeft
from refpeft.cli import app
from refpeft.export import runtime
from refpeft.export.generation import Options, open_writer, write
from refpeft.export.program import export
from tests.models import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.ort
def test_a_device_that_is_not_there_is_said_before_the_work(tmp_path: Path) -> None:
    model = tiny("gpt2", "LMHeadModel", dtype=np.float32)
    for device, words in (
        ("cuda", r"does not offer: pip uninstall onnxruntime, then pip install 'refpeft\[gpu\]'"),
        ("tpu", "must be cpu or cuda, found"),
    ):
        with pytest.raises(ValueError, match=words):
            export(model, None, tmp_path / "out", device=device)
        assert not (tmp_path / "out").exists()
    refpeft.save(model, tmp_path / "model")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--device", "cuda"]
    )
    assert done.exit_code == 2
    assert "CUDA was asked for" in done.stderr
    assert export(model, None, tmp_path / "out", device="cpu").provider == runtime.CPU


@pytest.mark.ort
@pytest.mark.parametrize(("family", "architecture"), [("gpt2", "LMHeadModel"), ("t5", "ForConditionalGeneration")])
def test_bound_runs_write_the_same(
    family: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the CPU in its place: outputs are left where they are, and go in again."""
    export(tiny(family, architecture, dtype=np.float32), None, tmp_path / "out", decode=True)
    writer = open_writer(tmp_path / "out", device="cpu")
    rows, options = [[3, 1, 4], [1, 5]], Options(max_new_tokens=5)
    plain = [list(tokens) for tokens in write(writer, rows, options)]
    calls: list[int] = []

    def bound(self: runtime.Runner, feeds: Any, wanted: Any) -> Any:
        calls.append(len(feeds))
        return self.bound(dict(feeds), wanted, "cpu")

    monkeypatch.setattr(runtime.Runner, "run_values", bound)
    assert [list(tokens) for tokens in write(writer, rows, options)] == plain
    assert len(calls) >= len(plain)


@pytest.mark.ort
def test_the_gpu_check_on_a_cpu(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--quick", "--write", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 exports verified on cpu." in done.stdout
    said = page.read_text("utf-8")
    assert said.count("CPUExecutionProvider") == 12
    assert "| gpt2 | training | float32 |" in said
    done = subprocess.run([*command[:2]], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: CUDA was asked for")
    assert done.stderr.count("\n") == 1


@pytest.mark.ort
def test_the_gpu_check_asks_only_for_what_there_is() -> None:
    """The whole grid, on the CPU: every row is verified."""
    from bench.gpu import verified

    rows = list(verified(["gpt2", "llama", "bert", "t5"], ["float32", "float16"], "cpu", lambda what: None))
    assert len(rows) == 77
    assert [row for row in rows if row.ratio is None] == []
