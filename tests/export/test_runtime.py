"""onnxruntime: found, missing, installed twice; and a session runs."""

from pathlib import Path

import numpy as np
import pytest

from refpeft.export import runtime
from tests.export.graphs import traced


def test_missing_runtime_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(runtime, "installed", list)
    with pytest.raises(ImportError, match=r"refpeft\[cpu\]' or 'refpeft\[gpu\]"):
        runtime.require()


def test_two_runtimes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "present", lambda name: True)
    assert runtime.installed() == ["onnxruntime", "onnxruntime-gpu"]
    with pytest.raises(ImportError, match="both installed and overwrite each other's files"):
        runtime.require()


def test_half_a_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed", list)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", lambda name: object())
    with pytest.raises(ImportError, match="installed only in part"):
        runtime.require()


@pytest.mark.ort
def test_a_session_runs(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(traced(lambda x: x + 1, {"x": (np.float32, ("n",))}).SerializeToString())
    made = runtime.session(path, "cpu")
    assert runtime.provider(made) == runtime.CPU
    assert made.run(None, {"x": np.ones(3, np.float32)})[0].tolist() == [2, 2, 2]


@pytest.mark.ort
def test_a_run_that_fails_is_one_sentence(tmp_path: Path) -> None:
    """Whatever onnxruntime raises, on a GPU that is full for example."""
    path = tmp_path / "model.onnx"
    path.write_bytes(traced(lambda x: x + 1, {"x": (np.float32, ("n",))}).SerializeToString())
    runner = runtime.open_graph(tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"onnxruntime cannot run it: .*float") as failed:
        runner.run({"x": np.ones(3)})
    assert "\n" not in str(failed.value)
