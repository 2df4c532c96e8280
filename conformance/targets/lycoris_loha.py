"""LyCORIS before version 2: the functions that compute its LoHa, with gradients written by hand.

Its modules are others there than those that `lycoris` drives. The functions are `make_weight(w1a, w1b, w2a, w2b, s)`,
and with cores `make_weight_cp(t1, w1a, w1b, t2, w2a, w2b, s)`, of a convolution [o, i, k, 1].
"""

from importlib.metadata import version
from typing import Any

import torch
from lycoris.modules import loha  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.targets.layers import Layers, Place
from refpeft.conformance.targets.tensors import tensor
from refpeft.conformance.targets.torch_layers import TorchLayer


class Computed(TorchLayer):
    """x (W + ΔW)ᵀ + b, by torch; ΔW by LyCORIS."""

    def make(self) -> None:
        there = {n: torch.nn.Parameter(tensor(a).clone()) for n, a in self.case.arrays.items() if n in ("W", "b")}
        self.base = {n: Place(p) for n, p in there.items()}
        self.places = {n: Place(torch.nn.Parameter(tensor(a).clone())) for n, a in self.asked.items()}
        self.is_merged = False

    def ΔW(self) -> Any:
        φ = {n: place.param for n, place in self.places.items()}
        s = torch.tensor(self.config["alpha"] / self.config["r"], dtype=φ["A1"].dtype)
        if "T1" not in φ:
            return loha.make_weight(φ["B1"], φ["A1"], φ["B2"], φ["A2"], s)
        T1, T2 = φ["T1"][..., None], φ["T2"][..., None]
        return loha.make_weight_cp(T1, φ["B1"], φ["A1"], T2, φ["B2"], φ["A2"], s).reshape(self.base["W"].param.shape)

    def run(self, x: Any) -> Any:
        W, b = self.base["W"].param, self.base["b"].param if "b" in self.base else None
        return torch.nn.functional.linear(x, W if self.is_merged else W + self.ΔW(), b)

    def merge(self) -> None:
        self.base["W"].param.data += self.ΔW()
        self.is_merged = True


def functions() -> Layers:
    return Layers(
        Computed, ("alpha", "taps"), name="lycoris", version=version("lycoris-lora"), methods=["loha"],
        features=["forward", "grads", "change", "merge", "cores"], versions={"torch": torch.__version__},
    )  # fmt: skip
