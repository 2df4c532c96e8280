"""onnxruntime: found, missing, installed twice; and the device that is really used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refpeft.export import runtime
from tests.export.graphs import traced


class FakeSession:
    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        self.asked = providers

    def get_providers(self) -> list[str]:
        return [runtime.CPU]


class FakeRuntime:
    """An onnxruntime-gpu on a machine whose GPU does not work: it offers CUDA and takes the CPU without a word."""

    InferenceSession = FakeSession
    preloaded = 0

    class SessionOptions:
        log_severity_level = 2

    @staticmethod
    def get_available_providers() -> list[str]:
        return [runtime.CUDA, runtime.CPU]

    @classmethod
    def preload_dlls(cls) -> None:
        cls.preloaded += 1


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


def test_cuda_is_tried_and_the_fallback_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "require", lambda: FakeRuntime)
    made = runtime.session(Path("model.onnx"))
    assert made.asked == [(runtime.CUDA, {"use_tf32": "0"}), runtime.CPU]
    assert FakeRuntime.preloaded == 1
    assert runtime.provider(made) == runtime.CPU
    assert runtime.session(Path("model.onnx"), "cpu").asked == [runtime.CPU]
    with pytest.raises(ValueError, match="fell back to CPU"):
        runtime.session(Path("model.onnx"), "cuda")


@pytest.mark.ort
def test_a_session_runs(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(traced(lambda x: x + 1, {"x": (np.float32, ("n",))}).SerializeToString())
    made = runtime.session(path, "cpu")
    assert runtime.provider(made) == runtime.CPU
    assert made.run(None, {"x": np.ones(3, np.float32)})[0].tolist() == [2, 2, 2]
