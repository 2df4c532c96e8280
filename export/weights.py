"""The weights of an export, one tensor at a time: cast and written without ever holding two of them.

A checkpoint's arrays are maps of its files; what no adapter changes goes from file to file in blocks. Tensors keep
their names, their layout and, in the same dtype, their bytes; layers that share a tensor go on sharing it. Those that a
graph holds itself are put into its file from there, in blocks too: protobuf would need them in memory several times.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, StringStringEntryProto, TensorProto

from refpeft.export import linking
from refpeft.export.precision import BF16, F32, Precision, Tensor, matrices
from refpeft.export.proto import elem_type, tensor
from refpeft.model import Model
from refpeft.stream import merged

__all__ = ["DATA", "merged", "size", "store"]

Array = np.ndarray[Any, Any]
BLOCK = 4 << 20  # bytes that are cast or transposed at a time
PIECE = 1 << 20  # bytes that are copied at a time: they stay in the CPU's cache
ALIGN = 4096  # so that a runtime can map each tensor
DATA = "model.onnx.data"


def size(model: Model, p: Precision) -> int:
    """Bytes, about: adapters are small."""
    blocked = matrices(model.sites, p.blocks)
    share = 0.0 if p.blocks is None else 0.5 + F32.itemsize / p.blocks.size
    return int(sum(a.size * (share if name in blocked else p.dtype.itemsize) for name, a in model.params.items()))


def store(tensors: Iterable[Tensor], data: Path, frozen: Path | None = None) -> dict[str, TensorProto]:
    """The tensors, each in its dtype, their numbers in the file `data`. What lies in a file of the folder `frozen`
    stays there, in the dtype that it has, and the file is linked."""
    protos: dict[str, TensorProto] = {}
    linked: dict[str, Path] = {}
    with data.open("wb", buffering=0) as file:
        for name, array, dtype in tensors:
            at = None if frozen is None or (dtype == BF16 != array.dtype) else linking.place(array, frozen)
            if at is not None:
                linked[at[0].name] = at[0]
                protos[name] = external(name, array.shape, array.dtype, at[1], array.nbytes, at[0].name)
                continue
            if not array.size:  # a rank of 0: there is nothing to point at
                protos[name] = tensor(name, np.asarray(array, dtype))
                continue
            file.seek(-file.tell() % ALIGN, 1)
            offset = file.tell()
            source = linking.origin(array) if dtype == array.dtype else None
            for block in blocks(array, dtype) if source is None else pieces(*source, array.nbytes):
                write(file, block)
            protos[name] = external(name, array.shape, dtype, offset, file.tell() - offset)
    for original in linked.values():
        linking.link(original, data.parent)
    if frozen is not None and not linked:
        raise ValueError(
            f"{frozen}: none of its tensors can stay as it is, so there is nothing to link: --weights copy"
        )
    return protos


def inline(model: ModelProto, data: Path, out: Path) -> None:
    """The model as a file that holds the numbers which lie in `data`, as protobuf has them, with its fields in an order
    of their own."""
    rest, graph = ModelProto(), GraphProto()
    rest.CopyFrom(model)
    graph.CopyFrom(model.graph)
    rest.ClearField("graph")
    del graph.initializer[:]
    held = [(*whole(t), *span(t)) for t in model.graph.initializer]
    begin = graph.SerializeToString()
    length = len(begin) + sum(len(field(INITIALIZER, n)) + n for _, n, *_ in held)
    with out.open("wb") as file:
        file.write(rest.SerializeToString() + field(GRAPH, length) + begin)
        for head, n, offset, size in held:
            file.write(field(INITIALIZER, n) + head)
            for block in pieces(data, offset, size):
                file.write(block.data)


GRAPH, INITIALIZER, RAW = 7, 5, 9  # fields of ModelProto, GraphProto and TensorProto


def whole(t: TensorProto) -> tuple[bytes, int]:
    """A tensor's bytes before those of its numbers, if these lie elsewhere, and how many it has with them."""
    if not t.external_data:
        head = t.SerializeToString()
        return head, len(head)
    own = TensorProto(name=t.name, data_type=t.data_type, dims=t.dims)
    _, size = span(t)
    head = own.SerializeToString() + field(RAW, size)
    return head, len(head) + size


def span(t: TensorProto) -> tuple[int, int]:
    """Where its numbers lie, if not within it: offset and length."""
    said = {e.key: e.value for e in t.external_data}
    return int(said.get("offset", 0)), int(said.get("length", 0))


def field(number: int, length: int) -> bytes:
    """What stands before bytes in protobuf: which field they are, and how many."""
    found, n = bytearray([number << 3 | 2]), length
    while n > 127:
        found.append(n & 127 | 128)
        n >>= 7
    return bytes([*found, n])


def write(file: Any, block: Array) -> None:
    """An unbuffered file may take less than it is given."""
    rest = block.reshape(-1).view(np.uint8).data
    while len(rest):
        rest = rest[file.write(rest) :]


def pieces(path: Path, start: int, size: int) -> Iterator[Array]:
    """Bytes of a file, in one small piece of memory: to read them into that is quicker than to map them."""
    buffer = np.empty(min(size, PIECE), np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while size:
            n = file.readinto(buffer[:size].data)
            if not n:
                raise OSError(f"{path} was cut short while it was read")
            size -= n
            yield buffer[:n]


def blocks(array: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    """The array row by row, in pieces of about BLOCK bytes, contiguous and in `dtype`."""
    table = array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)
    step = max(1, BLOCK // max(1, table.shape[1] * table.dtype.itemsize))
    for start in range(0, len(table), step):
        yield np.ascontiguousarray(table[start : start + step], dtype)


def external(
    name: str, shape: Sequence[int], dtype: np.dtype[Any], offset: int, length: int, location: str = DATA
) -> TensorProto:
    where: Mapping[str, Any] = {"location": location, "offset": offset, "length": length}
    return TensorProto(
        name=name,
        data_type=elem_type(dtype),
        dims=shape,
        data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key=k, value=str(v)) for k, v in where.items()],
    )
