"""onnxruntime's adapter files: named tensors, mapped from disk, which a run takes as inputs besides those it is given.

Any optional input of a graph can come from one, so they hold every method. `refpeft.export.runtime` runs with them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.checkpoint import safetensors
from refpeft.export import runtime

Array = np.ndarray[Any, Any]


def write(path: str | os.PathLike[str], tensors: Mapping[str, Array]) -> None:
    """onnxruntime's format; or safetensors, if the name says so, for runtimes that are fed the tensors themselves."""
    if str(path).endswith(".safetensors"):
        safetensors.write(Path(path), tensors)
        return
    ort = runtime.require()
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    held = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for n, a in tensors.items()}
    file.set_parameters(held)
    file.export_adapter(str(path))


def read(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Its tensors, copied: those of onnxruntime point into the file, and end with its reader."""
    ort = runtime.require()
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
    except RuntimeError:
        raise ValueError(f"{path}: not an adapter file of onnxruntime") from None
    return {name: value.numpy().copy() for name, value in file.get_parameters().items()}
