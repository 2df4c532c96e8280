"""How base weights are stored, apart from how is computed with them.

    --dtype      in the file                       computed in    a graph gets them by
    float32      float32                           float32
    float16      float16                           float16
    bfloat16     bfloat16                          float32        Cast
    int4         4 bits, of the layers' matrices   float32        MatMulNBits

What adapters bring is never rounded: of a merged model it is the merged weights that are. With int4, embeddings, norms,
biases and heads stay float32 (but for `head`); a matrix that a graph needs as such (DoRA's norm, a backward pass) is
dequantised there, and rows that are looked up are dequantised when they are found.

A checkpoint whose files are linked keeps the dtypes that it has, and the graph casts; int4 writes its matrices anew.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from refpeft.checkpoint.safetensors import Malformed
from refpeft.export import int4
from refpeft.export.int4 import Blocks, Packed
from refpeft.model import Model, Site
from refpeft.part import stored
from refpeft.tune import LINEAR

Array = np.ndarray[Any, Any]
Tensor = tuple[str, Array, np.dtype[Any]]  # name, numbers, dtype to store them in
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
DTYPES: Mapping[str, np.dtype[Any]] = {  # of arithmetic
    "float32": F32, "float16": np.dtype(np.float16), "bfloat16": F32, "int4": F32,
}  # fmt: skip
ADAPTERS = ("adapter.", "adapters.")  # how the names of what they bring begin
Q, S, Z = ".q4", ".scales", ".zero_points"  # behind the name of a matrix


@dataclass(frozen=True)
class Precision:
    name: str = "float32"
    blocks: Blocks | None = None  # of int4

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the base weights that are no blocks."""
        return BF16 if self.name == "bfloat16" else DTYPES[self.name]

    @property
    def exact(self) -> bool:
        """Are weights stored in the dtype that is computed in?"""
        return self.name in ("float32", "float16")


def precision(dtype: str, options: Mapping[str, Any] | None = None) -> Precision:
    """`options` of int4: size, zero_points, accuracy_level, head."""
    if dtype == "int4":
        return Precision(dtype, Blocks(**options or {}))
    if options:
        raise ValueError(f"block_size, zero_points, accuracy_level and head are of int4, and the dtype is {dtype}")
    return Precision(dtype)


def matrices(sites: Mapping[str, Site], blocks: Blocks | None) -> dict[str, str]:
    """What is stored in blocks: the matrices of linear layers, and the kind of each; the head only if that is asked."""
    if blocks is None:
        return {}
    chosen = {role: s for role, s in sites.items() if "layers." in role or (blocks.head and role == "head.out")}
    return {s.weight: s.kind for s in chosen.values() if s.kind in LINEAR}


def encoded(p: Precision, blocked: Mapping[str, str], tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as it is stored; what adapters bring, in the dtype that they have it in."""
    name, a, _ = tensor
    if name.startswith(ADAPTERS):
        yield tensor
        return
    if p.blocks is None or name not in blocked:
        yield name, a, p.dtype
        return
    packed = int4.quantise(stored(blocked[name], a), p.blocks)
    yield name + Q, packed.q, packed.q.dtype
    yield name + S, packed.s, packed.s.dtype
    if packed.z is not None:
        yield name + Z, packed.z, packed.z.dtype


def rounded(p: Precision, blocked: Mapping[str, str], name: str, a: Array) -> Array:
    """The numbers that a stored base tensor stands for."""
    if p.exact:
        return a
    if p.blocks is None or name not in blocked:
        low: Any = a.astype(p.dtype, copy=False)
        return np.asarray(low.astype(F32))
    W = stored(blocked[name], a)
    Ŵ: Array = stored(blocked[name], int4.dequantise(int4.quantise(W, p.blocks), W.shape[1]))
    return Ŵ


def as_stored(p: Precision, model: Model) -> Model:
    """The model that the stored weights make; each is rounded when it is asked for."""
    if p.exact:
        return model
    blocked = matrices(model.sites, p.blocks)
    return replace(model, params=Seen(model.params, lambda name, a: rounded(p, blocked, name, a)))


class Seen(Mapping[str, Array]):
    """Arrays by name, each through a function."""

    def __init__(self, arrays: Mapping[str, Array], f: Callable[[str, Array], Array]) -> None:
        self.arrays, self.f = arrays, f

    def __getitem__(self, name: str) -> Array:
        return self.f(name, self.arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def unpacked(found: Mapping[str, Array], name: str, kind: str, shape: tuple[int, ...]) -> Array | None:
    """A matrix among tensors that were read from a graph, if it is there in blocks."""
    q, s, z = (found.get(name + end) for end in (Q, S, Z))
    if q is None or s is None:
        return None
    o, i = shape if kind == "linear" else reversed(shape)
    n = s.shape[-1]
    fits = q.ndim == 3 and q.shape[:2] == s.shape == (o, n) and 0 <= 2 * q.shape[2] * n - i < 2 * q.shape[2]
    if not fits or q.dtype != np.uint8 or (z is not None and (z.shape != (o, (n + 1) // 2) or z.dtype != np.uint8)):
        raise Malformed(f"tensor {name + Q!r}: its blocks are not those of a matrix {[o, i]}")
    W: Array = stored(kind, int4.dequantise(Packed(q, s, z), i))
    return W
