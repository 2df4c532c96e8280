"""Keras 3, on torch: `enable_lora` of `Dense` and `Embedding`.

Kernels are [i, o], as Conv1D's; `lora_kernel_a` [i, r] and `lora_kernel_b` [r, o] are A and B transposed, and so are
those of `Embedding`. s = α/r, and α = r unless said. A and B are float32 whatever the layer is, so all is float32 here.
Merging is saving: `save_own_variables` writes merged weights, which are loaded into a layer without LoRA. It has no
rsLoRA and no DoRA, and no way to switch an adapter off.
"""

import os
from collections.abc import Mapping

os.environ["KERAS_BACKEND"] = "torch"  # read once, when keras is imported

import keras  # type: ignore[import-not-found, unused-ignore]
import torch

from refpeft.conformance.targets.layers import Layers, Place, same, transposed
from refpeft.conformance.targets.tensors import quietly
from refpeft.conformance.targets.torch_layers import TorchLayer
from refpeft.ops import Array


class Adapted(TorchLayer):
    def make(self) -> None:
        self.module = self.plain()
        self.module.enable_lora(self.config["r"], self.config["lora_alpha"])
        layer, stem = self.module, "embeddings" if self.kind == "embedding" else "kernel"
        there = {"A": getattr(layer, f"lora_{stem}_a"), "B": getattr(layer, f"lora_{stem}_b")}
        self.variables = {"W": layer.variables[0], **({"b": layer.bias} if "b" in self.case.arrays else {}), **there}
        self.places = {n: Place(v.value, transposed, transposed) for n, v in there.items()}
        self.base = self.bases()

    def plain(self) -> keras.Layer:
        """With W and b."""
        W, b = self.case.arrays["W"], self.case.arrays.get("b")
        stored = W if self.kind != "linear" else W.T
        if self.kind == "embedding":
            layer = keras.layers.Embedding(*W.shape)
            layer.build()
        else:
            layer = keras.layers.Dense(stored.shape[1], use_bias=b is not None)
            layer.build((None, stored.shape[0]))
        for variable, value in zip(layer.variables, [stored, *([] if b is None else [b])], strict=True):
            variable.assign(value)
        return layer

    def bases(self) -> Mapping[str, Place]:
        """Of the layer's own variables: the kernel first, then the bias."""
        turn = transposed if self.kind == "linear" else same
        kernel = next(v for v in self.module.variables if v.name in ("kernel", "embeddings"))
        bias = {"b": Place(self.module.bias.value)} if "b" in self.case.arrays else {}
        return {"W": Place(kernel.value, turn, turn), **bias}

    def trains(self) -> Mapping[str, bool]:
        return {n: bool(v.trainable) for n, v in self.variables.items()}

    def merge(self) -> None:
        saved: dict[str, Array] = {}
        self.module.save_own_variables(saved)
        self.module = self.plain()
        self.module.load_own_variables(saved)
        self.base = self.bases()


def loaded() -> Layers:
    quietly()
    return Layers(
        Adapted, name="keras", version=keras.__version__, methods=["lora"], dtypes=["float32"],
        features=["forward", "grads", "frozen", "init", "change", "merge", "embedding", "conv1d"],
        versions={"torch": torch.__version__},
    )  # fmt: skip
