"""Symbols: arrays without numbers that write an ONNX graph while NumPy code computes with them.

A symbol implements NumPy's own dispatch (`__array_ufunc__`, NEP 13; `__array_function__`, NEP 18), so the very lines of
the specification run on it, and every step becomes a node:

    graph = Graph()
    x = graph.input("x", np.float32, ("batch", 4))
    y = np.exp(x) / np.exp(x).sum(-1, keepdims=True)        # four nodes: the second exp is the first

Sizes are ints, or polynomials in sizes that are known only when the graph runs (`Dim`: batch, past + sequence). What
consists of NumPy arrays alone is computed by NumPy and enters as a constant where it meets a symbol. Equal nodes are
made once, double transposes (across a concatenation too) and reshapes of reshapes vanish, and what no output needs is
left out (`Graph.live`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from refpeft.export.sizes import Dim, Shape, Size, broadcast, complete, product_shape, total
from refpeft.export.solving import solve

DType = np.dtype[Any]
INT = np.dtype(np.int64)
END = np.iinfo(np.int64).max
BOOL = np.dtype(np.bool_)


@dataclass(frozen=True, eq=False)
class Node:
    """`name` = op(args, attrs); op is "" for inputs and weights, "Constant" for constants."""

    name: str
    op: str
    args: "tuple[Node | None, ...]"
    attrs: Mapping[str, Any]
    dtype: DType
    shape: Shape


@dataclass(frozen=True)
class Branch:
    """One node, as an attribute of an If: `args` are places among the If's own, the first of which goes into it."""

    op: str
    args: tuple[int, ...]
    attrs: tuple[tuple[str, Any], ...] = ()


class Graph:
    """The nodes in the order in which they were made."""

    def __init__(self, rules: Mapping[str, Callable[..., Any]] | None = None) -> None:
        self.rules = rules or {}  # ops of the specification that have a node of their own
        self.sizes: dict[str, tuple[Symbol, int]] = {}
        self.made: dict[Any, Node] = {}

    def input(
        self,
        name: str,
        dtype: Any,
        shape: Sequence[Size | str],
        shown: Sequence[Size | str] | None = None,
        loose: bool = False,
    ) -> "Symbol":
        """An input, or a weight. A str in its shape names a size; the first input that has it tells its value. A size
        may also be one that other inputs tell. `shown`: the shape as a model's signature has it, if that is another.
        `loose`: where it is empty, other sizes may differ."""
        dims = tuple(Dim(self, {(d,): 1}) if isinstance(d, str) else d for d in shape)
        self.made[name] = Node(
            name, "", (), {"shown": shape if shown is None else shown, "loose": loose}, np.dtype(dtype), dims
        )
        x = Symbol(self, self.made[name])
        for axis, d in enumerate(shape):
            if isinstance(d, str):
                self.sizes.setdefault(d, (x, axis))
        return x

    def stored(self, name: str, dtype: DType, shape: Shape) -> "Symbol":
        """A weight as it is stored, beside the one of its name that was traced: the same node wherever it is read."""
        node = self.made.setdefault((name, dtype), Node(name, "", (), {"shown": shape}, dtype, shape))
        return Symbol(self, node)

    def tell(self, inputs: "Sequence[Symbol]") -> None:
        """From here on these inputs tell the sizes that they have, the first of them that has one: where a graph is
        made of them alone, no other input is there to ask."""
        told: dict[str, tuple[Symbol, int]] = {}
        for x in inputs:
            for axis, d in enumerate(x.shape):
                if isinstance(d, Dim) and d.name:
                    told.setdefault(d.name, (x, axis))
        self.sizes |= told

    def constant(self, value: Any, dtype: Any) -> "Symbol":
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.dtype, array.shape)
        return self.node(key, "Constant", (), {"value": array}, array.dtype, array.shape)

    def emit(
        self, op: str, args: Sequence["Symbol | None"], dtype: Any, shape: Iterable[Size], **attrs: Any
    ) -> "Symbol":
        nodes = tuple(a.node if a is not None else None for a in args)
        return self.node((op, nodes, tuple(attrs.items())), op, nodes, attrs, np.dtype(dtype), tuple(shape))

    def node(self, key: Any, op: str, *fields: Any) -> "Symbol":
        if key not in self.made:
            self.made[key] = Node(f"{op}_{len(self.made)}", op, *fields)
        return Symbol(self, self.made[key])

    def output(self, x: "Symbol", index: int, dtype: Any, shape: Iterable[Size]) -> "Symbol":
        """Another output of x's node than the first."""
        key = ("", x.node, index)
        return self.node(key, "Output", (x.node,), {"index": index}, np.dtype(dtype), tuple(shape))

    def ints(self, sizes: Sequence[Size]) -> "Symbol":
        """Sizes as an int64 symbol of shape [n]."""
        if not any(isinstance(d, Dim) for d in sizes):
            return self.constant(sizes, INT)
        parts = [d.tensor() if isinstance(d, Dim) else self.constant([d], INT) for d in sizes]
        return parts[0] if len(parts) == 1 else self.emit("Concat", parts, INT, (len(parts),), axis=0)

    def live(self, outputs: Iterable["Symbol"]) -> list[Node]:
        """What the outputs are computed from, in an order in which it can be computed."""
        needed: set[Node] = set()
        todo = [y.node for y in outputs]
        while todo:
            x = todo.pop()
            if x not in needed:
                needed.add(x)
                todo += [a for a in x.args if a is not None]
        return [x for x in self.made.values() if x in needed]


class Symbol(NDArrayOperatorsMixin):
    """An array of known dtype and shape whose numbers a node of the graph will compute.

    Writing into a symbol (`y += x`, `out=y`) lets it stand for another node; it shares no memory with what it was made
    from, so a write does not show through a reshape or a slice.
    """

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError(f"the value of {self.node.name} is not known before the graph runs")

    def __iter__(self) -> Any:
        raise TypeError(f"{self.node.name} cannot be iterated over")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotImplementedError("writing into a part of an array cannot be exported")

    def __repr__(self) -> str:
        return f"Symbol({self.node.name}, {self.dtype}, [{', '.join(map(str, self.shape))}])"

    def __op__(self, name: str, args: Sequence[Any], options: Mapping[str, Any], y: "Symbol") -> "Symbol":
        """The answer to an op of the specification: its own node if there is a rule, else the formula as traced."""
        rule = self.graph.rules.get(name)
        return y if rule is None else rule(*args, **options)

    def source(self, *ops: str) -> "Symbol | None":
        """What this is the Transpose, Reshape, … of, if it is one."""
        x = self.node.args[0] if self.node.op in ops else None
        return None if x is None else Symbol(self.graph, x)

    # ── attributes and methods of an array ───────────────────────────────────────────────────────────────────────────

    @property
    def dtype(self) -> DType:
        return self.node.dtype

    @property
    def shape(self) -> Shape:
        return self.node.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def real(self) -> "Symbol":
        return self

    @property
    def T(self) -> "Symbol":
        return self.transpose(*reversed(range(self.ndim)))

    def swapaxes(self, i: int, j: int) -> "Symbol":
        perm = list(range(self.ndim))
        perm[i], perm[j] = perm[j], perm[i]
        return self.transpose(*perm)

    def transpose(self, *perm: int) -> "Symbol":
        x = self.source("Transpose")
        if x is None:
            x = self
        else:
            perm = tuple(self.node.attrs["perm"][p] for p in perm)
        if perm == tuple(range(x.ndim)):
            return x
        if x.node.op == "Concat" and any(a is not None and undone(a, perm) for a in x.node.args):
            parts = [Symbol(self.graph, a).transpose(*perm) for a in x.node.args if a is not None]
            return concatenate(self.graph, parts, perm.index(x.node.attrs["axis"]))
        return self.graph.emit("Transpose", (x,), x.dtype, (x.shape[p] for p in perm), perm=perm)

    def reshape(self, *sizes: Any) -> "Symbol":
        whole = self.source("Reshape", "Unsqueeze")
        x = self if whole is None else whole
        shape = complete(x.shape, sizes[0] if isinstance(sizes[0], tuple | list) else sizes)
        if shape == x.shape:
            return x
        # ONNX: 0 copies the size at this place, −1 is what remains; only if that is not enough are sizes computed
        spec: list[Size] = [
            0 if k < x.ndim and isinstance(d, Dim) and d == x.shape[k] else d for k, d in enumerate(shape)
        ]
        unknown = [k for k, d in enumerate(spec) if isinstance(d, Dim)]
        empty = [k for k, d in enumerate(shape) if isinstance(d, Dim) and not d.least()]
        free = [k for k in unknown if k in empty] or unknown
        if free and set(empty) - {free[0]}:  # beside an axis of no places there is nothing to tell −1 by
            return self.graph.emit("Reshape", (x, self.graph.ints(shape)), x.dtype, shape, allowzero=1)
        if free:
            spec[free[0]] = -1
        return self.graph.emit("Reshape", (x, self.graph.ints(spec)), x.dtype, shape)

    def astype(self, dtype: Any, copy: bool = True) -> "Symbol":
        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else self.graph.emit("Cast", (self,), dtype, self.shape, to=dtype)

    def expand(self, *shape: Size) -> "Symbol":
        """np.broadcast_to"""
        return (
            self
            if shape == self.shape
            else self.graph.emit("Expand", (self, self.graph.ints(shape)), self.dtype, shape)
        )

    def sum(self, axis: Any = None, keepdims: bool = False) -> "Symbol":
        return reduced(np.add, self, axis, keepdims)

    def mean(self, axis: int) -> Any:
        return self.sum(axis) / self.shape[axis]

    def max(self, axis: Any = None, keepdims: bool = False) -> "Symbol":
        return reduced(np.maximum, self, axis, keepdims)

    def __getitem__(self, index: Any) -> "Symbol":
        if isinstance(index, Symbol):
            return self.graph.emit("Gather", (self, index), self.dtype, index.shape + self.shape[1:], axis=0)
        return indexed(self, index if isinstance(index, tuple) else (index,))

    # ── NumPy's dispatch ─────────────────────────────────────────────────────────────────────────────────────────────

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if method == "reduce" and ufunc in REDUCTIONS:
            return reduced(ufunc, *inputs, **options)
        if method == "at" and ufunc is np.add:
            return scatter_add(*inputs)
        (out,) = options.pop("out", (None,))
        if method != "__call__" or options or ufunc.__name__ not in UFUNCS:
            raise NotImplementedError(f"np.{ufunc.__name__} ({method}) cannot be exported")
        y = elementwise(self.graph, ufunc, inputs)
        return y if out is None else write(out, y)

    def __array_function__(self, f: Callable[..., Any], types: Any, args: Any, options: Any) -> Any:
        if f not in FUNCTIONS:
            raise NotImplementedError(f"np.{f.__name__} cannot be exported")
        return FUNCTIONS[f](self.graph, *args, **options)


def undone(x: Node, perm: Sequence[int]) -> bool:
    """Is this a transpose that the permutation turns back?"""
    return x.op == "Transpose" and [x.attrs["perm"][p] for p in perm] == sorted(perm)


UFUNCS: Mapping[str, str] = {  # by name, since erf is SciPy's, and importing that takes as long as all the rest
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "power": "Pow", "matmul": "MatMul",
    "negative": "Neg", "absolute": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh", "cos": "Cos",
    "sin": "Sin", "maximum": "Max", "minimum": "Min", "bitwise_and": "And", "bitwise_or": "Or", "erf": "Erf",
    "equal": "Equal", "not_equal": "Equal", "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual",
}  # fmt: skip


NEUTRAL: Mapping[np.ufunc, int] = {np.add: 0, np.multiply: 1}


def elementwise(g: Graph, ufunc: np.ufunc, inputs: Sequence[Any]) -> Symbol:
    """The node of a ufunc (or matmul), its inputs cast as NumPy casts them. x + 0 and 1 x are x."""
    types = ufunc.resolve_dtypes((*map(kind, inputs), None))
    for x, other in (inputs, inputs[::-1]) if ufunc in NEUTRAL else ():
        if isinstance(other, int | float) and other == NEUTRAL[ufunc] and x.dtype == types[-1]:
            return Symbol(g, x.node)
    args = [operand(g, x, t) for x, t in zip(inputs, types, strict=False)]
    shape = product_shape(args[0].shape, args[1].shape) if ufunc is np.matmul else broadcast(a.shape for a in args)
    y = g.emit(UFUNCS[ufunc.__name__], args, types[-1], shape)
    return g.emit("Not", (y,), BOOL, shape) if ufunc is np.not_equal else y


def write(into: Symbol, y: Symbol) -> Symbol:
    if broadcast([into.shape, y.shape]) != into.shape:
        raise ValueError(f"{y} does not fit into {into}")
    into.node = y.expand(*into.shape).astype(into.dtype).node
    return into


REDUCTIONS: Mapping[np.ufunc, str] = {np.add: "ReduceSum", np.maximum: "ReduceMax"}


def kind(x: Any) -> Any:
    """What decides the dtype of a result: a dtype, or the type of a Python number, which adapts to the others."""
    return int if isinstance(x, Dim) else x.dtype if hasattr(x, "dtype") else type(x)


def operand(graph: Graph, x: Any, dtype: DType) -> Symbol:
    x = graph.ints([x]).reshape(()) if isinstance(x, Dim) else x
    return x.astype(dtype) if isinstance(x, Symbol) else graph.constant(x, dtype)


def operands(graph: Graph, *xs: Any) -> list[Symbol]:
    """All in the dtype that NumPy would give them together."""
    dtype = np.result_type(*(kind(x) if hasattr(x, "dtype") else x for x in xs))
    return [operand(graph, x, dtype) for x in xs]


def reduced(ufunc: np.ufunc, x: Symbol, axis: Any = 0, keepdims: bool = False, initial: Any = None) -> Symbol:
    """ufunc.reduce(x, axis): a sum or a maximum, over all axes if there is none."""
    x = x.astype(INT) if x.dtype == BOOL else x
    at = sorted(a % x.ndim for a in (range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis))
    shape = [1 if k in at else d for k, d in enumerate(x.shape) if keepdims or k not in at]
    y = x.graph.emit(REDUCTIONS[ufunc], (x, x.graph.constant(at, INT)), x.dtype, shape, keepdims=int(keepdims))
    return y if initial is None else elementwise(x.graph, ufunc, (y, initial))


def indexed(x: Symbol, index: tuple[Any, ...]) -> Symbol:
    """x[index] for slices, ints, None and …; slices first, then ints from the last axis, then new axes."""
    g = x.graph
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    k, used = index.index(Ellipsis), sum(i is not None for i in index) - 1
    index = (*index[:k], *[slice(None)] * (x.ndim - used), *index[k + 1 :])
    own = [i for i in index if i is not None]
    cuts = {a: bounds(i, x.shape[a]) for a, i in enumerate(own) if isinstance(i, slice) and i != slice(None)}
    if cuts:
        starts, ends, steps = (g.constant(c, INT) for c in zip(*(cut for cut, _ in cuts.values()), strict=True))
        axes, sizes = g.constant(list(cuts), INT), {a: n for a, (_, n) in cuts.items()}
        shape = [sizes.get(a, d) for a, d in enumerate(x.shape)]
        x = g.emit("Slice", (x, starts, ends, axes, steps), x.dtype, shape)
    for a in reversed([a for a, i in enumerate(own) if not isinstance(i, slice)]):
        x = g.emit("Gather", (x, g.constant(own[a], INT)), x.dtype, x.shape[:a] + x.shape[a + 1 :], axis=a)
    kept = [i for i in index if i is None or isinstance(i, slice)]
    new = [a for a, i in enumerate(kept) if i is None]
    if not new:
        return x
    sizes_left = iter(x.shape)
    return g.emit("Unsqueeze", (x, g.constant(new, INT)), x.dtype, (1 if i is None else next(sizes_left) for i in kept))


def bounds(part: slice, size: Size) -> tuple[tuple[int, int, int], Size]:
    """Start, end and step, and how many places that is. Of an axis whose size is not known, [a:z] and [a:] where it
    has so many places for certain: a batch or sequence has one at least."""
    if not isinstance(size, Dim):
        cut = part.indices(size)
        return cut, len(range(*cut))
    a, z = part.start or 0, part.stop
    if part.step in (None, 1) and 0 <= a <= (a if z is None else z) <= size.least():
        return ((a, END, 1), size - a) if z is None else ((a, z, 1), z - a)
    raise NotImplementedError(f"a slice of an axis of {size} places cannot be exported")


def scatter_add(into: Symbol, index: Symbol, values: Symbol) -> None:
    """np.add.at"""
    args = (into, index[..., None], values.astype(into.dtype))
    write(into, into.graph.emit("ScatterND", args, into.dtype, into.shape, reduction="add"))


# ── NumPy's functions ────────────────────────────────────────────────────────────────────────────────────────────────


def arange(g: Graph, start: Size, stop: Size | None = None) -> Any:
    a, z = (0, start) if stop is None else (start, stop)
    if not isinstance(a, Dim) and not isinstance(z, Dim):
        return np.arange(a, z)
    return g.emit("Range", (operand(g, a, INT), operand(g, z, INT), g.constant(1, INT)), INT, (z + -1 * a,))


def where(g: Graph, condition: Any, a: Any, b: Any) -> Symbol:
    a, b = operands(g, a, b)
    condition = operand(g, condition, BOOL)
    return g.emit("Where", (condition, a, b), a.dtype, broadcast([condition.shape, a.shape, b.shape]))


def concatenate(g: Graph, xs: Sequence[Any], axis: int = 0) -> Symbol:
    parts = operands(g, *xs)
    axis %= parts[0].ndim
    size = total(p.shape[axis] for p in parts)
    shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
    return g.emit("Concat", parts, parts[0].dtype, shape, axis=axis)


def take_along_axis(g: Graph, x: Symbol, at: Any, axis: int) -> Symbol:
    at = operand(g, at, INT)
    return g.emit("GatherElements", (x, at), x.dtype, at.shape, axis=axis)


def put_along_axis(g: Graph, into: Symbol, at: Symbol, values: Any, axis: int) -> None:
    values = operand(g, values, into.dtype).expand(*at.shape)
    write(into, g.emit("ScatterElements", (into, at, values), into.dtype, into.shape, axis=axis))


def cumsum(g: Graph, x: Symbol, axis: int) -> Symbol:
    return g.emit("CumSum", (x, g.constant(axis, INT)), x.dtype, x.shape)


def full_like(g: Graph, x: Symbol, value: Any, dtype: Any = None) -> Symbol:
    return g.constant(value, x.dtype if dtype is None else dtype).expand(*x.shape)


FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    np.arange: arange, np.where: where, np.concatenate: concatenate, np.cumsum: cumsum,
    np.take_along_axis: take_along_axis, np.put_along_axis: put_along_axis,
    np.full_like: full_like, np.zeros_like: lambda g, x, dtype=None: full_like(g, x, 0, dtype),
    np.ones_like: lambda g, x, dtype=None: full_like(g, x, 1, dtype),
    np.broadcast_to: lambda g, x, shape: x.expand(*shape),
    np.sum: lambda g, x, axis=None, **options: reduced(np.add, x, axis, **options),
    np.max: lambda g, x, axis=None, **options: reduced(np.maximum, x, axis, **options),
    np.swapaxes: lambda g, x, i, j: x.swapaxes(i, j), np.vdot: lambda g, x, y: (x * y).sum(),
    np.linalg.solve: solve,
}  # fmt: skip
