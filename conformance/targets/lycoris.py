"""LyCORIS: its adapters of linear layers, layer by layer.

    LoConModule      lora, rslora, dora    `lora_down` is A, `lora_up` is B, `dora_scale` [o, 1] is m; `rs_lora`: α/√r
    LohaModule       loha                  named as in HF peft
    LokrModule       lokr                  named as in HF peft; s = 1 where both factors are full: `scale_full` off
    IA3Module        ia3                   `weight` is l − 1, no matrix; `train_on_input`: what the layer takes is scaled
    DiagOFTModule    oft                   turns outputs, `side="output"`; Q = B − Bᵀ of full matrices B, whose upper
                                           triangle is u, the rest zero; exact; blocks no larger than they are many

α = 0 means α = r. DoRA (`weight_decompose`, per output: `wd_on_out`) differentiates the norm: our `detach_norm` off. A
module is made float32 and converted. It is put over a layer by `apply_to` and taken off by `restore`; a
multiplier scales ΔW.
What LyCORIS leaves open, and should make no difference, are settings here:

    bypass   run the adapter beside the layer, or rebuild ΔW
    merge    by merge_to(1) and merge_to(−1), the same with `precise`, or by onfly_merge() and onfly_restore()
    off      restore(), or a multiplier of 0

There are no embeddings, no Conv1D and no bias of B; that a base is frozen is the user's concern.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lycoris.functional import factorization  # type: ignore[import-not-found, unused-ignore]
from lycoris.modules.diag_oft import DiagOFTModule  # type: ignore[import-not-found, unused-ignore]
from lycoris.modules.ia3 import IA3Module  # type: ignore[import-not-found, unused-ignore]
from lycoris.modules.locon import LoConModule  # type: ignore[import-not-found, unused-ignore]
from lycoris.modules.loha import LohaModule  # type: ignore[import-not-found, unused-ignore]
from lycoris.modules.lokr import LokrModule  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Skip
from refpeft.conformance.targets.layers import Layers, Place
from refpeft.conformance.targets.tensors import quietly
from refpeft.conformance.targets.torch_layers import TorchLayer
from refpeft.methods import METHODS
from refpeft.ops import Array
from refpeft.rotations import skew

SETTINGS = {
    "bypass": [False, True],
    "merge": ["merge_to", "precise", "onfly"],
    "off": ["restore", "multiplier"],
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "dora": {"detach_norm": False},
    "lokr": {"scale_full": False},
    "oft": {"side": "output", "use_cayley_neumann": False, "block_share": False},
}
FIELDS = ("alpha", "decompose_both", "feedforward_modules", "oft_block_size", *OPTIONS["lokr"], *OPTIONS["oft"])
SUMS = ("lora", "rslora", "loha", "lokr")
Places = dict[str, Place]


class Adapted(TorchLayer):
    lycoris: Any

    def make(self) -> None:
        W, b = self.case.arrays["W"], self.case.arrays.get("b")
        self.settings = self.case.meta["settings"]
        dtype = getattr(torch, str(W.dtype))
        self.module = torch.nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=dtype)
        self.base = {"W": Place(self.module.weight), **({} if b is None else {"b": Place(self.module.bias)})}
        self.fill(self.base, self.case.arrays)  # whose norms m begins with
        self.lycoris, places = MAKERS[self.case.method](self.case, self.module, bypass_mode=self.settings["bypass"])
        self.lycoris.to(dtype).apply_to()
        self.places = places(self.lycoris)

    def merge(self) -> None:
        self.lycoris.restore()
        if self.settings["merge"] == "onfly":
            self.lycoris.onfly_merge()
        else:
            self.lycoris.merge_to(1.0, precise=self.settings["merge"] == "precise")

    def unmerge(self) -> None:
        if self.settings["merge"] == "onfly":
            self.lycoris.onfly_restore()
        elif self.case.method not in SUMS:
            raise Skip(f"merge_to(-1) is the inverse of a sum, which {self.case.method} is not")
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


# ── its modules: how each is made, and where its parameters are ──────────────────────────────────────────────────────


Made = tuple[Any, Callable[[Any], Places]]


def locon(case: Case, layer: Any, **more: Any) -> Made:
    how = case.meta["config"]
    made = LoConModule(
        "layer", layer, lora_dim=how["r"], alpha=how["lora_alpha"], rs_lora=how.get("use_rslora", False),
        weight_decompose=how.get("use_dora", False), **more,
    )  # fmt: skip

    def places(m: Any) -> Places:
        found = {"A": Place(m.lora_down.weight), "B": Place(m.lora_up.weight)}
        if how.get("use_dora"):
            found["m"] = Place(m.dora_scale, lambda a: a[:, None], lambda a: a[:, 0])
        return found

    return made, places


def loha(case: Case, layer: Any, **more: Any) -> Made:
    how = case.meta["config"]
    return LohaModule("layer", layer, lora_dim=how["r"], alpha=how["alpha"], **more), named(case)


def lokr(case: Case, layer: Any, **more: Any) -> Made:
    how = case.meta["config"]
    both, factor = how.get("decompose_both", False), how.get("decompose_factor", -1)
    made = LokrModule("layer", layer, lora_dim=how["r"], alpha=how["alpha"], decompose_both=both, factor=factor, **more)
    return made, named(case)


def ia3(case: Case, layer: Any, **more: Any) -> Made:
    takes = METHODS["ia3"].Config(**case.meta["config"]).at("layer").takes

    def places(m: Any) -> Places:
        return {"l": Place(m.weight, lambda l: l.reshape(-1) - 1, lambda w: w[None] if takes else w[:, None])}  # noqa: E741

    return IA3Module("layer", layer, train_on_input=takes, **more), places


def named(case: Case) -> Callable[[Any], Places]:
    """Parameters that have HF peft's names."""
    keys = METHODS[case.method].KEYS
    return lambda m: {n: Place(getattr(m, str(keys[n][0]))) for n in case.meta["params"]}


def diag_oft(case: Case, layer: Any, **more: Any) -> Made:
    """Blocks [n, p, p] with p ≤ n, of which one of two numbers is asked for."""
    n, o = len(case.arrays["u"]), layer.out_features
    p = o // n
    factor = next((f for f in range(1, o + 1) if factorization(o, f) == (p, n)), None)
    if factor is None:
        raise Skip(f"there are no {n} blocks of size {p}: blocks are not larger than they are many")
    if layer.weight.dtype == torch.float64:
        raise Skip("a matrix is inverted in float32, and multiplied with one in float64, which torch refuses")
    i, j = np.triu_indices(p, 1)

    def there(u: Array) -> Array:
        Q: Array = np.triu(skew(u)[0])
        return Q

    return DiagOFTModule("layer", layer, lora_dim=factor, **more), lambda m: {
        "u": Place(m.oft_blocks, there, lambda B: B[:, i, j])
    }


MAKERS: Mapping[str, Callable[..., Made]] = {
    **dict.fromkeys(("lora", "rslora", "dora"), locon), "loha": loha, "lokr": lokr, "ia3": ia3, "oft": diag_oft,
}  # fmt: skip


def loaded() -> Layers:
    quietly("LyCORIS")
    return Layers(
        Adapted, FIELDS, name="lycoris", version=version("lycoris-lora"), methods=list(MAKERS),
        features=["forward", "grads", "init", "change", "merge", "unmerge", "disable"],
        options=OPTIONS, settings=SETTINGS, versions={"torch": torch.__version__},
    )  # fmt: skip
