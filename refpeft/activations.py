"""Activations that adapters may have besides those of the models, by the names of Hugging Face.

Each is an op like those in `refpeft.ops`: value and derivative in one function, σ(x) = 1/(1 + e⁻ˣ).
"""

from collections.abc import Mapping

import numpy as np

from refpeft.ops import Array, Op, Vjp, gelu, gelu_new, op, relu, silu, tanh


@op
def sigmoid(x: Array) -> tuple[Array, Vjp]:
    """y = σ(x).      dx = dy ⊙ y (1 − y)"""
    y = _σ(x)
    return y, lambda dy: (lambda: dy * (y * (1 - y)),)


def _σ(x: Array) -> Array:
    """From e^−|x|, which cannot overflow."""
    positive = x.real > 0
    z = np.exp(np.where(positive, -x, x))
    return np.where(positive, 1, z) / (1 + z)


@op
def identity(x: Array) -> tuple[Array, Vjp]:
    """y = x."""
    return x, lambda dy: (lambda: dy,)


@op
def leaky_relu(x: Array) -> tuple[Array, Vjp]:
    """y = x where x > 0, else x/100.      dx = dy ⊙ (1 where x > 0, else 1/100)"""
    slope = np.where(x.real > 0, x.real.dtype.type(1), x.real.dtype.type(0.01))
    return x * slope, lambda dy: (lambda: dy * slope,)


@op
def relu2(x: Array) -> tuple[Array, Vjp]:
    """y = max(x, 0)².      dx = dy ⊙ 2 max(x, 0)      Primer, arXiv 2109.08668"""
    r = x * (x.real > 0)
    return r * r, lambda dy: (lambda: dy * (2 * r),)


@op
def relu6(x: Array) -> tuple[Array, Vjp]:
    """y = min(max(x, 0), 6).      dx = dy ⊙ [0 < x < 6]"""
    on = (x.real > 0) & (x.real < 6)
    return x * on + 6 * (x.real >= 6).astype(x.dtype), lambda dy: (lambda: dy * on,)


@op
def quick_gelu(x: Array) -> tuple[Array, Vjp]:
    """y = x σ(k x),   k = 1.702.      dx = dy ⊙ (s + k x s (1 − s)),   s = σ(k x)      arXiv 1606.08415, §2"""
    k = 1.702
    s = _σ(k * x)
    return x * s, lambda dy: (lambda: dy * (s + k * x * (s * (1 - s))),)


@op
def mish(x: Array) -> tuple[Array, Vjp]:
    """y = x t,   t = tanh(log(1 + eˣ)).      dx = dy ⊙ (t + x (1 − t²) σ(x))      Misra 2019, arXiv 1908.08681

    log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|), which cannot overflow.
    """
    positive = x.real > 0
    t = np.tanh(x * positive + np.log(1 + np.exp(np.where(positive, -x, x))))
    return x * t, lambda dy: (lambda: dy * (t + x * (1 - t * t) * _σ(x)),)


ACTIVATIONS: Mapping[str, Op] = {
    "relu": relu, "gelu": gelu, "gelu_new": gelu_new, "silu": silu, "swish": silu, "tanh": tanh,
    "leaky_relu": leaky_relu, "leakyrelu": leaky_relu, "sigmoid": sigmoid, "linear": identity, "relu2": relu2,
    "relu6": relu6, "quick_gelu": quick_gelu, "mish": mish, "gelu_python": gelu, "gelu_pytorch_tanh": gelu_new,
    "gelu_python_tanh": gelu_new,
}  # fmt: skip
