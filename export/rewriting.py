"""A traced graph, brought to how its weights are stored: it was traced as if all had the dtype that is computed in.

    stored in another dtype      Cast; of an embedding, only of the rows that are looked up
    stored in blocks of 4 bits   x Wᵀ becomes MatMulNBits; whatever else reads W gets (q − z) s

The rest of the graph is the same, node for node.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from refpeft.export import int4
from refpeft.export.form import Outputs
from refpeft.export.int4 import Blocks
from refpeft.export.precision import Q, S, Z
from refpeft.export.symbols import Graph, Node, Symbol, concatenate

U8 = np.dtype(np.uint8)
New = dict[Node, Symbol]
PRODUCT = "MatMulNBits"


@dataclass(frozen=True)
class Stored:
    """`tensors`: as they are stored; `blocked`: the kinds of those that are stored in blocks."""

    tensors: Mapping[str, TensorProto]
    blocked: Mapping[str, str]
    blocks: Blocks | None


def rewritten(graph: Graph, outputs: Outputs, weights: Stored) -> Outputs:
    new: New = {}
    for x in graph.live(outputs.values()):
        made = (rule(graph, x, new, weights) for rule in (product, weight, looked_up, again))
        new[x] = next(y for y in made if y is not None)
    return {name: new[y.node] for name, y in outputs.items()}


def again(graph: Graph, x: Node, new: New, weights: Stored) -> Symbol:
    """The node itself, or one like it where its arguments changed."""
    if all(a is None or new[a].node is a for a in x.args):
        return Symbol(graph, x)
    return graph.emit(x.op, [None if a is None else new[a] for a in x.args], x.dtype, x.shape, **x.attrs)


def weight(graph: Graph, x: Node, new: New, weights: Stored) -> Symbol | None:
    """A weight in the dtype that the graph was traced with, if it is stored otherwise."""
    if not x.op and x.name + Q in weights.tensors:
        return dequantised(graph, x, weights)
    stored = kept(graph, x, weights)
    return None if stored is None else stored.astype(x.dtype)


def looked_up(graph: Graph, x: Node, new: New, weights: Stored) -> Symbol | None:
    """Rows of a table that is stored in another dtype, or in blocks: cast, or dequantised, when they are found."""
    if x.op != "Gather" or x.args[0] is None or x.args[1] is None:
        return None
    if not x.args[0].op and x.args[0].name + Q in weights.tensors:
        return rows(graph, x.args[0], new[x.args[1]], weights)
    table = kept(graph, x.args[0], weights)
    if table is None:
        return None
    return graph.emit(x.op, (table, new[x.args[1]]), table.dtype, x.shape, **x.attrs).astype(x.dtype)


def kept(graph: Graph, x: Node, weights: Stored) -> Symbol | None:
    """A weight as it is stored, if that is in another dtype."""
    if x.op or x.name not in weights.tensors:
        return None
    dtype = helper.tensor_dtype_to_np_dtype(weights.tensors[x.name].data_type)
    return None if dtype == x.dtype else graph.stored(x.name, dtype, x.shape)


# ── blocks of 4 bits ─────────────────────────────────────────────────────────────────────────────────────────────────


def parts(graph: Graph, weights: Stored, *names: str) -> tuple[Symbol, Symbol, Symbol | None]:
    """q, s and z of a matrix, or of several, one below the other."""

    def part(end: str) -> Symbol | None:
        found = [weights.tensors[name + end] for name in names if name + end in weights.tensors]
        each = [graph.stored(t.name, helper.tensor_dtype_to_np_dtype(t.data_type), tuple(t.dims)) for t in found]
        return concatenate(graph, each) if len(each) > 1 else next(iter(each), None)

    q, s, z = map(part, (Q, S, Z))
    assert q is not None
    assert s is not None
    return q, s, z


def product(graph: Graph, x: Node, new: New, weights: Stored) -> Symbol | None:
    """x Wᵀ (+ c) with W in blocks, if the node is that. The operator adds a bias, and nothing that has rows."""
    names = multiplier(x, weights.blocked)
    if weights.blocks is None or not names or any(name + Q not in weights.tensors for name in names):
        return None
    q, s, z = parts(graph, weights, *names)
    y, *rest = (None if a is None else new[a] for a in x.args)
    assert y is not None
    α = x.attrs.get("alpha", 1)
    y = y if α == 1 else y * np.asarray(α, y.dtype)
    c = rest[1] if len(rest) == 2 else None
    bias = c if c is not None and c.ndim == 1 else None
    args: list[Symbol | None] = [y, q, s, z, None, bias]  # behind zero points an order of columns
    while args[-1] is None:
        args.pop()
    own = {"bits": 4, "block_size": weights.blocks.size, "accuracy_level": 1, "domain": "com.microsoft"}
    product = graph.emit(PRODUCT, args, x.dtype, x.shape, N=x.shape[-1], K=y.shape[-1], **own)
    return product if c is bias else product + c


def relevel(proto: ModelProto, level: int) -> None:
    """Products that a runtime may compute with activations of 8 bits, or must not."""
    for node in proto.graph.node:
        for attribute in node.attribute if node.op_type == PRODUCT else ():
            if attribute.name == "accuracy_level":
                attribute.i = level


def multiplier(x: Node, blocked: Mapping[str, str]) -> list[str]:
    """The name of W, or of all that it is made of, where the node is x Wᵀ: of a linear layer W is stored, of a Conv1D
    Wᵀ."""
    if x.op not in ("MatMul", "Gemm") or x.args[1] is None:
        return []
    right, flipped = x.args[1], bool(x.attrs.get("transB"))
    if right.op == "Transpose" and right.args[0] is not None and len(right.shape) == 2:
        right, flipped = right.args[0], not flipped
    stacked = right.op == "Concat" and right.attrs["axis"] == 0 and flipped
    below = [a for a in (right.args if stacked else [right]) if a is not None]
    fits = all(not a.op and a.name in blocked and flipped == (blocked[a.name] == "linear") for a in below)
    return [a.name for a in below] if fits else []


def dequantised(graph: Graph, x: Node, weights: Stored) -> Symbol:
    """W as a matrix."""
    q, s, z = parts(graph, weights, x.name)
    conv = weights.blocked[x.name] == "conv1d"
    middle = graph.constant(int4.MIDDLE, U8) if z is None else halves(z)[:, : s.shape[1], None]
    W: Symbol = int4.scaled(halves(q), middle, s)[:, : x.shape[0 if conv else 1]]
    return W.T if conv else W


def rows(graph: Graph, table: Node, ids: Symbol, weights: Stored) -> Symbol:
    """W[ids]"""
    q, s, z = (
        None if t is None else graph.emit("Gather", (t, ids), t.dtype, (*ids.shape, *t.shape[1:]), axis=0)
        for t in parts(graph, weights, table.name)
    )
    assert q is not None
    assert s is not None
    every = (slice(None),) * ids.ndim
    middle = graph.constant(int4.MIDDLE, U8) if z is None else halves(z)[(*every, slice(s.shape[-1]), None)]
    found: Symbol = int4.scaled(halves(q), middle, s)[(*every, slice(table.shape[-1]))]
    return found


def halves(packed: Symbol) -> Symbol:
    """int4.unpack"""
    g, shape = packed.graph, packed.shape
    low = g.emit("BitwiseAnd", (packed, g.constant(15, U8)), U8, shape)
    high = g.emit("BitShift", (packed, g.constant(4, U8)), U8, shape, direction="RIGHT")
    return concatenate(g, [low[..., None], high[..., None]], axis=-1).reshape(*shape[:-1], -1)
