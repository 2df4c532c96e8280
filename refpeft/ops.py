"""The ops: value and vector-Jacobian product in one function, the formula above it.

Every op returns `y, vjp`. `vjp(dy)` returns one entry per array argument, in order: a function of no arguments that
computes that argument's cotangent when called, or None where there is no derivative (token ids, masks, labels).
Whoever does not call it does not pay for it: this is how a frozen parameter costs nothing in the backward pass.

    y, vjp = layer_norm(x, g, b)
    dx, dg, db = vjp(dy)
    dx()                                # computed here; dg and db never are

What the formulas here promise, and what it costs:

* holomorphic in form: no abs, var, conj or norm of values, and comparisons look at `.real`, so that a complex step
  through the same lines gives exact derivatives (`refpeft.check`);
* dtype-keeping: float32 in, float32 out (`math.sqrt`, not `np.sqrt(2)`, which would promote to float64);
  16-bit floats are computed in float32 and rounded once per op, as CPUs and GPUs do;
* nothing is written into an argument;
* only functions that NumPy dispatches (NEP 13, NEP 18), so that an array type of one's own can be put through them.
  Such a type may also define `__op__(name, args, y)` and answer with a node of its own for a named op: that is how
  an exported graph gets its fused nodes.

Shapes stand in brackets: b batch, s query positions, t key positions, h heads, g key-value heads, e head width,
d model width, i inputs, o outputs, v vocabulary; `…` is any number of leading axes. Positions are counted from 0.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, or any type that implements NumPy's dispatch
Cotangent = Callable[[], Array] | None
Vjp = Callable[[Array], tuple[Cotangent, ...]]
Op = Callable[..., tuple[Array, Vjp]]


def op(f: Op) -> Op:
    """What all ops share: 16-bit floats are lifted to float32, and a foreign array type may answer for itself."""

    @functools.wraps(f)
    def call(*args: Array, **options: Any) -> tuple[Array, Vjp]:
        for a in args:
            if type(a) is not np.ndarray:
                if hasattr(a, "__op__"):
                    y, vjp = f(*args, **options)
                    return a.__op__(f.__name__, args, options, y), vjp
            elif a.dtype.itemsize == 2 and is_half(a.dtype):
                return _in_float32(f, args, options)
        return f(*args, **options)

    return call


def is_half(dtype: np.dtype[Any]) -> bool:
    """Is this a 16-bit float: float16, or bfloat16, which NumPy knows as an extension of kind 'V' by ml_dtypes?"""
    return dtype.itemsize == 2 and dtype.kind in "fV"


def _in_float32(f: Op, args: tuple[Array, ...], options: dict[str, Any]) -> tuple[Array, Vjp]:
    half = [type(a) is np.ndarray and is_half(a.dtype) for a in args]
    wide = any(type(a) is np.ndarray and a.dtype.kind in "fc" and a.dtype.itemsize > 2 for a in args)
    y, vjp = f(*(a.astype(np.float32) if h else a for a, h in zip(args, half, strict=True)), **options)

    def rounded(k: int, thunk: Cotangent) -> Cotangent:
        return (lambda: thunk().astype(args[k].dtype)) if thunk and k < len(args) and half[k] else thunk

    def back(dy: Array) -> tuple[Cotangent, ...]:
        cotangents = vjp(dy.astype(np.float32) if is_half(dy.dtype) else dy)
        return tuple(rounded(k, thunk) for k, thunk in enumerate(cotangents))

    return y if wide else y.astype(args[half.index(True)].dtype), back


def rows(x: Array) -> Array:
    """[… d] → [n, d]: one GEMM instead of a batch of small ones."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _sum(x: Array) -> Array:
    return np.add.reduce(x, axis=-1, keepdims=True)


def _mean(x: Array) -> Array:
    return np.add.reduce(x, axis=-1, keepdims=True) / x.shape[-1]


@op
def linear(x: Array, W: Array, b: Array | None = None, frozen: bool = False) -> tuple[Array, Vjp]:
    """y = x Wᵀ + b      x [… i], W [o, i], b [o] → y [… o]

    dx = dy W,   dW = Σ dyᵀ x,   db = Σ dy      (Σ over all leading axes)
    With `frozen` there is no dW, and x, which only dW needs, is not kept for the backward pass.
    """
    shape, kept = x.shape, None if frozen else x
    y = rows(x) @ W.T
    if b is not None:
        y += b
    return y.reshape(*shape[:-1], W.shape[0]), lambda dy: (
        lambda: (rows(dy) @ W).reshape(shape),
        None if kept is None else lambda: rows(dy).T @ rows(kept),
        (lambda: rows(dy).sum(0)) if b is not None else None,
    )


@op
def embedding(ids: Array, E: Array) -> tuple[Array, Vjp]:
    """y = E[ids]      ids […], E [v, d] → y [… d]

    dE[k] = Σ dy over the places where ids = k.      With x = onehot(ids) this is linear(x, Eᵀ).
    """

    def dE(dy: Array) -> Array:
        out = np.zeros_like(E, dtype=dy.dtype)
        np.add.at(out, ids, dy)
        return out

    return E[ids], lambda dy: (None, lambda: dE(dy))


@op
def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> tuple[Array, Vjp]:
    """y = g ⊙ n + b,   n = (x − mean x) ρ,   ρ = (var x + ε)^−½   over the last axis.      x [… d], g [d], b [d]

    With u = dy ⊙ g:   dx = ρ (u − mean u − n ⊙ mean(u ⊙ n)),   dg = Σ dy ⊙ n,   db = Σ dy.
    """
    n = x - _mean(x)
    ρ = 1 / np.sqrt(_mean(n * n) + eps)
    n *= ρ
    y = n * g
    y += b

    def dx(dy: Array) -> Array:
        u = dy * g
        along = _mean(u * n)
        u -= _mean(u)
        u -= n * along
        u *= ρ
        return u

    return y, lambda dy: (lambda: dx(dy), lambda: rows(dy * n).sum(0), lambda: rows(dy).sum(0))


@op
def rms_norm(x: Array, g: Array, eps: float = 1e-6) -> tuple[Array, Vjp]:
    """y = g ⊙ n,   n = x ρ,   ρ = (mean x² + ε)^−½   over the last axis.      x [… d], g [d]

    With u = dy ⊙ g:   dx = ρ (u − n ⊙ mean(u ⊙ n)),   dg = Σ dy ⊙ n.
    """
    ρ = 1 / np.sqrt(_mean(x * x) + eps)
    n = x * ρ

    def dx(dy: Array) -> Array:
        u = dy * g
        u -= n * _mean(u * n)
        u *= ρ
        return u

    return n * g, lambda dy: (lambda: dx(dy), lambda: rows(dy * n).sum(0))


@op
def gelu(x: Array) -> tuple[Array, Vjp]:
    """y = x Φ(x),   Φ(x) = ½ (1 + erf(x/√2)).      Hendrycks & Gimpel 2016, arXiv 1606.08415, §2

    dx = dy ⊙ (Φ(x) + x φ(x)),   φ(x) = exp(−x²/2)/√(2π).
    """
    from scipy import special  # here, because importing it takes longer than all the rest

    Φ = x * math.sqrt(0.5)
    Φ = special.erf(Φ, out=Φ)
    Φ += 1
    Φ *= 0.5

    def dx(dy: Array) -> Array:
        d = x * x
        d *= -0.5
        d = np.exp(d, out=d)
        d *= x
        d *= 1 / math.sqrt(2 * math.pi)
        d += Φ
        d *= dy
        return d

    return x * Φ, lambda dy: (lambda: dx(dy),)


@op
def gelu_new(x: Array) -> tuple[Array, Vjp]:
    """y = ½ x (1 + t),   t = tanh u,   u = √(2/π) (x + 0.044715 x³).      GPT-2's gelu; arXiv 1606.08415, §2

    dx = dy ⊙ ½ (1 + t + x (1 − t²) u′),   u′ = √(2/π) (1 + 3 · 0.044715 x²).
    """
    k, c = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715
    u = x * x
    u *= c
    u += k
    u *= x
    t = np.tanh(u, out=u)
    y = t + 1
    y *= x
    y *= 0.5

    def dx(dy: Array) -> Array:
        d = x * x
        d *= 3 * c
        d += k
        d *= x
        d *= 1 - t * t
        d += t
        d += 1
        d *= dy
        d *= 0.5
        return d

    return y, lambda dy: (lambda: dx(dy),)


@op
def silu(x: Array) -> tuple[Array, Vjp]:
    """y = x σ(x),   σ(x) = 1/(1 + e⁻ˣ).

    dx = dy ⊙ σ (1 + x (1 − σ)).      σ is computed from e^−|x|, which cannot overflow.
    """
    positive = x.real > 0
    z = np.exp(np.where(positive, -x, x))
    σ = np.where(positive, 1, z) / (1 + z)
    return x * σ, lambda dy: (lambda: dy * (σ * (1 + x * (1 - σ))),)


@op
def relu(x: Array) -> tuple[Array, Vjp]:
    """y = x [x > 0].      dx = dy [x > 0]: the derivative at 0 is taken as 0, as everyone does."""
    on = x.real > 0
    return x * on, lambda dy: (lambda: dy * on,)


@op
def tanh(x: Array) -> tuple[Array, Vjp]:
    """y = tanh x.      dx = dy ⊙ (1 − y²)."""
    y = np.tanh(x)
    return y, lambda dy: (lambda: dy * (1 - y * y),)


@op
def softmax(x: Array) -> tuple[Array, Vjp]:
    """y = eˣ / Σ eˣ   over the last axis; a row of nothing but −∞ (all masked) gives zeros.      x [… t]

    dx = y ⊙ (dy − Σ dy ⊙ y).      The maximum that is subtracted first cancels, so it is a constant.
    """
    y = _softmax(x)
    return y, lambda dy: (lambda: y * (dy - _sum(dy * y)),)


def _softmax(x: Array) -> Array:
    y = x - _top(x)
    y = np.exp(y, out=y)
    z = _sum(y)
    y /= z + (z.real == 0)
    return y


def _top(x: Array) -> Array:
    """The largest entry of each row, at least the lowest finite number: a constant, which cancels."""
    return np.maximum.reduce(x.real, axis=-1, keepdims=True, initial=np.finfo(x.dtype).min)


@op
def rope(x: Array, cos: Array, sin: Array) -> tuple[Array, Vjp]:
    """[y₁ y₂] = [x₁ cos − x₂ sin,  x₂ cos + x₁ sin],   x = [x₁ x₂] in halves.      RoFormer, arXiv 2104.09864, §3.2

    x [b, s, h, e], cos and sin [b, s, 1, e/2] → y [b, s, h, e].      The transpose turns back: dx = y(dy, −sin).
    """

    def turn(x: Array, sin: Array) -> Array:
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    return turn(x, sin), lambda dy: (lambda: turn(dy, -sin), None, None)


@op
def attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, bias: Array | None = None, scale: float | None = None
) -> tuple[Array, Vjp]:
    """y = P v,   P = softmax(α q kᵀ + B where mask else −∞),   α = 1/√e.    Vaswani et al. 2017, arXiv 1706.03762, (1)

    q [b, s, h, e], k [b, t, g, e], v [b, t, g, e], mask [b or 1, 1, s or 1, t] of bool, bias B [1, h, s, t]
    → y [b, s, h, e].
    With g < h, each key-value head serves the h/g query heads that follow one another (GQA, arXiv 2305.13245).
    A position that may see nothing gives zeros.

    dv = Pᵀ dy,   dP = dy vᵀ,   dS = P ⊙ (dP − Σ P ⊙ dP),   dq = α dS k,   dk = α dSᵀ q,   dB = Σ dS (over b).
    """
    b, s, h, e = q.shape
    g, t = k.shape[2], k.shape[1]
    n = h // g
    α = 1 / math.sqrt(e) if scale is None else scale

    def fold(x: Array) -> Array:  # [b, s, h, e] → [b, g, n·s, e]
        if n == 1:
            return x.swapaxes(1, 2)
        return x.reshape(b, s, g, n, e).transpose(0, 2, 3, 1, 4).reshape(b, g, n * s, e)

    def unfold(x: Array) -> Array:
        if n == 1:
            return x.swapaxes(1, 2)
        return x.reshape(b, g, n, s, e).transpose(0, 3, 1, 2, 4).reshape(b, s, h, e)

    Q, K, V = fold(q * α), k.swapaxes(1, 2), v.swapaxes(1, 2)
    S = Q @ K.swapaxes(2, 3)
    if mask is not None or bias is not None:
        S = S.reshape(b, h, s, t)
        if bias is not None:
            S += bias
        if mask is not None:
            S += np.where(mask, S.real.dtype.type(0), S.real.dtype.type(-np.inf))
        S = S.reshape(b, g, n * s, t)
    P = _softmax(S)

    def vjp(dy: Array) -> tuple[Cotangent, ...]:
        dY = fold(dy)

        @functools.cache
        def dS() -> Array:
            d = dY @ V.swapaxes(2, 3)
            d -= _sum(P * d)
            d *= P
            return d

        return (
            lambda: unfold(dS() @ K) * α,
            lambda: (dS().swapaxes(2, 3) @ Q).swapaxes(1, 2),
            lambda: (P.swapaxes(2, 3) @ dY).swapaxes(1, 2),
            None,
            None if bias is None else lambda: dS().reshape(b, h, s, t).sum(0, keepdims=True),
        )

    return unfold(P @ V), vjp


@op
def pick(x: Array, index: Array) -> tuple[Array, Vjp]:
    """y_b = x[b, index_b]: one position of each row.      x [b, s, d], index [b] → y [b, d]

    With w = onehot(index), y = w x and dx = wᵀ dy.
    """
    w = np.arange(x.shape[1], like=index) == index[:, None]
    return (w[:, None, :].astype(x.dtype) @ x)[:, 0], lambda dy: (
        lambda: np.where(w[:, :, None], dy[:, None, :], 0),
        None,
    )


@op
def cross_entropy(x: Array, labels: Array, ignore_index: int = -100) -> tuple[Array, Vjp]:
    """L = −mean log softmax(x)[label]   over the places whose label is not ignore_index.    x [… v], labels […] → L []

    dx = dL (softmax(x) − onehot(label)) / count, zero where ignored. No place left gives L = 0 (torch gives nan).
    Shifting labels by one position, as causal language models need, is the caller's.
    """
    v = x.shape[-1]
    kept = labels != ignore_index
    count = np.maximum(kept.sum(), 1).astype(np.result_type(x.dtype, np.float32))  # an integer would widen 32 bits
    place = np.where(kept, labels, 0).reshape(-1)  # of each label in x laid out flat
    place = place + np.arange(place.shape[0], like=labels) * v
    top = _top(x)
    y = x - top
    y = np.exp(y, out=y)
    lse = top + np.log(_sum(y))
    log_p = x.reshape(-1)[place].reshape(labels.shape) - lse[..., 0]
    del y  # computed again if the gradient is asked for: cheaper than the memory

    def dx(dL: Array) -> Array:
        w = (dL / count * kept).astype(x.dtype)
        d = x - lse
        d = np.exp(d, out=d)
        d *= w[..., None]
        d = d.reshape(-1)
        np.add.at(d, place, -w.reshape(-1))
        return d.reshape(x.shape)

    return (-(log_p * kept).sum() / count).astype(x.dtype), lambda dL: (lambda: dx(dL), None)


@op
def mse(x: Array, y: Array) -> tuple[Array, Vjp]:
    """L = mean (x − y)²   over all entries (0 of none).      x, y of one shape → L []

    dx = dL · 2 (x − y)/count,   dy = −dx.
    """
    d = x - y
    n = math.prod(d.shape) or 1
    return (d * d).sum() / n, lambda dL: (lambda: d * (dL * 2 / n), lambda: d * (dL * -2 / n))


activations = {"gelu": gelu, "gelu_new": gelu_new, "silu": silu, "relu": relu, "tanh": tanh}
