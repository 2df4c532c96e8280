"""What targets share that have one adapted layer in torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.fused import Fused
from refpeft.conformance.targets.layers import Layer, Place
from refpeft.conformance.targets.tensors import array, fill, tensor
from refpeft.ops import Array


class Patches(torch.nn.Module):
    """A convolution that sees one patch at a time: W [o, i k] stored as [o, i, 1, k], or k of 4 or 9 as a square."""

    def __init__(self, W: Array, b: Array | None, taps: int) -> None:
        super().__init__()
        height = round(taps**0.5) if taps in (4, 9) else 1
        self.patch = W.shape[1] // taps, height, taps // height
        self.layer = torch.nn.Conv2d(self.patch[0], len(W), self.patch[1:], bias=b is not None)
        self.layer.weight = torch.nn.Parameter(tensor(W).reshape(len(W), *self.patch).clone())
        if b is not None:
            self.layer.bias = torch.nn.Parameter(tensor(b).clone())

    def forward(self, x: Any) -> Any:
        return self.layer(x.reshape(-1, *self.patch)).reshape(*x.shape[:-1], len(self.layer.weight))


class TorchLayer(Layer):
    """`module` is called with x; it, the `places` of A, B, … and the `base`, those of W and b, are set by `make`."""

    module: Any
    places: Mapping[str, Place]
    base: Mapping[str, Place]

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.make()
        fill(self.base, case.arrays)
        if not self.is_fresh:
            self.write(self.asked)

    def make(self) -> None:
        raise NotImplementedError

    def write(self, values: Mapping[str, Array]) -> None:
        fill(self.places, values)

    def y(self, x: Array) -> Array:
        return array(self.run(tensor(x)))

    def run(self, x: Any) -> Any:
        return self.module(x)

    def gradients(self, x: Array, dy: Array) -> Arrays:
        leaf = tensor(x)
        if self.kind != "embedding":
            leaf = leaf.clone().requires_grad_()
        self.run(leaf).backward(tensor(dy))
        found = {f"d{n}": place.back(gradient(place.param)) for n, place in self.places.items()}
        return found if self.kind == "embedding" else {"dx": array(leaf.grad), **found}

    def weights(self) -> Arrays:
        return {n: np.ascontiguousarray(place.back(array(place.param))) for n, place in self.base.items()}

    def trains(self) -> Mapping[str, bool]:
        return {n: bool(place.param.requires_grad) for n, place in {**self.base, **self.places}.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {n: place.back(array(place.param)).shape for n, place in self.places.items()}


def gradient(param: Any) -> Array:
    """Zero for a parameter that was not used."""
    return array(param.grad if param.grad is not None else param * 0)


class FusedLayer(TorchLayer):
    """One of three layers in one."""

    def __init__(self, case: Case, fused: Fused) -> None:
        self.fused = fused
        super().__init__(case)

    def run(self, x: Any) -> Any:
        y = self.module(x)
        return y[..., -(y.shape[-1] // len(self.fused.mask)) :]
