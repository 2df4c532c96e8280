"""fast: the traced graph in the shape that onnxruntime runs quickest, by rewriting; the same function to rounding.

What each rewrite is worth was measured on CPUs, against the portable graph; what was worth nothing is not here:

    rows         positions of all texts as rows of one matrix, [b, s, d] → [b s, d], from the embeddings to the head:
                 every layer is then a Gemm; but not what the graph answers with, which would be copied into its shape
    end          what the graph answers with is written once: x W + u B as [x, u] [W; B], which a runtime joins when it
                 loads them, where both are weights
    sum          Gemm adds: x W + b, and x W + u B where an adapter runs beside a layer, or x W + r with a residual,
                 without a pass over the output of its own; a scale goes into it too
    beside       matrices that read the same x as one, [W_q; W_k; W_v], and [A_q; A_k; A_v] of LoRA, which a runtime
                 joins when it loads them; and what lies side by side (GPT-2's too) is taken apart by one node
    attention    past and new keys and values are joined inside Attention, whose mask is made of numbers, once for all

On CPUs com.microsoft's MultiHeadAttention is slower than this, other fused nodes of onnxruntime's own tie, and
GroupQueryAttention cannot read several positions of several texts after a past. So all nodes are standard. What is
stored in 16 or 4 bits comes after this (`refpeft.export.rewriting`): a sum remains beside a product with 4 bits.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from refpeft.export.beside import NARROW, Beside, alike, columns, cuts, pair, rowwise, split
from refpeft.export.sizes import Dim, product
from refpeft.export.symbols import INT, Graph, Node, Symbol, concatenate, where


def fast(graph: Graph, outputs: Mapping[str, Symbol], blocked: Collection[str] = ()) -> dict[str, Symbol]:
    """The same outputs, computed by fewer and larger nodes. `blocked`: weights that are stored in blocks."""
    live = graph.live(outputs.values())
    rewrite = Rewrite(graph, live, outputs, blocked)
    for x in live:  # each in its turn, so that no stack of calls is as deep as the model
        rewrite.whole(x)
    return {name: rewrite.whole(y.node) for name, y in outputs.items()}


class Rewrite:
    """What has been rewritten so far: nodes in their own shape, and as rows."""

    def __init__(
        self, graph: Graph, live: Sequence[Node], outputs: Mapping[str, Symbol], blocked: Collection[str]
    ) -> None:
        self.graph, self.blocked = graph, blocked
        self.uses = Counter(a for x in live for a in x.args if a is not None)
        self.uses.update(y.node for y in outputs.values())
        self.done: dict[Node, Symbol] = {}
        self.flat: dict[Node, Symbol] = {}
        self.joined = {k: x for x in live if x.op == "Attention" and cached(x) for k in x.args[1:3] if k}
        self.beside = {x: group for group in [*alike(live, self.uses, blocked), *cuts(live)] for x in group.members}
        self.parts: dict[Node, list[Symbol]] = {}
        self.ends = {y.node for y in outputs.values() if self.uses[y.node] == 1}

    def whole(self, x: Node) -> Symbol:
        """x in its own shape."""
        if x not in self.done:
            self.done[x] = self.rewritten(x)
        return self.done[x]

    def rows(self, x: Node) -> Symbol:
        """x [b, s, d] as [b s, d]."""
        if x not in self.flat:
            self.flat[x] = self.as_rows(x)
        return self.flat[x]

    def rewritten(self, x: Node) -> Symbol:
        if x.op in ("", "Constant"):
            return Symbol(self.graph, x)
        if x in self.joined:
            self.attention(self.joined[x])
            return self.done[x]
        if x.op == "Attention" and cached(x):
            return self.attention(x)
        if x in self.beside:
            return self.part(x).reshape(x.shape)
        if rowwise(x) and x not in self.ends:
            return self.rows(x).reshape(x.shape)
        if rowwise(x) and x.op == "Add" and (y := self.end(x)) is not None:
            return y
        args = [None if a is None else self.whole(a) for a in x.args]
        if x.op == "Reshape" and args[0] is not None:
            return stated(args[0].reshape(x.shape))
        if x.op == "Transpose" and args[0] is not None:
            return args[0].transpose(*x.attrs["perm"])
        return stated(self.graph.emit(x.op, args, x.dtype, x.shape, **x.attrs))

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def as_rows(self, x: Node) -> Symbol:
        n, d = product(x.shape[:-1]), x.shape[-1]
        if not rowwise(x):
            return self.whole(x).reshape(n, d)
        if x in self.beside:
            return self.part(x).reshape(n, d)
        if x.op == "Add":
            return self.sum(x)
        if x.op == "MatMul" or scaled(x):
            return self.product(x, None)
        args = [None if a is None else self.row_argument(a, x) for a in x.args]
        if x.op == "Slice":
            args[3] = self.graph.constant([1], INT)
        return self.graph.emit(x.op, args, x.dtype, (n, d), **x.attrs)

    def row_argument(self, a: Node, x: Node) -> Symbol:
        """Of what is computed row by row: rows too, or what all of them share."""
        if x.op == "Gather":
            return self.whole(a).reshape(product(a.shape)) if a is x.args[1] else self.whole(a)
        return self.rows(a) if len(a.shape) == 3 else self.whole(a)

    def sum(self, x: Node) -> Symbol:
        """A sum of any number of terms: each product adds to what there is; what is left is added."""
        terms = self.terms(x)
        products = [t for t in terms if adds(t) and self.uses[t] == 1 and t not in self.beside]
        others = [self.row_argument(t, x) for t in terms if t not in products]
        others.sort(key=lambda t: t.ndim)  # a bias first
        y = others.pop(0) if others and products else None
        for p in sorted(products, key=low_rank):
            y = self.product(p, y)
        for t in others:
            y = t if y is None else y + t
        assert y is not None
        return y

    def terms(self, x: Node) -> list[Node]:
        """Those of a sum, of sums in it that nothing else needs too."""
        inner = [a for a in x.args if a is not None]
        return [t for a in inner for t in (self.terms(a) if self.sums(a, x) else [a])]

    def sums(self, a: Node, x: Node) -> bool:
        return a.op == "Add" and a.shape == x.shape and rowwise(a) and self.uses[a] == 1 and a not in self.beside

    def product(self, x: Node, c: Symbol | None) -> Symbol:
        """α a Wᵀ + c"""
        α, a, W = factors(x)
        weight, flip = matrix(self.whole(W))
        attrs = ({"alpha": α} if α != 1 else {}) | ({"transB": 1} if flip else {})
        args = (self.rows(a), weight) if c is None else (self.rows(a), weight, c)
        return self.graph.emit("Gemm", args, x.dtype, (product(x.shape[:-1]), x.shape[-1]), **attrs)

    def end(self, x: Node) -> Symbol | None:
        """x Wᵀ + α u Bᵀ as [x, α u] [W, B]ᵀ, where both are weights: what a graph answers with is wide, and then
        written once. What is multiplied by inputs is added to it."""
        terms = self.terms(x)
        if not all(adds(t) and self.uses[t] == 1 and t not in self.beside for t in terms):
            return None
        weights = {t: W for t in terms if (W := self.fixed(t)) is not None}
        if not weights:
            return None
        sides = []
        for α, a, _ in map(factors, weights):
            sides.append(self.whole(a) if α == 1 else self.whole(a) * np.asarray(α, x.dtype))
        W, side = (beside(self.graph, list(parts)) for parts in (weights.values(), sides))
        y = self.graph.emit("MatMul", (side, W.transpose(1, 0)), x.dtype, x.shape)
        for t in terms:
            y = y if t in weights else y + self.product(t, None).reshape(x.shape)
        return y

    def fixed(self, x: Node) -> Symbol | None:
        """The W of a Wᵀ that a runtime can join with others when it loads them."""
        W, flip = matrix(self.whole(factors(x)[2]))
        weight = not W.node.op and W.node.name not in self.blocked and all(isinstance(d, int) for d in W.shape)
        return W if flip and weight else None

    # ── side by side ─────────────────────────────────────────────────────────────────────────────────────────────────

    def part(self, x: Node) -> Symbol:
        """One of what lies side by side, in its own shape or as rows: that of all in its group."""
        group = self.beside[x]
        first = group.members[0]
        if first not in self.parts:
            y = self.together(group) if group.weights else self.rows(group.source)
            y = y if group.rows else y.reshape(*x.shape[:2], y.shape[1])
            self.parts[first] = split(y, [columns(m) for m in group.members])
        return self.parts[first][group.members.index(x)]

    def together(self, group: Beside) -> Symbol:
        """x [W₁; W₂; …]ᵀ + [b₁; b₂; …]"""
        g, x = self.graph, self.rows(group.source)
        stack, *bias = (concatenate(g, list(map(self.whole, w))) for w in (group.weights, group.biases) if w)
        return g.emit("Gemm", (x, stack, *bias), x.dtype, (x.shape[0], stack.shape[0]), transB=1)

    # ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────

    def attention(self, x: Node) -> Symbol:
        """Attention that joins past and new keys and values itself, and answers with them."""
        q, k, v, *mask = (a for a in x.args if a is not None)
        (past_k, new_k), (past_v, new_v) = ([self.whole(a) for a in pair(joined)] for joined in (k, v))
        args = [flat_heads(self.whole(q)), flat_heads(new_k), flat_heads(new_v)]
        numbers: list[Symbol | None] = [self.numbers(m, x.dtype) for m in mask] or [None]
        b, h, s, e = x.shape
        heads = {"q_num_heads": h, "kv_num_heads": k.shape[1]}
        shape = (b, s, h * e)
        y = self.graph.emit("Attention", [*args, *numbers, past_k, past_v], x.dtype, shape, **x.attrs, **heads)
        for index, joined in ((1, k), (2, v)):
            self.done[joined] = self.graph.output(y, index, joined.dtype, joined.shape)
        self.done[x] = y.reshape(b, s, h, e).swapaxes(1, 2)
        return self.done[x]

    def numbers(self, mask: Node, dtype: Any) -> Symbol:
        """0 where the mask holds and −∞ where not, which Attention would make in every layer."""
        m = self.whole(mask)
        return where(self.graph, m, np.zeros((), dtype), np.asarray(-math.inf, dtype)) if m.dtype == bool else m


def beside(g: Graph, parts: Sequence[Symbol]) -> Symbol:
    return parts[0] if len(parts) == 1 else concatenate(g, parts, -1)


def adds(x: Node) -> bool:
    """Is this a product that Gemm can add to something?"""
    return rowwise(x) and (x.op == "MatMul" or scaled(x))


def factors(x: Node) -> tuple[float, Node, Node]:
    """α, a and Wᵀ, where this is their product"""
    α, x = (float(scalar(x)), factor(x)) if x.op == "Mul" else (1.0, x)
    a, W = pair(x)
    return (α * float(scalar(a)), factor(a), W) if scaled(a) else (α, a, W)


def scaled(x: Node) -> bool:
    """α times a product"""
    return x.op == "Mul" and scalar(x) is not None and factor(x).op == "MatMul" and rowwise(factor(x))


def scalar(x: Node) -> Any:
    """The number that a product multiplies by, if it does."""
    return next((a.attrs["value"] for a in x.args if a and a.op == "Constant" and a.shape == ()), None)


def factor(x: Node) -> Node:
    """The other factor."""
    return next(a for a in x.args if a is not None and a.shape != ())


def low_rank(x: Node) -> bool:
    """Is it a product over few columns? Then it comes last."""
    r = pair(factor(x) if x.op == "Mul" else x)[1].shape[0]
    return isinstance(r, Dim) or r <= NARROW


def matrix(W: Symbol) -> tuple[Symbol, int]:
    """A matrix as it is stored, and whether that is its transpose."""
    stored = W.source("Transpose")
    return (W, 0) if stored is None else (stored, 1)


def cached(x: Node) -> bool:
    """Does this attention read keys and values of before, joined to its own?"""
    pair = [a for a in x.args[1:3] if a is not None and a.op == "Concat" and len(a.args) == 2 and len(a.shape) == 4]
    return len(pair) == 2 and len(x.shape) == 4 and all(fed(a.args[0]) for a in pair)


def fed(past: Node | None) -> bool:
    """Does this come from outside, in its shape? Attention joins nothing else, not even where that is empty."""
    return past is not None and not past.op and not past.attrs.get("loose")


def stated(y: Symbol) -> Symbol:
    """onnx's inference takes the width of Attention's answer for 0 where a shape is computed: it is said again."""
    if y.node.op != "Attention" or y.ndim != 3:
        return y
    return y.graph.emit("Reshape", (y, y.graph.constant([0, 0, y.shape[2]], INT)), y.dtype, y.shape)


def flat_heads(x: Symbol) -> Symbol:
    """[b, h, s, e] → [b, s, h e]"""
    b, h, s, e = x.shape
    return x.swapaxes(1, 2).reshape(b, s, h * e)
