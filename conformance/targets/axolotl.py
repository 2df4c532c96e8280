"""axolotl's kernels for LoRA (`axolotl.kernels.lora`): autograd functions with gradients written by hand.

Functions of tensors: W, A, B, m and the bias of B are ours, of embeddings too, and the scale is a number: s = α/r or
α/√r is formed here. `LoRA_O` is one layer, `LoRA_QKV` three of one input, of which the case's is the last (the setting
`kernel`); `LoRA_Embedding` is for embeddings. DoRA's norm is held constant, and kept until A or B is changed in place.
The layers over them are HF peft's, so nothing is asked about merging or switching off.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import axolotl.kernels.lora as kernels  # type: ignore[import-not-found, unused-ignore]
import torch

from refpeft.conformance.targets.base import Skip
from refpeft.conformance.targets.layers import Layers, Place
from refpeft.conformance.targets.tensors import quietly, tensor
from refpeft.conformance.targets.torch_layers import TorchLayer
from refpeft.ops import Array


class Kernel(TorchLayer):
    def make(self) -> None:
        if not self.x.size and self.case.meta["property"] != "batch":
            raise Skip("a batch without rows is asked for once, in the property about batches")
        r = self.config["r"]
        self.scale = self.config["lora_alpha"] / (r**0.5 if self.config.get("use_rslora") else r)
        stored = {n: self.case.arrays[n] for n in ("W", "b") if n in self.case.arrays}
        self.base = {n: Place(torch.nn.Parameter(tensor(a).clone(), requires_grad=False)) for n, a in stored.items()}
        self.places = {n: Place(torch.nn.Parameter(tensor(a).clone())) for n, a in self.asked.items()}

    def write(self, values: Mapping[str, Array]) -> None:
        """In place, as an optimizer does."""
        with torch.no_grad():
            for name, place in self.places.items():
                place.param.copy_(tensor(values[name]))

    def run(self, x: Any) -> Any:
        p: dict[str, Any] = {n: place.param for n, place in {**self.base, **self.places}.items()}
        own = (p["W"], p.get("b"), None, p["A"], p["B"], self.scale, p.get("bias"), p.get("m"))
        if self.kind == "embedding":
            W, _, _, A, B, s, _, m = own
            return kernels.LoRA_Embedding.apply(x, W, A, B, s, m, None, None, 2.0, False, False)
        if self.case.meta["settings"]["kernel"] == "o":
            return kernels.LoRA_O.apply(x, None, *own)
        others = [tuple(k * t if torch.is_tensor(t) and t is not p["A"] else t for t in own) for k in (-1, 2)]
        return kernels.LoRA_QKV.apply(x, None, *others[0], *others[1], *own)[-1]


def loaded() -> Layers:
    quietly()
    return Layers(
        Kernel, name="axolotl", version=version("axolotl"), methods=["lora", "rslora", "dora"],
        features=["forward", "grads", "change", "embedding", "bias"], settings={"kernel": ["o", "qkv"]},
        versions={"torch": torch.__version__},
    )  # fmt: skip
