"""What targets share whose layer is a function of its parameters, as in JAX: arrays by the names A, B, W and b."""

from collections.abc import Callable, Mapping
from typing import Any

import jax  # type: ignore[import-not-found, unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from refpeft.ops import Array

Function = Callable[[Mapping[str, Any], Any], Any]


def gradients(f: Function, φ: Mapping[str, Any], x: Array, dy: Array) -> dict[str, Array]:
    """Of Σ dy ⊙ f(φ, x): 'd' + each name in φ, and dx where x is not of integers."""
    wanted = (0, 1) if x.dtype.kind == "f" else (0,)
    found = jax.grad(lambda φ, x: (f(φ, x) * jnp.asarray(dy)).sum(), argnums=wanted)(dict(φ), jnp.asarray(x))
    own = {f"d{n}": np.asarray(g) for n, g in found[0].items()}
    return {**own, "dx": np.asarray(found[1])} if len(found) > 1 else own
