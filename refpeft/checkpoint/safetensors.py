"""The safetensors format: a mapped reader and a writer.

A file is the length of its header (8 bytes, little-endian), the header (JSON: tensor name → dtype, shape, and where
its bytes begin and end after the header), and the tensors' bytes, little-endian, in C order, one after the other.

Reading maps the file and makes arrays of its pages: nothing is copied, and only what is looked at is ever read. The
header is not trusted: every number in it is checked against the others and against the size of the file. Writing takes
arrays however they lie in memory and stores them in C order.
"""

import json
import math
import mmap
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refpeft.ops import Array, is_half

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # as in the safetensors library


class Malformed(ValueError):  # noqa: N818, it names a state and reads as one
    """A file or folder that is not what it should be; the message is one sentence."""


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 120


def show(value: object) -> str:
    """Anything from a file, safe and short enough for a message of one line."""
    return " ".join(SHORT.repr(value).split())


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8, no key twice, no NaN or infinity."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise Malformed(f"{where}: the key {show(twice)} occurs twice")
        return found

    def no_constant(name: str) -> None:
        raise Malformed(f"{where}: {name} is not a JSON number")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except Malformed:
        raise
    except RecursionError:
        raise Malformed(f"{where}: the JSON is nested too deep") from None
    except ValueError as e:  # of the decoder, or a number of too many digits
        raise Malformed(f"{where}: not JSON in UTF-8 ({' '.join(str(e).split())[:120]})") from None
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected a JSON object, found {show(value)}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Malformed(f"{path.parent}: there is no {path.name}")
    return parse_json(path.read_bytes(), path.name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Keys in their order, since in a rank_pattern the first that matches wins."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Mapped(mmap.mmap):
    """A mapped file that knows which one it is."""

    path: Path


def read(path: Path) -> dict[str, Array]:
    """The tensors of a file by name: read-only views of the mapped file."""
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        start, header = read_header(path.name, f.read(8), size, f)
        places = {name: place(path.name, name, entry) for name, entry in header.items()}
        check_layout(path.name, places, size - start)
        mapped = Mapped(f.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.path = path
    return {name: view(mapped, *p, start) for name, p in places.items()}


def read_header(file: str, prefix: bytes, size: int, f: Any) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and the header without its metadata."""
    if len(prefix) < 8:
        raise Malformed(f"{file}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, LONGEST_HEADER):
        raise Malformed(f"{file}: the header should be {length} bytes long, in a file of {size} bytes")
    header = parse_json(f.read(length), f"{file}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed(f"{file}: header: __metadata__ must map names to strings")
    return 8 + length, header


Place = tuple[np.dtype[Any], tuple[int, ...], int, int]  # dtype, shape, begin, end


def place(file: str, name: str, entry: Any) -> Place:
    """One entry of the header, with its numbers in agreement."""
    where = f"{file}: tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"{where}: expected dtype, shape and data_offsets, found {show(entry)}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise Malformed(f"{where}: dtype must be one of {', '.join(DTYPES)}, found {show(kind)}")
    if not (isinstance(shape, list) and all(map(natural, shape))) or len(shape) > 32:
        raise Malformed(f"{where}: shape must be a list of natural numbers, found {show(shape)}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(natural, offsets))):
        raise Malformed(f"{where}: data_offsets must be two natural numbers, found {show(offsets)}")
    begin, end = offsets
    dtype = DTYPES[kind]
    need = math.prod(shape) * dtype.itemsize
    if end - begin != need:
        raise Malformed(
            f"{where}: {kind} {show(shape)} takes {show(need)} bytes, data_offsets give {show(end - begin)}"
        )
    return dtype, tuple(shape), begin, end


def natural(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63


def check_layout(file: str, places: Mapping[str, Place], size: int) -> None:
    """The tensors lie one after the other: no overlap, no hole, nothing behind the last."""
    at = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != at:
            what = "overlaps another one" if begin < at else "does not follow the one before it"
            raise Malformed(f"{file}: tensor {show(name)} {what}: it begins at {begin}, expected {at}")
        at = end
    if at != size:
        raise Malformed(f"{file}: the tensors take {at} bytes, but there are {size} after the header")


def view(mapped: mmap.mmap, dtype: np.dtype[Any], shape: tuple[int, ...], begin: int, end: int, start: int) -> Array:
    """The tensor in place; a copy only if the file has it at an address that its dtype does not allow."""
    if begin == end:
        return np.zeros(shape, dtype)
    little = dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype
    a: Array = np.ndarray(shape, little, buffer=mapped, offset=start + begin)
    return a if a.flags.aligned else a.copy()


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(path: Path, tensors: Mapping[str, Array]) -> None:
    """A file of these tensors."""
    with path.open("wb") as f:
        f.write(header_of(tensors))
        for name in in_order(tensors):
            a = np.ascontiguousarray(tensors[name])
            f.write(a.reshape(-1).view(np.uint8).data)


def in_order(tensors: Mapping[str, Array]) -> list[str]:
    """The widest dtype first, then by name, so that every one is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def header_of(tensors: Mapping[str, Array]) -> bytes:
    """What stands before the tensors' bytes: the length of the header, and the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers 4 refuses the file
    end = 0
    for name in in_order(tensors):
        a = tensors[name]
        begin, end = end, end + a.nbytes
        header[name] = {"dtype": dtype_name(name, a), "shape": list(a.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def size(tensors: Mapping[str, Array]) -> int:
    """How long the file would be."""
    return len(header_of(tensors)) + sum(int(a.nbytes) for a in tensors.values())


def dtype_name(name: str, a: Array) -> str:
    if a.dtype not in NAMES:
        raise Malformed(f"tensor {show(name)}: safetensors has no dtype {a.dtype}")
    return NAMES[a.dtype]


def fitting(file: str, tensors: Mapping[str, Array], name: str, shape: Sequence[int], dtype: Any) -> Array:
    """One of a file's tensors in the dtype wanted, if it is there, and floats of this shape."""
    where = f"{file}: tensor {name!r}"
    if name not in tensors:
        raise Malformed(f"{where} is missing")
    a = tensors[name]
    if a.shape != tuple(shape):
        raise Malformed(f"{where}: expected shape {list(shape)}, found {show(list(a.shape))}")
    if not (a.dtype.kind == "f" or is_half(a.dtype)):
        raise Malformed(f"{where}: expected a float dtype, found {a.dtype}")
    return a.astype(dtype, copy=False)


def take(file: str, rest: dict[str, Array], name: str, shape: Sequence[int], dtype: Any) -> Array:
    """The same, taken out of those that are left."""
    a = fitting(file, rest, name, shape, dtype)
    del rest[name]
    return a
