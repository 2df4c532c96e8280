"""Google's Flax NNX: `LoRALinear`, and `LoRA` over a layer (`base_module`), which are the setting `module` here.

Kernels are [i, o], `lora_a` [i, r] and `lora_b` [r, o], so A and B are transposed. There is no scale, y = f(x) + x A B:
s goes into B, whose gradient is s times what it is there. Parameters are float32 unless said. It has no merging, and no
embeddings; `nnx.Param` and `nnx.LoRAParam` are how one tells what to train.
"""

from collections.abc import Mapping
from importlib.metadata import version

import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from flax import nnx  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.case import Case
from refpeft.conformance.targets.arrays import exact, module_gradients
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.layers import Layer, Layers
from refpeft.ops import Array


class Adapted(Layer):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        W, b, r = case.arrays["W"], case.arrays.get("b"), self.config["r"]
        self.scale = self.config["lora_alpha"] / r
        how = {"use_bias": b is not None, "param_dtype": W.dtype, "rngs": nnx.Rngs(0)}
        if case.meta["settings"]["module"] == "LoRALinear":
            self.module = nnx.LoRALinear(*W.shape[::-1], lora_rank=r, lora_param_dtype=W.dtype, **how)
            base, self.lora = self.module, self.module.lora
        else:
            base = nnx.Linear(*W.shape[::-1], **how)
            self.module = self.lora = nnx.LoRA(
                W.shape[1], r, W.shape[0], base_module=base, param_dtype=W.dtype, rngs=nnx.Rngs(0)
            )
        base.kernel[...] = jnp.asarray(W.T)
        if b is not None:
            base.bias[...] = jnp.asarray(b)
        if not self.is_fresh:
            self.write(self.asked)

    def write(self, values: Mapping[str, Array]) -> None:
        self.lora.lora_a[...] = jnp.asarray(values["A"].T)
        self.lora.lora_b[...] = jnp.asarray(self.scale * values["B"].T)

    def y(self, x: Array) -> Array:
        return np.asarray(self.module(jnp.asarray(x)))

    def gradients(self, x: Array, dy: Array) -> Arrays:
        found = module_gradients(self.module, x, dy)
        return {"dx": found["dx"], "dA": found["dA"].T, "dB": self.scale * found["dB"].T}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"A": self.lora.lora_a.shape[::-1], "B": self.lora.lora_b.shape[::-1]}


def loaded() -> Layers:
    exact()
    return Layers(
        Adapted, name="flax", version=version("flax"), methods=["lora"],
        features=["forward", "grads", "init", "change"], settings={"module": ["LoRALinear", "LoRA"]},
        versions={"jax": version("jax")},
    )  # fmt: skip
