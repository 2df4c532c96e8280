"""Microsoft's `loralib`, the first implementation: `Linear`, `Embedding` and `MergedLinear`, layer by layer.

W, A and B are ours, of `Embedding` too (A [r, v], B [d, r]), and s = α/r; a layer that stores W as [i, o] has
`fan_in_fan_out`. α is 1 if nothing is said. `eval()` merges and `train()` unmerges, so that a layer runs with its
adapter beside it in training only. `MergedLinear` is Q, K and V in one, its A and B stacked: `fused`.
There is no rsLoRA, DoRA or bias of B, and no way to switch an adapter off.
"""

from importlib.metadata import version
from typing import Any

import loralib  # type: ignore[import-not-found, unused-ignore]
import torch

from refpeft.conformance.case import Case
from refpeft.conformance.targets.fused import MASKS, Fused
from refpeft.conformance.targets.layers import Layers, Place, transposed
from refpeft.conformance.targets.tensors import quietly
from refpeft.conformance.targets.torch_layers import FusedLayer, TorchLayer

FEATURES = ("forward", "grads", "frozen", "init", "change", "merge", "unmerge", "embedding", "conv1d")


class Lives:
    """Merging, which is a matter of train() and eval()."""

    module: Any

    def merge(self) -> None:
        self.module.eval()

    def unmerge(self) -> None:
        self.module.train()


class Plain(Lives, TorchLayer):
    def make(self) -> None:
        W, b = self.case.arrays["W"], self.case.arrays.get("b")
        how = {"r": self.config["r"], "lora_alpha": self.config["lora_alpha"], "dtype": getattr(torch, str(W.dtype))}
        if self.kind == "embedding":
            self.module = loralib.Embedding(*W.shape, **how)
        else:
            i, o = W.shape if self.kind == "conv1d" else W.shape[::-1]
            how |= {"fan_in_fan_out": self.kind == "conv1d", "bias": b is not None}
            self.module = loralib.Linear(i, o, **how)
        loralib.mark_only_lora_as_trainable(self.module)
        self.base = bases(self.module, b is not None)
        self.places = {"A": Place(self.module.lora_A), "B": Place(self.module.lora_B)}


class Merged(Lives, FusedLayer):
    def make(self) -> None:
        W, b, fused = self.case.arrays["W"], self.case.arrays.get("b"), self.fused
        i, o = W.shape if self.kind == "conv1d" else W.shape[::-1]
        self.module = loralib.MergedLinear(
            i, len(fused.mask) * o, self.config["r"], self.config["lora_alpha"], enable_lora=list(fused.enabled),
            fan_in_fan_out=self.kind == "conv1d", bias=b is not None, dtype=getattr(torch, str(W.dtype)),
        )  # fmt: skip
        loralib.mark_only_lora_as_trainable(self.module)
        self.base = {n: self.placed(n, p.param) for n, p in bases(self.module, b is not None).items()}
        self.places = {
            "A": Place(self.module.lora_A, fused.adapter, fused.ours),
            "B": Place(self.module.lora_B, fused.adapter, fused.ours),
        }

    def placed(self, name: str, param: Any) -> Place:
        base, last = self.fused.base, self.fused.last
        if name == "W" and self.kind == "conv1d":
            return Place(param, lambda a: transposed(base(a.T)), lambda a: transposed(last(a.T)))
        return Place(param, base, last)


def bases(module: Any, biased: bool) -> dict[str, Place]:
    return {"W": Place(module.weight), **({"b": Place(module.bias)} if biased else {})}


def layer(case: Case) -> TorchLayer:
    mask = case.meta["settings"]["enable_lora"]
    return Plain(case) if not mask or case.meta["layer"]["kind"] == "embedding" else Merged(case, Fused(mask))


def loaded() -> Layers:
    quietly()
    return Layers(
        layer, name="loralib", version=version("loralib"), methods=["lora"], features=list(FEATURES),
        settings={"enable_lora": list(MASKS)}, versions={"torch": torch.__version__},
    )  # fmt: skip
