"""The weights of an export, one tensor at a time: merged, cast and written without ever holding two of them.

A checkpoint's arrays are maps of its files; what no adapter changes goes from map to file in blocks. Tensors keep their
names, their layout and, in the same dtype, their bytes; layers that share a tensor go on sharing it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import StringStringEntryProto, TensorProto

from refpeft.adapter import Adapter
from refpeft.export.proto import elem_type, tensor
from refpeft.model import Model, Site
from refpeft.part import Part, make, stored
from refpeft.tune import merged_part, substituted, untied

Array = np.ndarray[Any, Any]
BLOCK = 4 << 20  # bytes that are cast or transposed at a time
ALIGN = 4096  # so that a runtime can map each tensor
DATA = "model.onnx.data"


def merged(model: Model, adapters: Sequence[Adapter], sites: dict[str, Site]) -> Iterator[tuple[str, Array]]:
    """Name and value of every tensor of the merged model, as `refpeft.merge` gives it. `sites` is brought up to date:
    a tied layer of which one side changed gets a tensor of its own."""
    model, adapters = substituted(model, adapters)
    params = dict(model.params)
    written: set[str] = set()
    for role in model.sites:
        old = in_float32(model.part(role))
        W, b = merged_part(adapters, old)
        if W is not old.W:
            sites |= untied(sites, params, role)
            yield from once(written, sites[role].weight, stored(old.kind, W))
        if b is not None and b is not old.b:
            yield from once(written, sites[role].bias, b)
    for site in sites.values():
        for name in (site.weight, site.bias):
            if name in params:
                yield from once(written, name, params[name])


def in_float32(part: Part) -> Part:
    """16-bit weights are merged in float32: what comes out is rounded once, to the dtype of the graph."""
    if part.W.dtype.itemsize != 2:
        return part
    W, b = part.W.astype(np.float32), None if part.b is None else part.b.astype(np.float32)
    return make(part.path, part.kind, W, b, part.W_key, part.b_key, part.eps)


def once(written: set[str], name: str, array: Array) -> Iterator[tuple[str, Array]]:
    if name not in written:
        written.add(name)
        yield name, array


def size(model: Model, dtype: np.dtype[Any]) -> int:
    return sum(int(a.size) for a in model.params.values()) * dtype.itemsize


def store(tensors: Iterator[tuple[str, Array]], dtype: np.dtype[Any], data: Path | None) -> dict[str, TensorProto]:
    """The tensors in `dtype`: their numbers in the file `data`, or within the protos if there is none."""
    if data is None:
        return {name: tensor(name, np.asarray(array, dtype)) for name, array in tensors}
    protos = {}
    with data.open("wb", buffering=0) as file:
        for name, array in tensors:
            file.seek(-file.tell() % ALIGN, 1)
            offset = file.tell()
            for block in blocks(array, dtype):
                write(file, block)
            protos[name] = external(name, array.shape, dtype, offset, file.tell() - offset)
    return protos


def write(file: Any, block: Array) -> None:
    """An unbuffered file may take less than it is given."""
    rest = block.reshape(-1).view(np.uint8).data
    while len(rest):
        rest = rest[file.write(rest) :]


def blocks(array: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    """The array row by row, in pieces of about BLOCK bytes, contiguous and in `dtype`."""
    table = array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)
    step = max(1, BLOCK // max(1, table.shape[1] * table.dtype.itemsize))
    for start in range(0, len(table), step):
        yield np.ascontiguousarray(table[start : start + step], dtype)


def external(name: str, shape: Sequence[int], dtype: np.dtype[Any], offset: int, length: int) -> TensorProto:
    where: Mapping[str, Any] = {"location": DATA, "offset": offset, "length": length}
    return TensorProto(
        name=name,
        data_type=elem_type(dtype),
        dims=shape,
        data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key=k, value=str(v)) for k, v in where.items()],
    )
