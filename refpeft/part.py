"""Parts: the layers of a model as functions of their input, which is what a PEFT method wraps.

A part runs as `y, back = part.run(x)`, and `back(dy, want)` returns `dx` and the gradients of those parameters involved
that are wanted. All of them are *lazy*: functions of no arguments. Linking a whole backward pass therefore computes
nothing, and asking for one gradient computes exactly what that gradient needs.
"""

from collections.abc import Callable, Container
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refpeft.ops import Array, Cotangent, Op, Vjp, embedding, layer_norm, linear, rms_norm

Lazy = Callable[[], Array]
Key = tuple[int, str]  # whose parameter it is (BASE, or the adapter's place in the list), and its name
Grads = dict[Key, Lazy]
Want = Container[Key]
Back = Callable[[Lazy, Want], tuple[Lazy, Grads]]
Run = Callable[[Array], tuple[Array, Back]]

BASE = -1
INNER = -2  # of no parameter, but of a value that several stages use, whose cotangents add up: the encoder's output


class Once:
    """A value computed when first asked for, once, as `make(*args)`; then what it was made from is let go."""

    __slots__ = ("args", "make", "value")

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        self.make: Callable[..., Any] | None = make
        self.args = args

    def __call__(self) -> Any:
        if self.make is not None:
            self.value = self.make(*self.args)
            self.make, self.args = None, ()
        return self.value


def link(vjp: Vjp, dy: Lazy, n: int) -> list[Lazy]:
    """The first n cotangents of an op, given a lazy dy: nothing is computed until one of them is asked for."""
    if n == 1:
        return [Once(_only, vjp, dy)]
    cotangents = Once(_pulled, vjp, dy)
    return [Once(_cotangent, cotangents, k) for k in range(n)]


def _only(vjp: Vjp, dy: Lazy) -> Array:
    (dx, *_) = vjp(dy())
    return dx() if dx else None


def _pulled(vjp: Vjp, dy: Lazy) -> tuple[Cotangent, ...]:
    return vjp(dy())


def _cotangent(cotangents: Lazy, k: int) -> Array:
    return cotangents()[k]()


def join(a: Grads, b: Grads) -> Grads:
    """Both, summed where one parameter was used in two places."""
    if not a or not b:
        return a or b
    twice = {key: plus(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **twice}


def plus(a: Lazy, b: Lazy) -> Lazy:
    return Once(_plus, a, b)


def _plus(a: Lazy, b: Lazy) -> Array:
    return a() + b()


class Part(NamedTuple):
    """One layer: where it is, what it is, its own parameters, and how it runs now (wrapped or not).

    For the kinds that multiply by a matrix (linear, conv1d, embedding), `W` is that matrix as [o, i], whichever way
    round it is stored: Conv1D (GPT-2) stores [i, o]; an embedding stores [v, d] and multiplies one-hot rows: W = Eᵀ.
    """

    path: str  # as HF names the module: 'transformer.h.0.attn.c_attn'
    kind: str  # 'linear', 'conv1d', 'embedding', 'layer_norm', 'rms_norm'
    W: Array
    b: Array | None
    W_key: Key
    b_key: Key
    eps: float
    frozen: bool  # nobody will ask for the gradients of W and b, so what only they need is not kept
    run: Run
    pristine: bool = True  # no adapter has wrapped it

    @property
    def matmul(self) -> Op:
        """y = x Wᵀ (+ b) for inputs of this part's kind: `linear`, or `lookup` where the inputs are ids."""
        return lookup if self.kind == "embedding" else linear

    @property
    def op(self) -> Op:
        """y = f(x, W, b), what this kind of layer computes, for any W and b of its own."""
        if self.kind == "rms_norm":
            return lambda x, W, b=None: rms_norm(x, W, eps=self.eps)
        return partial(layer_norm, eps=self.eps) if self.kind == "layer_norm" else self.matmul

    def bare(self, x: Array) -> tuple[Array, Back]:
        """y = x Wᵀ with the part's own W: no bias, no adapter."""
        y, vjp = self.matmul(x, self.W, frozen=self.frozen)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, dW = link(vjp, dy, 2)
            return dx, self.base_grads(want, dW)

        return y, back

    def base_grads(self, want: Want, dW: Lazy, db: Lazy | None = None) -> Grads:
        """Those of W [o, i] and b that are wanted, by key and as they are stored."""
        return base_grads(want, self.kind, self.W_key, dW, self.b_key, db)

    def wrapped(self, run: Run) -> "Part":
        return self._replace(run=run, pristine=False)


def stored(kind: str, W: Array) -> Array:
    """From a matrix [o, i] to the way this kind of layer stores it, and back."""
    return W.T if kind in ("conv1d", "embedding") else W


def lookup(ids: Array, W: Array, b: Array | None = None, frozen: bool = False) -> tuple[Array, Vjp]:
    """linear(onehot(ids), W, b), without the one-hots.      ids […], W [o, v] → y [… o]"""
    y, vjp = embedding(ids, W.T)

    def dW(dy: Array) -> Array:
        _, dE = vjp(dy)
        assert dE is not None
        return dE().T

    if b is not None:
        y = y + b
    return y, lambda dy: (None, lambda: dW(dy), lambda: dy.reshape(-1, dy.shape[-1]).sum(0))


def make(
    path: str,
    kind: str,
    W: Array,
    b: Array | None,
    W_key: Key,
    b_key: Key,
    eps: float = 0.0,
    frozen: bool = False,
) -> Part:
    """A part as the model has it: y = x Wᵀ + b, or a norm with gain W and shift b."""

    def op(x: Array) -> tuple[Array, Vjp]:
        if kind == "rms_norm":
            return rms_norm(x, W, eps=eps)
        if kind == "layer_norm":
            return layer_norm(x, W, b, eps=eps)
        return lookup(x, W, b) if kind == "embedding" else linear(x, W, b, frozen=frozen)

    def run(x: Array) -> tuple[Array, Back]:
        y, vjp = op(x)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            if W_key not in want and b_key not in want:
                return link(vjp, dy, 1)[0], {}
            dx, dW, *db = link(vjp, dy, 2 if b is None else 3)
            return dx, base_grads(want, kind, W_key, dW, b_key, *db)

        return y, back

    return Part(path, kind, W, b, W_key, b_key, eps, frozen, run)


def base_grads(want: Want, kind: str, W_key: Key, dW: Lazy, b_key: Key, db: Lazy | None = None) -> Grads:
    """A part's own gradients, those that are wanted, the matrix's as it is stored."""
    grads: Grads = {W_key: Once(lambda: stored(kind, dW()))} if W_key in want else {}
    if db is not None and b_key in want:
        grads[b_key] = db
    return grads


def choose(rows: Array, f: Run, g: Run) -> Run:
    """y = f(x) in those rows of the batch where `rows` [b] holds, g(x) in the others; cotangents part likewise."""

    def run(x: Array) -> tuple[Array, Back]:
        y, back_f = f(x)
        z, back_g = g(x)
        held = rows.reshape(-1, *[1] * (len(y.shape) - 1))

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx_f, grads_f = back_f(Once(lambda: for_all(np.where(held, dy(), 0), y)), want)
            dx_g, grads_g = back_g(Once(lambda: for_all(np.where(held, 0, dy()), z)), want)
            return plus(dx_f, dx_g), join(grads_f, grads_g)

        return np.where(held, y, z), back

    return run


def for_all(dy: Array, y: Array) -> Array:
    """The cotangent of a y [1, …] that serves all rows of the batch (positions): theirs add up."""
    return dy.sum(0, keepdims=True) if y.shape[0] == 1 else dy


def op_run(f: Op) -> Run:
    """An op of one argument and no parameters, as a run."""

    def run(x: Array) -> tuple[Array, Back]:
        y, vjp = f(x)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            return link(vjp, dy, 1)[0], {}

        return y, back

    return run


def chain(*runs: Run) -> Run:
    """One after the other."""

    def run(x: Array) -> tuple[Array, Back]:
        backs = []
        for f in runs:
            x, back_f = f(x)
            backs.append(back_f)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            grads: Grads = {}
            for back_f in reversed(backs):
                dy, g = back_f(dy, want)
                grads = join(grads, g)
            return dy, grads

        return x, back

    return run
