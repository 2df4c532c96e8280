"""`make gpu-check`, with the CPU in the GPU's place; and that it sees a device that computes something else."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu
from refpeft.export import runtime
from refpeft.export.devices import CPU
from refpeft.export.generation import open_writer

ROOT = Path(__file__).parents[2]
ROW = gpu.Row("gpt2", "merged", "float32", True, CPU, 1.0, 1e-7, 64)


@pytest.mark.ort
def test_the_gpu_check_on_a_cpu(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"# On a GPU\n\nRead this.\n\n{gpu.HEADING}\nNothing yet.\n")
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--write", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 exports are equal to the specification and the CPU on cpu." in done.stdout
    said = page.read_text("utf-8")
    assert said.startswith(f"# On a GPU\n\nRead this.\n\n{gpu.HEADING}\ndevice cpu, onnxruntime ")
    assert "Nothing yet" not in said
    assert said.count("| gpt2 | ") == 12 + 1
    assert "| gpt2 | merged | float32 | ✓ | " in said
    assert " | 0.0e+00 | 64 | 0 | 0 | yes |" in said


def test_no_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offered(device: str) -> bool:
        raise ValueError("CUDA was asked for, and there is none")

    monkeypatch.setattr(runtime, "offered", offered)
    assert gpu.main(argparse.Namespace(device="cuda", quick=True, write=None)) == 2
    said = capsys.readouterr()
    assert said.err == "gpu-check: CUDA was asked for, and there is none\n"
    assert said.out == ""


@pytest.mark.parametrize(
    "change", [{"ratio": 11.0}, {"ratio": float("nan")}, {"ratio": None, "said": "it stopped"}, {"apart": 1e-3},
               {"apart": float("inf")}, {"other": 1}]
)  # fmt: skip
def test_what_is_not_equal_is_said(change: dict[str, Any]) -> None:
    """A difference as TF32 would make it, for example."""
    assert ROW.equal
    assert ROW.cells[-1] == "yes"
    row = replace(ROW, **change)
    assert not row.equal
    assert row.cells[-1] == "no"
    assert len(row.cells) == len(ROW.cells) == len(gpu.HEADS)


def test_near_ties_are_no_difference() -> None:
    assert replace(ROW, same=63, near=1).equal
    assert replace(ROW, same=63, near=1).cells[6] == "63 + 1 near"


def test_distances() -> None:
    assert gpu.distance(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert gpu.distance(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert gpu.expected("float32") == 100 * 2.0**-24
    assert gpu.expected("float16") == 100 * 2.0**-11


@pytest.mark.ort
def test_another_model_on_the_device_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, and tokens of runs with keys and values: what is opened for the device is another folder."""
    model = gpu.model("gpt2", gpu.SMALL)
    other = replace(model, params={name: -p for name, p in model.params.items()})
    for name, which in (("one", model), ("two", other)):
        gpu.export(which, None, tmp_path / name, decode=True, verify=False)
    subject = gpu.Subject(model, [], gpu.DTYPES["float32"], True)
    assert gpu.tokens(ROW, tmp_path / "one", "cpu") == {"same": 64, "near": 0, "other": 0}
    assert gpu.apart("merged", subject, tmp_path / "one", "cpu") == 0

    def turns(opened: Any) -> Any:
        names = iter(("two", "one"))
        return lambda out, device: opened(tmp_path / next(names), device)

    monkeypatch.setattr(gpu, "open_writer", turns(lambda out, device: open_writer(out, device=device)))
    assert gpu.tokens(ROW, tmp_path / "one", "cpu")["other"] > 0
    monkeypatch.setattr(runtime, "open_folder", turns(lambda out, device: runtime.open_graph(out, device)))
    assert gpu.apart("merged", subject, tmp_path / "one", "cpu") > gpu.expected("float32")


@pytest.mark.ort
def test_the_gpu_check_asks_only_for_what_there_is() -> None:
    """The whole grid, on the CPU: every row is equal."""
    rows = list(gpu.verified(["gpt2", "llama", "bert", "t5"], ["float32", "float16"], "cpu", lambda what: None))
    assert len(rows) == 77
    assert [row for row in rows if not row.equal] == []
