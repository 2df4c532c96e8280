"""Sizes of symbols: ints, and polynomials in the sizes that are known only when a graph runs; shapes made of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class Dim:
    """A size known only when the graph runs: a polynomial Σ c · a · b · … in the graph's named sizes."""

    def __init__(self, graph: Any, terms: Mapping[tuple[str, ...], int]) -> None:
        self.graph, self.terms = graph, dict(sorted(terms.items()))

    def __add__(self, other: "Size") -> "Dim":
        if not isinstance(other, int | Dim):
            return NotImplemented  # a symbol knows how
        terms = dict(self.terms)
        for names, c in polynomial(other).items():
            terms[names] = terms.get(names, 0) + c
        return Dim(self.graph, {names: c for names, c in terms.items() if c})

    def __mul__(self, other: "Size") -> "Dim":
        total = Dim(self.graph, {})
        for m, c in self.terms.items():
            total += Dim(self.graph, {tuple(sorted(m + n)): c * k for n, k in polynomial(other).items()})
        return total

    __radd__, __rmul__ = __add__, __mul__

    def __sub__(self, other: "Size") -> "Size":
        left = self + Dim(self.graph, dict(polynomial(other))) * -1
        return left if any(left.terms) else left.terms.get((), 0)

    def least(self) -> int:
        """Of a batch or a sequence at least one place, and the places that are added to it."""
        return self.terms.get((), 0) + 1 if min(self.terms.values()) > 0 else 0

    @property
    def name(self) -> str:
        """Of a size that has one of its own, rather than being computed."""
        names = next(iter(self.terms), ())
        return names[0] if len(names) == 1 and self.terms == {names: 1} else ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        terms = sorted(self.terms.items(), key=lambda term: term[1] < 0)  # what is taken away comes last
        found = ["*".join(([str(c)] if c != 1 or not names else []) + list(names)) for names, c in terms]
        return " + ".join(found).replace(" + -1*", " - ").replace(" + -", " - ")

    def tensor(self) -> Any:
        """Its value as an int64 symbol of shape [1]."""
        g = self.graph

        def factor(name: str) -> Any:
            x, axis = g.sizes[name]
            return g.emit("Shape", (x,), np.int64, (1,), start=axis, end=axis + 1)

        terms = [math.prod(map(factor, names), start=c) if names else c for names, c in self.terms.items()]
        return sum(terms[1:], start=terms[0])


Size = int | Dim
Shape = tuple[Size, ...]


def polynomial(size: Size) -> Mapping[tuple[str, ...], int]:
    return size.terms if isinstance(size, Dim) else {(): size}


def broadcast(shapes: Iterable[Shape]) -> Shape:
    shapes = list(shapes)
    n = max(map(len, shapes))
    columns = zip(*((1,) * (n - len(s)) + s for s in shapes), strict=True)
    result = []
    for column in columns:
        sizes = list(dict.fromkeys(d for d in column if d != 1))
        if len(sizes) > 1:
            raise ValueError(f"shapes {', '.join(map(text, shapes))} do not broadcast")
        result.append(sizes[0] if sizes else 1)
    return tuple(result)


def product_shape(a: Shape, b: Shape) -> Shape:
    """Of a @ b."""
    if a[-1] != b[-2]:
        raise ValueError(f"{text(a)} @ {text(b)}: the inner sizes differ")
    return (*broadcast([a[:-2], b[:-2]]), a[-2], b[-1])


def complete(old: Shape, new: Sequence[Size]) -> Shape:
    """The new shape with its −1 worked out: sizes in both shapes cancel, the rest divides."""
    if -1 not in new:
        return tuple(new)
    rest, left = list(old), []
    for d in new:
        if d in rest:
            rest.remove(d)
        elif d != -1:
            left.append(d)
    whole, k = product(rest), product(left)
    if isinstance(k, Dim) or any(c % k for c in polynomial(whole).values()):
        raise ValueError(f"{text(old)} cannot be reshaped to {text(new)}")
    missing = Dim(whole.graph, {n: c // k for n, c in whole.terms.items()}) if isinstance(whole, Dim) else whole // k
    return tuple(missing if d == -1 else d for d in new)


def total(sizes: Iterable[Size]) -> Size:
    result: Size = 0
    for d in sizes:
        result = result + d
    return result


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for d in sizes:
        result = result * d
    return result


def text(shape: Iterable[Size]) -> str:
    return f"[{', '.join(map(str, shape))}]"
