"""Weights that stay where they are: a graph that points into the checkpoint's own files.

onnxruntime follows no path and no symbolic link out of the graph's folder, so the files are in it too, as hard links:
one file under two names. Where a file system has none, they are cloned (FICLONE), which shares the blocks as well.
"""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.checkpoint.safetensors import Mapped

Array = np.ndarray[Any, Any]
FICLONE = 0x40049409


def origin(a: Array) -> tuple[Path, int] | None:
    """The file whose bytes the array is, and where in it they begin; None if it is no such thing."""
    base: Any = a
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, Mapped) or not a.flags.c_contiguous or not a.size:
        return None
    start = np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    return base.path, a.__array_interface__["data"][0] - start


def place(a: Array, folder: Path) -> tuple[Path, int] | None:
    """The same, if the file is in this folder."""
    found = origin(a)
    return found if found is not None and found[0].parent.resolve() == folder.resolve() else None


def link(file: Path, folder: Path) -> None:
    """The file in this folder too, without a copy."""
    real, new = file.resolve(), folder / file.name  # links of links are no hard links
    try:
        os.link(real, new)
    except OSError as error:
        if cloned(real, new):
            return
        why = "it lies on another device" if error.errno == errno.EXDEV else (error.strerror or str(error)).lower()
        raise ValueError(
            f"{file} cannot be linked into {folder.parent}: {why} (--weights copy copies what is needed)"
        ) from None


def cloned(file: Path, new: Path) -> bool:
    """Blocks shared by two files, where the file system can do that."""
    try:
        import fcntl

        with file.open("rb") as source, new.open("wb") as target:
            fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
    except (OSError, ImportError):
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        return False
    return True
