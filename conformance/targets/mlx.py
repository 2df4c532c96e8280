"""Apple's MLX, on a CPU: LoRA and DoRA of layers, as `mlx_lm.tuner` has them.

A and B are transposed there, `lora_a` [i, r] and `lora_b` [r, o]; the scale is given as a number (20 unless said), α is
unknown: s = α/r or α/√r is formed here. The norm of DoRA is held constant, as in the paper. `fuse()` returns a plain
layer. There is no Conv1D. `DoRAEmbedding` is another function, with a magnitude for each token and not for each
column, and is not asked. Numbers are float32.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import mlx.core as mx  # type: ignore[import-not-found, unused-ignore]
import mlx.nn as nn  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from mlx_lm.tuner.dora import DoRALinear  # type: ignore[import-not-found, unused-ignore]
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.layers import Layer, Layers
from refpeft.ops import Array

KEYS = {"A": "lora_a", "B": "lora_b", "m": "m"}


class Adapted(Layer):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        W, r = case.arrays["W"], self.config["r"]
        root = r**0.5 if self.config.get("use_rslora") else r
        how = {"r": r, "scale": self.config["lora_alpha"] / root}
        plain = (
            nn.Embedding(*W.shape)
            if self.kind == "embedding"
            else nn.Linear(W.shape[1], W.shape[0], "b" in case.arrays)
        )
        plain.weight = mx.array(W)
        if "b" in case.arrays:
            plain.bias = mx.array(case.arrays["b"])
        kind = DoRALinear if self.config.get("use_dora") else LoRALinear
        self.module = (
            LoRAEmbedding.from_base(plain, **how) if self.kind == "embedding" else kind.from_base(plain, **how)
        )
        (self.module.embedding if self.kind == "embedding" else self.module.linear).freeze()
        if not self.is_fresh:
            self.write(self.asked)

    def write(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            if value.T.shape != self.module[KEYS[name]].shape:
                raise ValueError(f"{name}: expected shape {self.module[KEYS[name]].shape}, found {value.T.shape}")
            self.module[KEYS[name]] = mx.array(np.ascontiguousarray(value.T))

    def y(self, x: Array) -> Array:
        return np.array(self.module(mx.array(x)))

    def gradients(self, x: Array, dy: Array) -> Arrays:
        def loss(parameters: Any, x: Any) -> Any:
            self.module.update(parameters)
            return (self.module(x) * mx.array(dy)).sum()

        wanted = (0,) if self.kind == "embedding" else (0, 1)
        found = mx.grad(loss, argnums=wanted)(self.module.trainable_parameters(), mx.array(x))
        grads, *dx = found if isinstance(found, tuple) else (found,)
        own = {f"d{n}": np.ascontiguousarray(np.array(grads[KEYS[n]]).T) for n in self.asked}
        return {**own, "dx": np.array(dx[0])} if dx else own

    @property
    def plain(self) -> Any:
        """The layer inside, or the layer that it was fused to."""
        return self.module.get("linear") or self.module.get("embedding") or self.module

    def weights(self) -> Arrays:
        there = {"W": "weight", "b": "bias"}
        return {n: np.array(self.plain[there[n]]) for n in there if n in self.case.arrays}

    def trains(self) -> Mapping[str, bool]:
        trained = self.module.trainable_parameters()
        own = {n: KEYS[n] in trained for n in self.asked}
        inner = trained.get("linear") or trained.get("embedding") or {}
        return own | {n: {"W": "weight", "b": "bias"}[n] in inner for n in "Wb" if n in self.case.arrays}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {n: self.module[KEYS[n]].T.shape for n in self.asked}

    def merge(self) -> None:
        self.module = self.module.fuse()


def loaded() -> Layers:
    mx.set_default_device(mx.cpu)
    return Layers(
        Adapted, name="mlx", version=version("mlx-lm"), methods=["lora", "rslora", "dora"], dtypes=["float32"],
        features=["forward", "grads", "frozen", "init", "change", "merge", "embedding"],
        without={"dora": ["embedding"]}, versions={"mlx-core": version("mlx")},
    )  # fmt: skip
