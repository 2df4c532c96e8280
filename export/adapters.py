"""onnxruntime's adapter files: named tensors, mapped from disk, which a run takes as inputs besides those it is given.

Any optional input of a graph can come from one, so they hold every method. `refpeft.export.runtime` runs with them.

Such a file has a number for the version of its model. Ours is drawn from the base model's numbers: two models of the
same shape differ in it, which names and shapes would not tell. 1, which others write, says nothing.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.checkpoint import safetensors
from refpeft.export import runtime

Array = np.ndarray[Any, Any]


UNSAID = 1


def write(path: str | os.PathLike[str], tensors: Mapping[str, Array], base: int = UNSAID) -> None:
    """onnxruntime's format; or safetensors, if the name says so, for runtimes that are fed the tensors themselves."""
    if str(path).endswith(".safetensors"):
        safetensors.write(Path(path), tensors)
        return
    ort = runtime.require()
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(base)
    held = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for n, a in tensors.items()}
    file.set_parameters(held)
    try:
        file.export_adapter(str(path))
    except RuntimeError:
        raise OSError(errno.EIO, "onnxruntime could not write it; is the disk full?", str(path)) from None


def read(path: str | os.PathLike[str], base: int = UNSAID) -> dict[str, Array]:
    """Its tensors, copied: those of onnxruntime point into the file, and end with its reader. `base`: of the model that
    they must be for."""
    ort = runtime.require()
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
    except RuntimeError:
        raise ValueError(f"{path}: not an adapter file of onnxruntime") from None
    if UNSAID not in (base, found := file.get_model_version()) and found != base:
        raise ValueError(f"{path} is for another base model than this graph's, or for other roundings of its weights")
    return {name: value.numpy().copy() for name, value in file.get_parameters().items()}
