"""The tensors of an ONNX file by name, read without running or trusting anything in it.

Numbers that lie beside the graph are mapped. Where a graph may point is narrow: to a plain file in its own folder or
below, no `..`, no absolute path, no link that leads out; to bytes that are there, as many as the shape needs; two
tensors share all of their bytes or none.
"""

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from refpeft.checkpoint.safetensors import Malformed, show

Array = np.ndarray[Any, Any]

DTYPES: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("<f4"),
    TensorProto.DOUBLE: np.dtype("<f8"),
    TensorProto.FLOAT16: np.dtype("<f2"),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.INT64: np.dtype("<i8"),
    TensorProto.INT32: np.dtype("<i4"),
    TensorProto.INT16: np.dtype("<i2"),
    TensorProto.INT8: np.dtype("i1"),
    TensorProto.UINT64: np.dtype("<u8"),
    TensorProto.UINT32: np.dtype("<u4"),
    TensorProto.UINT16: np.dtype("<u2"),
    TensorProto.UINT8: np.dtype("u1"),
    TensorProto.BOOL: np.dtype("?"),
}
Span = tuple[int, int, str]  # begin, end, tensor


def read(path: Path) -> dict[str, Array]:
    """Initialisers, and the values of Constant nodes by the names of their outputs."""
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise Malformed(f"{path.name}: not an ONNX model") from None
    if not model.HasField("graph"):
        raise Malformed(f"{path.name}: not an ONNX model, it has no graph")
    found: dict[str, Array] = {}
    spans: dict[Path, list[Span]] = {}
    for name, proto in tensors(model):
        if name in found:
            raise Malformed(f"{path.name}: there are two tensors {show(name)}")
        if proto.data_type in DTYPES:  # others, 8-bit floats or strings, are no weights that could be compared
            found[name] = tensor(path, name, proto, spans)
    for proto in every(model):
        if proto.data_location == TensorProto.EXTERNAL:
            inside(path, f"{path.name}: tensor {show(text(proto.name))}", located(proto).get("location", ""))
    for file, where in spans.items():
        check_overlap(file, where)
    return found


def tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    for t in model.graph.initializer:
        yield text(t.name), t
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" and node.output else ():
            if attribute.name == "value" and attribute.HasField("t"):
                yield text(node.output[0]), attribute.t


def every(model: ModelProto) -> Iterator[TensorProto]:
    """All tensors, those of other dtypes, of subgraphs, functions and attributes too."""
    yield from within(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from attributes(node)


def within(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from attributes(node)


def attributes(node: NodeProto) -> Iterator[TensorProto]:
    for a in node.attribute:
        yield from (a.t, *a.tensors)
        for sparse in (a.sparse_tensor, *a.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (a.g, *a.graphs) if a.HasField("g") or a.graphs else ():
            yield from within(graph)


def located(proto: TensorProto) -> dict[str, str]:
    return {text(entry.key): text(entry.value) for entry in proto.external_data}


def tensor(model: Path, name: str, proto: TensorProto, spans: dict[Path, list[Span]]) -> Array:
    where = f"{model.name}: tensor {show(name)}"
    if len(proto.dims) > 32 or any(d < 0 for d in proto.dims):
        raise Malformed(f"{where}: dims must be natural numbers, found {show(list(proto.dims))}")
    dtype, shape = DTYPES[proto.data_type], tuple(proto.dims)
    need = math.prod(shape) * dtype.itemsize
    if proto.data_location == TensorProto.EXTERNAL:
        return beside(model, where, name, proto, dtype, shape, spans)
    if proto.HasField("raw_data"):
        if len(proto.raw_data) != need:
            raise Malformed(f"{where}: {show(list(shape))} takes {show(need)} bytes, found {len(proto.raw_data)}")
        return np.frombuffer(proto.raw_data, dtype).reshape(shape)
    try:
        return np.asarray(numpy_helper.to_array(proto)).astype(dtype, copy=False).reshape(shape)
    except (ValueError, TypeError, OverflowError, MemoryError):
        raise Malformed(f"{where}: its numbers do not fill the shape {show(list(shape))}") from None


def beside(
    model: Path,
    where: str,
    name: str,
    proto: TensorProto,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    spans: dict[Path, list[Span]],
) -> Array:
    """A tensor in another file, mapped."""
    said = located(proto)
    file = inside(model, where, said.get("location", ""))
    size = file.stat().st_size
    offset = natural(where, "offset", said.get("offset", "0"))
    need = math.prod(shape) * dtype.itemsize
    length = natural(where, "length", said.get("length", str(need)))
    if length != need:
        raise Malformed(f"{where}: {show(list(shape))} takes {show(need)} bytes, external_data gives {show(length)}")
    if offset + length > size:
        raise Malformed(f"{where}: it should end at byte {offset + length} of {file.name}, which has {size}")
    if not need:
        return np.zeros(shape, dtype)
    spans.setdefault(file, []).append((offset, offset + length, name))
    raw = np.memmap(file, np.uint8, "r", offset, (need,))
    a: Array = np.ndarray(shape, dtype, buffer=raw)
    return a if a.flags.aligned else a.copy()


def inside(model: Path, where: str, location: str) -> Path:
    """The file, which must be in the folder of the model."""
    if not location or not location.isprintable():
        raise Malformed(f"{where}: external_data must name a file, found {show(location)}")
    path = PurePosixPath(location)
    windows = PureWindowsPath(location)
    if path.is_absolute() or windows.drive or windows.root or ".." in (*path.parts, *windows.parts):
        raise Malformed(f"{where}: external_data must lie in the model's folder, found {show(location)}")
    folder = model.parent.resolve()
    file = folder / path
    if not file.is_file():
        raise Malformed(f"{where}: its file {show(location)} is missing")
    if not file.resolve().is_relative_to(folder):
        raise Malformed(f"{where}: its file {show(location)} is a link that leaves the model's folder")
    return file


def text(value: str | bytes) -> str:
    """Protobuf hands out what is not UTF-8 as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def natural(where: str, what: str, digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise Malformed(f"{where}: external_data {what} must be a natural number, found {show(digits)}")
    return int(digits)


def check_overlap(file: Path, spans: list[Span]) -> None:
    """Tensors share all of their bytes or none."""
    last = (0, 0, "")
    for span in sorted(set(spans), key=lambda s: s[:2]):
        if span[0] < last[1] and span[:2] != last[:2]:
            raise Malformed(f"{file.name}: tensors {show(last[2])} and {show(span[2])} overlap in part")
        last = span if span[1] >= last[1] else last
