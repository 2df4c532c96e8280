"""Is a gradient that you derived right? One line says so, for any function written as `y, vjp = f(x, …)`.

    python examples/own_gradient.py

The check is a complex step through your own formula, f(x + ih v) with h = 1e-100. It has no error of its own, so a
right gradient agrees to about 1e-16 and there is no tolerance to choose. The formula must work on complex numbers:
no abs, and comparisons on `x.real`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

import refpeft

Array = np.ndarray[Any, Any]
Vjp = Callable[[Array], tuple[Array, Array]]


def swish(x: Array, β: Array) -> tuple[Array, Vjp]:
    """y = x σ(βx).      With s = σ(βx):   dx = dy (s + βx s(1 − s)),   dβ = Σ dy x² s(1 − s)"""
    s = 1 / (1 + np.exp(-β * x))
    return x * s, lambda dy: (dy * (s + β * x * s * (1 - s)), (dy * x * x * s * (1 - s)).sum(0))


def hasty(x: Array, β: Array) -> tuple[Array, Vjp]:
    """The same, by someone who forgot that the argument of σ depends on x."""
    s = 1 / (1 + np.exp(-β * x))
    return x * s, lambda dy: (dy * s, (dy * x * x * s * (1 - s)).sum(0))


def main() -> None:
    rng = np.random.default_rng(0)
    x, β = rng.normal(size=(5, 3)), rng.normal(size=3)
    for f in (swish, hasty):
        off = refpeft.check_op(f, x, β)
        print(f"{f.__name__}: off by {off:.0e}, which is {'rounding' if off < 1e-12 else 'wrong'}")


if __name__ == "__main__":
    main()
