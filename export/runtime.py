"""onnxruntime: which one is installed, and on which device a session really runs."""

import importlib
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

WHEELS = ("onnxruntime", "onnxruntime-gpu")
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def installed() -> list[str]:
    return [name for name in WHEELS if present(name)]


def present(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def require() -> Any:
    """The module onnxruntime, or one sentence saying what to install."""
    if len(installed()) > 1:
        raise ImportError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall both, then install one of them, refpeft[cpu] or refpeft[gpu]"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise ImportError("running a graph needs onnxruntime: pip install 'refpeft[cpu]' or 'refpeft[gpu]'")
    onnxruntime = importlib.import_module("onnxruntime")
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ImportError("onnxruntime is installed only in part: pip install --force-reinstall 'refpeft[cpu]'")
    return onnxruntime


def session(path: Path, device: str | None = None) -> Any:
    """A session on CUDA where onnxruntime offers it and it works, else on the CPU; `device` ('cuda', 'cpu') insists.

    onnxruntime falls back to the CPU without a word, so what it really took is looked up. TF32 is off: float32 means
    float32.
    """
    ort = require()
    offered = CUDA in ort.get_available_providers()
    if device == "cuda" and not offered:
        raise ValueError("CUDA was asked for, which this onnxruntime does not offer: pip install 'refpeft[gpu]'")
    cuda = offered and device != "cpu"
    if cuda and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries from the nvidia wheels, where those are installed
    options = ort.SessionOptions()
    options.log_severity_level = 3 if device else 4  # falling back is no error unless CUDA was asked for
    made = ort.InferenceSession(str(path), options, [(CUDA, {"use_tf32": "0"}), CPU] if cuda else [CPU])
    if device == "cuda" and provider(made) != CUDA:
        raise ValueError(f"CUDA was asked for, and onnxruntime fell back to {provider(made)}")
    return made


def provider(made: Any) -> str:
    return str(made.get_providers()[0])
