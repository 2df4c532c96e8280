"""Google's qwix: a rule (`LoraRule`) puts A and B beside the weights of a Flax NNX module, into the dot products and
einsums that it finds there while the module runs once: the setting `module` is which of Flax's layers that is.

Kernels are [i, o], `kernel_lora_a` [i, r] and `kernel_lora_b` [r, o], so A and B are transposed; s = α/r. It has no
merging; `nnx.LoRAParam` is how one tells what to train. Flax's `Embed` multiplies nothing, and gets no LoRA.
"""

from collections.abc import Mapping
from importlib.metadata import version

import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import qwix  # type: ignore[import-not-found, unused-ignore]
from flax import nnx  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.case import Case
from refpeft.conformance.targets.arrays import exact, module_gradients
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.layers import Layer, Layers
from refpeft.ops import Array

ZEROS = nnx.initializers.zeros_init()  # of what is overwritten: to draw numbers is compiled for every shape


class Adapted(Layer):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        W, b = case.arrays["W"], case.arrays.get("b")
        plain = linear(case.meta["settings"]["module"], W, b)
        how = {"rank": self.config["r"], "alpha": self.config["lora_alpha"], "module_path": ".*", "disable_jit": True}
        how |= {} if self.is_fresh else {"lora_a_initializer": ZEROS}
        x = jnp.zeros((1, W.shape[1]), W.dtype)
        self.module = qwix.apply_lora_to_model(plain, qwix.LoraProvider(**how), x, rngs=nnx.Rngs(0))
        if not self.is_fresh:
            self.write(self.asked)

    def write(self, values: Mapping[str, Array]) -> None:
        self.module.kernel_lora_a[...] = jnp.asarray(values["A"].T)
        self.module.kernel_lora_b[...] = jnp.asarray(values["B"].T)

    def y(self, x: Array) -> Array:
        return np.asarray(self.module(jnp.asarray(x)))

    def gradients(self, x: Array, dy: Array) -> Arrays:
        found = module_gradients(self.module, x, dy)
        return {"dx": found["dx"], "dA": found["dA"].T, "dB": found["dB"].T}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"A": self.module.kernel_lora_a.shape[::-1], "B": self.module.kernel_lora_b.shape[::-1]}


def linear(module: str, W: Array, b: Array | None) -> nnx.Module:
    """One of Flax's two layers that are y = x Wᵀ + b."""
    how = {"param_dtype": W.dtype, "kernel_init": ZEROS, "rngs": nnx.Rngs(0)}
    if module == "Einsum":
        made = nnx.Einsum("...i,io->...o", W.T.shape, None if b is None else b.shape, **how)
    else:
        made = nnx.Linear(*W.T.shape, use_bias=b is not None, **how)
    made.kernel[...] = jnp.asarray(W.T)
    if b is not None:
        made.bias[...] = jnp.asarray(b)
    return made


def loaded() -> Layers:
    exact()
    return Layers(
        Adapted, name="qwix", version=version("qwix"), methods=["lora"],
        features=["forward", "grads", "init", "change"], settings={"module": ["Linear", "Einsum"]},
        versions={"jax": version("jax"), "flax": version("flax")},
    )  # fmt: skip
