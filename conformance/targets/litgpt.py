"""Lightning's `litgpt`: `LoRALinear`, and `LoRAQKVLinear`, which is Q, K and V in one.

W, A and B are ours, s = α/r. In `LoRAQKVLinear` the rows are [q; k; v] and A and B stacked: `fused`. `merge()` is for
good. It has no embeddings, Conv1D, rsLoRA or DoRA, and no way to switch an adapter off.
"""

from importlib.metadata import version
from typing import Any

import torch
from litgpt.lora import (  # type: ignore[import-not-found, unused-ignore]
    LoRALinear,
    LoRAQKVLinear,
    mark_only_lora_as_trainable,
)

from refpeft.conformance.case import Case
from refpeft.conformance.targets.fused import MASKS, Fused
from refpeft.conformance.targets.layers import Layers, Place, same
from refpeft.conformance.targets.tensors import quietly
from refpeft.conformance.targets.torch_layers import FusedLayer, TorchLayer


class Lives:
    module: Any

    def merge(self) -> None:
        self.module.merge()


class Plain(Lives, TorchLayer):
    def make(self) -> None:
        W, b = self.case.arrays["W"], self.case.arrays.get("b")
        self.module = LoRALinear(
            W.shape[1], W.shape[0], r=self.config["r"], lora_alpha=self.config["lora_alpha"], bias=b is not None
        )
        self.base, self.places = placed(self.module, W.dtype, b is not None)


class Merged(Lives, FusedLayer):
    def make(self) -> None:
        W, b, fused = self.case.arrays["W"], self.case.arrays.get("b"), self.fused
        self.module = LoRAQKVLinear(
            W.shape[1], 3 * W.shape[0], head_size=W.shape[0], n_head=1, n_query_groups=1, r=self.config["r"],
            lora_alpha=self.config["lora_alpha"], enable_lora=tuple(fused.enabled), bias=b is not None,
        )  # fmt: skip
        self.base, self.places = placed(self.module, W.dtype, b is not None, fused)


def placed(
    module: Any, dtype: Any, biased: bool, fused: Fused | None = None
) -> tuple[dict[str, Place], dict[str, Place]]:
    """The layer in its dtype, with its base frozen; where W and b are, and where A and B."""
    module.to(getattr(torch, str(dtype)))
    mark_only_lora_as_trainable(module)
    base, last = (fused.base, fused.last) if fused else (same, same)
    adapter, ours = (fused.adapter, fused.ours) if fused else (same, same)
    linear = {"W": module.linear.weight, **({"b": module.linear.bias} if biased else {})}
    return (
        {n: Place(p, base, last) for n, p in linear.items()},
        {"A": Place(module.lora_A, adapter, ours), "B": Place(module.lora_B, adapter, ours)},
    )


def layer(case: Case) -> TorchLayer:
    mask = case.meta["settings"]["enable_lora"]
    return Merged(case, Fused(mask)) if mask else Plain(case)


def loaded() -> Layers:
    quietly()
    return Layers(
        layer, name="litgpt", version=version("litgpt"), methods=["lora"],
        features=["forward", "grads", "frozen", "init", "change", "merge"],
        settings={"enable_lora": list(MASKS)}, versions={"torch": torch.__version__},
    )  # fmt: skip
