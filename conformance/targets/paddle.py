"""Baidu's PaddleFormers: `LoRALinear`, a layer of Paddle's with its adapter in it.

Weights are [i, o], `lora_A` [i, r] and `lora_B` [r, o], so W, A and B are transposed; s = α/r, or α/√r with `rslora`.
`disable_lora` is an attribute, which its model sets. The layer freezes its weight, and leaves the bias to its model,
so what is trained is not asked here. There are no embeddings, and no Conv1D.
"""

import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # it says at length that it hides torch from transformers
    import paddle  # type: ignore[import-not-found, unused-ignore]
    from paddleformers.peft.lora.lora_layers import LoRALinear  # type: ignore[import-not-found, unused-ignore]

    logging.disable(logging.NOTSET)

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.layers import Layer, Layers, Place, transposed
from refpeft.ops import Array


class Adapted(Layer):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        W, b = case.arrays["W"], case.arrays.get("b")
        paddle.set_default_dtype(str(W.dtype))
        how = {"r": self.config["r"], "lora_alpha": self.config["lora_alpha"], "rslora": case.method == "rslora"}
        self.module = LoRALinear(*W.T.shape, bias_attr=None if b is not None else False, **how)
        self.base = {"W": Place(self.module.weight, transposed, transposed)}
        self.base |= {} if b is None else {"b": Place(self.module.bias)}
        self.places = {n: Place(getattr(self.module, f"lora_{n}"), transposed, transposed) for n in "AB"}
        fill(self.base, case.arrays)
        if not self.is_fresh:
            self.write(self.asked)

    def write(self, values: Mapping[str, Array]) -> None:
        fill(self.places, values)

    def y(self, x: Array) -> Array:
        with paddle.no_grad():
            return array(self.module(tensor(x)))

    def gradients(self, x: Array, dy: Array) -> Arrays:
        leaf = tensor(x)
        leaf.stop_gradient = False
        paddle.autograd.backward([self.module(leaf)], [tensor(dy)])
        found = {f"d{n}": place.back(array(place.param.grad)) for n, place in self.places.items()}
        return {"dx": array(leaf.grad), **found}

    def weights(self) -> Arrays:
        return {n: place.back(array(place.param)) for n, place in self.base.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {n: tuple(place.param.shape[::-1]) for n, place in self.places.items()}

    def merge(self) -> None:
        self.module.merge()

    def unmerge(self) -> None:
        self.module.unmerge()

    def disable(self) -> None:
        self.module.disable_lora = True

    def enable(self) -> None:
        self.module.disable_lora = False


def tensor(a: Array) -> Any:
    return paddle.to_tensor(np.ascontiguousarray(a))


def array(t: Any) -> Array:
    return np.array(t.numpy())


def fill(places: Mapping[str, Place], values: Mapping[str, Array]) -> None:
    """Values into parameters, in place; Paddle refuses other shapes."""
    for name, place in places.items():
        place.param.set_value(tensor(place.there(values[name])))


def loaded() -> Layers:
    paddle.set_device("cpu")
    return Layers(
        Adapted, name="paddle", version=version("paddleformers"), methods=["lora", "rslora"],
        features=["forward", "grads", "init", "change", "merge", "unmerge", "disable"],
        versions={"paddlepaddle": version("paddlepaddle")},
    )  # fmt: skip
