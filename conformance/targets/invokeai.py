"""InvokeAI's patch layers: LoRA, DoRA, LoHa, LoKr and (IA)³ as differences that are added to the weights of a layer.

A patch is made from the tensors of a file, by LyCORIS's names: `lora_down.weight` is A, `lora_up.weight` B, `alpha` α,
and s = α/r; without `alpha` s = 1. DoRA's m is `dora_magnitude`, one for each row of W, as in HF peft (`dora_scale`
would be one for each column, as in LyCORIS, another function). LoHa and LoKr have HF peft's names; s = 1 where both of
LoKr's factors are full. (IA)³'s `weight` is l − 1, and `on_input` says that it is of what the layer takes. Patched is
merged: W + w ΔW, and the layer runs on that; with α/w and a weight w of the patch ΔW is what it is with α, a setting.

The package asks for much that these layers do not use, so it is installed alone, and they are imported without what the
packages around them import; the one module that is replaced is that which writes its log.
"""

import importlib
import logging
import sys
import types
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import invokeai  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import torch

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.layers import Layer, Layers
from refpeft.conformance.targets.tensors import array, quietly, tensor
from refpeft.methods import METHODS
from refpeft.ops import Array

BARE = (  # packages whose own import is passed over
    "util", "model_manager", "model_manager.load", "model_manager.load.model_cache",
    "model_manager.load.model_cache.torch_module_autocast",
)  # fmt: skip
NAMES = {"A": "lora_down.weight", "B": "lora_up.weight", "m": "dora_magnitude"}
OPTIONS: Mapping[str, Mapping[str, Any]] = {"lokr": {"scale_full": False}}
SETTINGS = {"weight": [1.0, 0.5]}
SUMS = ("lora", "loha", "lokr")
FIELDS = ("alpha", "decompose_both", "feedforward_modules", *OPTIONS["lokr"])


def patches() -> Any:
    """The module that makes a patch of whatever tensors there are."""
    backend = Path(invokeai.__path__[0]) / "backend"
    for name in BARE:
        bare = types.ModuleType(f"invokeai.backend.{name}")
        bare.__path__ = [str(backend / name.replace(".", "/"))]
        sys.modules.setdefault(bare.__name__, bare)
    sys.modules.setdefault("invokeai.backend.util.logging", logging)
    return importlib.import_module("invokeai.backend.patches.layers.utils")


LAYERS = patches()


class Adapted(Layer):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        values = MAKERS.get(case.method, named)(case, self.asked)
        self.patch = LAYERS.any_lora_layer_from_state_dict(values)
        self.weight = 1.0
        if case.method in SUMS and self.patch._rank() is not None:  # else α is not looked at
            self.weight = case.meta.get("settings", {}).get("weight", 1.0)
            self.patch = LAYERS.any_lora_layer_from_state_dict({**values, "alpha": values["alpha"] / self.weight})
        own = {"weight": case.arrays["W"], "bias": case.arrays.get("b")}
        self.base = {n: tensor(a) for n, a in own.items() if a is not None}
        self.patched: dict[str, Any] = {}

    def merge(self) -> None:
        found = self.patch.get_parameters(dict(self.base), weight=self.weight)
        self.patched = {n: p + found[n] if n in found else p for n, p in self.base.items()}

    def y(self, x: Array) -> Array:
        if not self.patched:
            self.merge()
        return array(torch.nn.functional.linear(tensor(x), self.patched["weight"], self.patched.get("bias")))

    def weights(self) -> Arrays:
        return {"Wb"[n == "bias"]: array(p) for n, p in self.patched.items()}


# ── the tensors of its files ─────────────────────────────────────────────────────────────────────────────────────────


def named(case: Case, asked: Arrays) -> dict[str, Any]:
    """LoRA and DoRA, with α."""
    values = {NAMES[n]: tensor(np.ascontiguousarray(a)) for n, a in asked.items()}
    return {**values, "alpha": number(case.meta["config"]["lora_alpha"])}


def product(case: Case, asked: Arrays) -> dict[str, Any]:
    """LoHa and LoKr, whose names are HF peft's, with α."""
    keys = METHODS[case.method].KEYS
    values = {str(keys[n][0]): tensor(np.ascontiguousarray(a)) for n, a in asked.items()}
    return {**values, "alpha": number(case.meta["config"]["alpha"])}


def ia3(case: Case, asked: Arrays) -> dict[str, Any]:
    takes = METHODS["ia3"].Config(**case.meta["config"]).at("layer").takes
    return {"weight": tensor(asked["l"].reshape(-1) - 1), "on_input": torch.tensor(int(takes))}


def number(α: float) -> Any:
    return torch.tensor(float(α), dtype=torch.float64)


MAKERS: Mapping[str, Callable[[Case, Arrays], dict[str, Any]]] = {"loha": product, "lokr": product, "ia3": ia3}


def loaded() -> Layers:
    quietly()
    return Layers(
        Adapted, FIELDS, name="invokeai", version=version("invokeai"), methods=["lora", "dora", *MAKERS],
        features=["forward", "merge"], options=OPTIONS, settings=SETTINGS, versions={"torch": torch.__version__},
    )  # fmt: skip
