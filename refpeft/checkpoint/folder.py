"""Folders: the tensors of an HF folder, and writing a folder whole or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refpeft.checkpoint.safetensors import Malformed, read, read_json, show
from refpeft.ops import Array

CONVERT = (
    "only safetensors files are read, since pickle can run any code: convert it with "
    "`from_pretrained({folder!r}).save_pretrained(new_folder, safe_serialization=True)` of the library that wrote it"
)


def tensors(folder: Path, stem: str, convert: str = CONVERT) -> dict[str, Array]:
    """All tensors of `<stem>.safetensors`, or of the files that `<stem>.safetensors.index.json` lists. `convert` says
    how to get these where there is a pickle."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return read(single)
    if index.is_file():
        return sharded(folder, index)
    for pickle in sorted(
        [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin.index.json")]
    ):
        raise Malformed(f"{pickle.name}: " + convert.format(folder=str(folder)))
    raise Malformed(f"{folder}: there is no {single.name}")


def sharded(folder: Path, index: Path) -> dict[str, Array]:
    """The files of an index, which must agree with it on what is where."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise Malformed(f"{index.name}: weight_map must map tensor names to file names")
    found: dict[str, Array] = {}
    for file in sorted(set(where.values())):
        if not plain(file):
            raise Malformed(f"{index.name}: {show(file)} is not the name of a safetensors file in this folder")
        if not (folder / file).is_file():
            raise Malformed(f"{index.name}: it lists {show(file)}, which is missing")
        for name, a in read(folder / file).items():
            if where.get(name) != file:
                raise Malformed(f"{file}: tensor {show(name)} is here, but {index.name} says {show(where.get(name))}")
            found[name] = a
    if missing := sorted(where.keys() - found.keys()):
        raise Malformed(f"{where[missing[0]]}: tensor {show(missing[0])} is missing, though {index.name} lists it")
    return found


def plain(file: str) -> bool:
    """A bare file name: no way out of the folder."""
    return file.endswith(".safetensors") and file.isprintable() and not any(c in file for c in "/\\:")


def existing(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise Malformed(f"{folder}: no such folder")
    return folder


@contextmanager
def new_folder(path: str | os.PathLike[str], needs: int = 0) -> Iterator[Path]:
    """A folder to write into, which takes its name when all is written; if anything fails, nothing is left.

    `needs`: the bytes that will be written at least; where they do not fit, nothing is begun.
    """
    target = Path(path).absolute()
    check_free(target)
    left = shutil.disk_usage(target.parent).free
    if left < needs:
        raise OSError(f"{path}: needs {needs / 1e6:,.0f} MB, and {target.parent} has {left / 1e6:,.0f} MB left")
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        work.mkdir()
        yield work
        work.rename(target)
    except OSError as e:
        if e.filename and not Path(os.fsdecode(e.filename)).is_relative_to(work):
            raise  # not about what is written here
        why = "no space is left on the device" if e.errno == errno.ENOSPC else e.strerror or str(e)
        raise OSError(f"{path}: could not be written: {why}") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same of a file."""
    target = Path(path).absolute()
    part = target.with_name(f".{uuid.uuid4().hex[:8]}.{target.name}")
    try:
        yield part
        part.rename(target)
    except OSError as e:
        why = "no space is left on the device" if e.errno == errno.ENOSPC else e.strerror or str(e)
        raise OSError(f"{path}: could not be written: {why}") from e
    finally:
        part.unlink(missing_ok=True)


def check_free(target: Path) -> None:
    if not target.parent.is_dir():
        raise Malformed(f"{target}: the folder {target.parent} does not exist")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise Malformed(f"{target}: exists already, and nothing is overwritten")
