"""LyCORIS: its LoRA for linear layers (`LoConModule`), layer by layer.

`lora_down` is A, `lora_up` is B, `dora_scale` [o, 1] is m; s = α/r, with `rs_lora` α/√r, and α = 0 means α = r. Its
DoRA (`weight_decompose`, per output: `wd_on_out`) differentiates the norm: our `detach_norm` off. A module is made
float32 and converted. It is put over a layer by `apply_to` and taken off by `restore`; a multiplier scales ΔW.
What it leaves open, and should make no difference, are settings here:

    bypass   run the adapter beside the layer, or rebuild ΔW
    merge    by merge_to(1) and merge_to(−1), the same with `precise`, or by onfly_merge() and onfly_restore()
    off      restore(), or a multiplier of 0

There is no LoRA of embeddings or Conv1D, and no bias of B; that a base is frozen is the user's concern.
"""

from importlib.metadata import version
from typing import Any

import torch
from lycoris.modules.locon import LoConModule  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.targets.base import Skip
from refpeft.conformance.targets.layers import Layers, Place
from refpeft.conformance.targets.tensors import quietly
from refpeft.conformance.targets.torch_layers import TorchLayer

SETTINGS = {
    "bypass": [False, True],
    "merge": ["merge_to", "precise", "onfly"],
    "off": ["restore", "multiplier"],
}


class LoCon(TorchLayer):
    lycoris: Any

    def make(self) -> None:
        W, b, how = self.case.arrays["W"], self.case.arrays.get("b"), self.config
        self.settings = self.case.meta["settings"]
        dtype = getattr(torch, str(W.dtype))
        self.module = torch.nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=dtype)
        self.base = {"W": Place(self.module.weight), **({} if b is None else {"b": Place(self.module.bias)})}
        self.fill(self.base, self.case.arrays)  # whose norms m begins with
        self.lycoris = LoConModule(
            "layer", self.module, lora_dim=how["r"], alpha=how["lora_alpha"], rs_lora=how.get("use_rslora", False),
            weight_decompose=how.get("use_dora", False), bypass_mode=self.settings["bypass"],
        ).to(dtype)  # fmt: skip
        self.lycoris.apply_to()
        self.places = {"A": Place(self.lycoris.lora_down.weight), "B": Place(self.lycoris.lora_up.weight)}
        if how.get("use_dora"):
            self.places["m"] = Place(self.lycoris.dora_scale, lambda a: a[:, None], lambda a: a[:, 0])

    def merge(self) -> None:
        self.lycoris.restore()
        if self.settings["merge"] == "onfly":
            self.lycoris.onfly_merge()
        else:
            self.lycoris.merge_to(1.0, precise=self.settings["merge"] == "precise")

    def unmerge(self) -> None:
        if self.settings["merge"] == "onfly":
            self.lycoris.onfly_restore()
        elif self.config.get("use_dora"):
            raise Skip("merge_to(-1) is the inverse of a sum, which DoRA is not")
        else:
            self.lycoris.merge_to(-1.0, precise=self.settings["merge"] == "precise")
        self.lycoris.apply_to()

    def disable(self) -> None:
        if self.settings["off"] == "restore":
            self.lycoris.restore()
        else:
            self.lycoris.multiplier = 0.0

    def enable(self) -> None:
        if self.settings["off"] == "restore":
            self.lycoris.apply_to()
        else:
            self.lycoris.multiplier = 1.0


def loaded() -> Layers:
    quietly("LyCORIS")
    return Layers(
        LoCon, name="lycoris", version=version("lycoris-lora"), methods=["lora", "rslora", "dora"],
        features=["forward", "grads", "init", "change", "merge", "unmerge", "disable"],
        options={"dora": {"detach_norm": False}}, settings=SETTINGS, versions={"torch": torch.__version__},
    )  # fmt: skip
