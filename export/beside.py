"""What lies side by side in a traced graph: products of the same x with several matrices, and slices of one output."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from refpeft.export.sizes import Dim
from refpeft.export.symbols import INT, Node, Symbol

EACH = {"Add", "Sub", "Mul", "Div", "Tanh", "Sigmoid", "Relu", "Gelu", "Cast"}
NORMS = {"LayerNormalization", "RMSNormalization"}
NARROW = 64  # columns of a matrix that leave most of a CPU's registers empty
ALIKE = 3  # widths of x that several matrices may make of it together: queries, keys and values


@dataclass(frozen=True)
class Beside:
    """Nodes whose last axes make up one, in this order: slices of the source, or its products with `weights` [n, d] and
    `biases`, if they have any. `rows`: what reads them treats every position alone."""

    members: Sequence[Node]
    source: Node
    rows: bool
    weights: Sequence[Node] = ()
    biases: Sequence[Node] = ()


def alike(live: Sequence[Node], uses: Counter[Node], blocked: Collection[str]) -> Iterator[Beside]:
    """Products that read the same x: with matrices of few rows, with a layer's queries, keys and values, and with all
    that are in blocks, each of which would round x anew."""
    sums, by_row = {x.args[0]: x for x in live if biased(x, uses)}, read_by_row(live)
    groups: dict[tuple[Node, bool, bool, bool], list[Node]] = {}
    for x in live:
        if x.op == "MatMul" and rowwise(x) and pair(x)[1].op == "Transpose" and columns(x):
            few = narrow(x)
            weight = own(x, uses)
            if few or weight:
                key = (pair(x)[0], few, x in sums, weight in blocked)
                groups.setdefault(key, []).append(x)
    for (a, few, _, cheap), products in groups.items():
        if len(products) > 1 and (few or cheap or sum(map(columns, products)) <= ALIKE * columns(a)):
            weights = [w for x in products for w in pair(x)[1].args if w is not None]
            biases = [b for x in products if x in sums for b in sums[x].args[1:] if b is not None]
            members = [sums.get(x, x) for x in products]
            yield Beside(members, a, not by_row.isdisjoint(members), weights, biases)


def cuts(live: Sequence[Node]) -> Iterator[Beside]:
    """Slices that all of an output is cut into."""
    by_row = read_by_row(live)
    groups: dict[Node, list[tuple[int, int, Node]]] = {}
    for x in live:
        if x.op == "Slice" and rowwise(x) and x.args[0] is not None:
            start, end, step = (int(x.args[k].attrs["value"][0]) for k in (1, 2, 4))  # type: ignore[union-attr]
            if step == 1 and columns(x) and columns(x.args[0]):
                groups.setdefault(x.args[0], []).append((start, min(end, columns(x.args[0])), x))
    for source, parts in groups.items():
        parts.sort(key=lambda p: p[0])
        ends = [0, *(end for _, end, _ in parts)]
        if len(parts) > 1 and [start for start, _, _ in parts] == ends[:-1] and ends[-1] == columns(source):
            members = [x for _, _, x in parts]
            yield Beside(members, source, not by_row.isdisjoint(members))


def split(y: Symbol, widths: Sequence[int]) -> list[Symbol]:
    """y cut along its last axis."""
    shapes = [(*y.shape[:-1], n) for n in widths]
    first = y.graph.emit("Split", (y, y.graph.constant(widths, INT)), y.dtype, shapes[0], axis=-1)
    return [first, *(y.graph.output(first, k, y.dtype, shape) for k, shape in enumerate(shapes) if k)]


def narrow(x: Node) -> bool:
    """Is it a product with a matrix of few rows?"""
    d = pair(x)[1].shape[0]
    return columns(x) <= NARROW and isinstance(d, int) and 4 * columns(x) <= d


def own(x: Node, uses: Counter[Node]) -> str:
    """The name of the weight that it is a product with, if nothing else reads that."""
    W = pair(x)[1]
    weight = W.args[0]
    return weight.name if weight is not None and not weight.op and uses[W] == uses[weight] == 1 else ""


def biased(x: Node, uses: Counter[Node]) -> bool:
    """x Wᵀ + b"""
    if x.op != "Add" or not rowwise(x):
        return False
    a, b = pair(x)
    return a.op == "MatMul" and uses[a] == 1 and not b.op and len(b.shape) == 1


def read_by_row(live: Sequence[Node]) -> set[Node | None]:
    """What is read by nodes that treat every position alone."""
    return {a for x in live if rowwise(x) for a in x.args}


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rowwise(x: Node) -> bool:
    """Does this treat every position of [b, s, d] alone?"""
    if len(x.shape) != 3 or not isinstance(x.shape[0], Dim):
        return False
    args = [a for a in x.args if a is not None]
    if x.op in EACH:
        return all(a.shape == x.shape or len(a.shape) <= 1 for a in args)
    if x.op in NORMS:
        return all(len(a.shape) <= 1 for a in args[1:])
    if x.op == "MatMul":
        return len(args[0].shape) == 3 and len(args[1].shape) == 2
    if x.op == "Gather":
        return x.attrs["axis"] == 0 and len(args[0].shape) == 2
    return x.op == "Slice" and list(args[3].attrs["value"]) == [2]


def columns(x: Node) -> int:
    """How many there are; 0 if that is not known yet."""
    n = x.shape[-1]
    return n if isinstance(n, int) else 0


def pair(x: Node) -> tuple[Node, Node]:
    """The two that a node is made of."""
    a, b = x.args
    assert a is not None
    assert b is not None
    return a, b
