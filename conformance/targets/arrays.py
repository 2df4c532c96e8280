"""What targets share that are in JAX, whose gradients are those of functions of arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax  # type: ignore[import-not-found, unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from flax import nnx  # type: ignore[import-not-found, unused-ignore]

from refpeft.ops import Array

Function = Callable[[Mapping[str, Any], Any], Any]


def exact() -> None:
    """float64 where it is asked for, on the CPU."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")


def gradients(f: Function, φ: Mapping[str, Any], x: Array, dy: Array) -> dict[str, Array]:
    """Of Σ dy ⊙ f(φ, x): 'd' + each name in φ, and dx where x is not of integers."""
    wanted = (0, 1) if x.dtype.kind == "f" else (0,)
    found = jax.grad(lambda φ, x: (f(φ, x) * jnp.asarray(dy)).sum(), argnums=wanted)(dict(φ), jnp.asarray(x))
    own = {f"d{n}": np.asarray(g) for n, g in found[0].items()}
    return {**own, "dx": np.asarray(found[1])} if len(found) > 1 else own


def module_gradients(module: nnx.Module, x: Array, dy: Array) -> dict[str, Array]:
    """Of a module of Flax's with one A and one B, as they lie there."""
    graph, own, rest = nnx.split(module, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(own)  # in the order of their names, which end with a and b
    φ = dict(zip("AB", leaves, strict=True))
    return gradients(lambda φ, x: nnx.merge(graph, jax.tree.unflatten(tree, [φ["A"], φ["B"]]), rest)(x), φ, x, dy)
