"""LyCORIS: its adapters of linear layers, layer by layer.

    LoConModule      lora, rslora, dora    `lora_down` is A, `lora_up` is B, `dora_scale` [o, 1] is m; `rs_lora`: α/√r
    LohaModule       loha                  named as in HF peft; with cores `use_tucker`, of convolutions
    LokrModule       lokr                  named as in HF peft; s = 1 where both factors are full: `scale_full` off
    GLoRAModule      glora                 `a1` [i, r] is A_u, `a2` A_d, `b1` B_u, `b2` B_d; `rs_lora`: α/√r
    DyLoraModule     dylora                blocks of A and B, of which the last one is trained: `frozen`; s = α/(b/c),
                                           so that α is α/c; the b that it draws is told
    IA3Module        ia3                   `weight` is l − 1, no matrix; `train_on_input`: of what the layer takes
    DiagOFTModule    oft                   turns outputs, `side="output"`; Q = B − Bᵀ of full matrices B, whose upper
                                           triangle is u, the rest zero; exact; blocks no larger than they are many
    ButterflyOFTModule     boft            turns outputs too, by 2^(m−1) blocks, m factors; C = −2 B, where row and
                                           column 2 j + g of B are those of entry j of half g here; `rescale` is s

α = 0 means α = r. A module has a `multiplier` m besides: ΔW is m of what it would be. With α/m and m it is what
it is with α, where there is an α. DoRA (`weight_decompose`, per output: `wd_on_out`) differentiates the norm: our
`detach_norm` off. A module is made float32 and converted. It is put over a layer by `apply_to` and taken off by
`restore`. What LyCORIS leaves open, and should make no difference, are settings here:

    bypass      run the adapter beside the layer, or rebuild ΔW
    merge       by merge_to(m) and merge_to(−m), the same with `precise`, or by onfly_merge(m) and onfly_restore()
    off         restore(), or a multiplier of 0
    multiplier  m

There are no embeddings, no Conv1D and no bias of B; that a base is frozen is the user's concern.
Whole models are in `lycoris_models`, where transformers is there too.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

if find_spec("lycoris.functional"):  # older releases have other modules: see `lycoris_loha`
    from lycoris.functional import factorization  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.boft import ButterflyOFTModule  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.diag_oft import DiagOFTModule  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.dylora import DyLoraModule  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.glora import GLoRAModule  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.ia3 import IA3Module  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.locon import LoConModule  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.loha import LohaModule  # type: ignore[import-not-found, unused-ignore]
    from lycoris.modules.lokr import LokrModule  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Skip, Target
from refpeft.conformance.targets.layers import Layers, Place
from refpeft.conformance.targets.tensors import fill, quietly
from refpeft.conformance.targets.torch_layers import Patches, TorchLayer
from refpeft.methods import METHODS
from refpeft.ops import Array
from refpeft.rotations import skew

SETTINGS = {
    "bypass": [False, True],
    "merge": ["merge_to", "precise", "onfly"],
    "off": ["restore", "multiplier"],
    "multiplier": [1.0, 0.5],
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "dora": {"detach_norm": False},
    "dylora": {"frozen": True},
    "lokr": {"scale_full": False},
    "oft": {"side": "output", "use_cayley_neumann": False, "block_share": False},
    "boft": {"side": "output", "boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 2},
}
FIELDS = (
    "alpha", "taps", "decompose_both", "decompose_factor", "feedforward_modules", "rank", "block_size", "frozen",
    "oft_block_size", *OPTIONS["lokr"],
    *OPTIONS["oft"], *OPTIONS["boft"], "num_cayley_neumann_terms",  # of which an exact transform has none
)  # fmt: skip
SUMS = ("lora", "rslora", "loha", "lokr", "glora", "dylora")
UNDONE = ("lora", "rslora", "loha", "lokr", "dylora")  # by merge_to(−m): ΔW does not depend on W
CORES = ("T1", "T2")  # [r, r, k, l] there, as the convolution has its places
Places = dict[str, Place]


class Settings:
    """The config of a case, and m."""

    def __init__(self, case: Case, config: Mapping[str, Any] | None = None) -> None:
        self.case = case
        self.config = case.meta["config"] if config is None else config
        self.m: float = case.meta["settings"].get("multiplier", 1.0) if case.method in SUMS else 1.0

    def __getitem__(self, name: str) -> Any:
        return self.config[name]

    def get(self, name: str, default: Any = False) -> Any:
        return self.config.get(name, default)

    @property
    def taps(self) -> int:
        return int(self.config.get("taps", 1))

    @property
    def alpha(self) -> float:
        """α/m"""
        return float(self["lora_alpha" if "lora_alpha" in self.config else "alpha"]) / self.m

    def multiplier(self, module: Any) -> float:
        """m, but 1 where α is not looked at."""
        return 1.0 if getattr(module, "use_w1", False) and getattr(module, "use_w2", False) else self.m


class Adapted(TorchLayer):
    lycoris: Any

    def make(self) -> None:
        W, b = self.case.arrays["W"], self.case.arrays.get("b")
        self.settings = self.case.meta["settings"]
        dtype = getattr(torch, str(W.dtype))
        how = Settings(self.case)
        if how.taps > 1:
            self.module = Patches(W, b, how.taps)
        else:
            self.module = torch.nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=dtype)
        layer = getattr(self.module, "layer", self.module)
        self.base = {"W": placed(layer.weight, W), **({} if b is None else {"b": Place(layer.bias)})}
        fill(self.base, self.case.arrays)  # whose norms m begins with
        self.lycoris = MAKERS[self.case.method](how, layer, bypass_mode=self.settings["bypass"])
        self.lycoris.multiplier = self.multiplier = how.multiplier(self.lycoris)
        self.lycoris.to(dtype).apply_to()
        self.places = places(self.case.method, self.lycoris)
        self.places |= {n: placed(self.places[n].param, self.case.arrays[n]) for n in CORES if n in self.places}

    def merge(self) -> None:
        self.lycoris.restore()
        if self.settings["merge"] == "onfly":
            self.lycoris.onfly_merge(self.multiplier)
        else:
            self.lycoris.merge_to(self.multiplier, precise=self.settings["merge"] == "precise")

    def unmerge(self) -> None:
        if self.settings["merge"] == "onfly":
            self.lycoris.onfly_restore()
        elif self.case.method not in UNDONE:
            raise Skip(f"merge_to(-1) is the inverse where ΔW does not depend on W, as that of {self.case.method} does")
        else:
            self.lycoris.merge_to(-self.multiplier, precise=self.settings["merge"] == "precise")
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
            self.lycoris.multiplier = self.multiplier


# ── its modules: how each is made, and where its parameters are ──────────────────────────────────────────────────────


def locon(how: Settings, layer: Any, **more: Any) -> Any:
    return LoConModule(
        "layer", layer, lora_dim=how["r"], alpha=how.alpha, rs_lora=how.get("use_rslora"),
        weight_decompose=how.get("use_dora"), **more,
    )  # fmt: skip


def loha(how: Settings, layer: Any, **more: Any) -> Any:
    return LohaModule("layer", layer, lora_dim=how["r"], alpha=how.alpha, use_tucker=how.taps > 1, **more)


def lokr(how: Settings, layer: Any, **more: Any) -> Any:
    both, factor = how.get("decompose_both"), how.get("decompose_factor", -1)
    return LokrModule("layer", layer, lora_dim=how["r"], alpha=how.alpha, decompose_both=both, factor=factor, **more)


def glora(how: Settings, layer: Any, **more: Any) -> Any:
    return GLoRAModule("layer", layer, lora_dim=how["r"], alpha=how.alpha, rs_lora=how.get("use_rslora"), **more)


def dylora(how: Settings, layer: Any, **more: Any) -> Any:
    b, c = how["rank"], how["block_size"]
    made = DyLoraModule("layer", layer, lora_dim=how["r"], alpha=how.alpha / c, block_size=c, **more)
    made.get_random_rank_weight = lambda: made.get_weight(b - c)
    return made


def ia3(how: Settings, layer: Any, **more: Any) -> Any:
    takes = METHODS["ia3"].Config(**how.config).at("layer").takes
    return IA3Module("layer", layer, train_on_input=takes, **more)


def diag_oft(how: Settings, layer: Any, **more: Any) -> Any:
    return DiagOFTModule("layer", layer, lora_dim=blocks(len(how.case.arrays["u"]), layer), **more)


def blocks(n: int, layer: Any) -> int:
    """What to ask for, to get n blocks [p, p]: of p ≤ n one is asked for."""
    o = layer.out_features
    p = o // n
    factor = next((f for f in range(1, o + 1) if factorization(o, f) == (p, n)), None)
    if factor is None:
        raise Skip(f"there are no {n} blocks of size {p}: blocks are not larger than they are many")
    not_wide(layer)
    return factor


def not_wide(layer: Any) -> None:
    if layer.weight.dtype == torch.float64:
        raise Skip("a matrix is inverted in float32, and multiplied with one in float64, which torch refuses")


def boft(how: Settings, layer: Any, **more: Any) -> Any:
    not_wide(layer)
    return ButterflyOFTModule("layer", layer, lora_dim=how.case.arrays["C"].shape[-1], rescaled=True, **more)


MAKERS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("lora", "rslora", "dora"), locon), "loha": loha, "lokr": lokr, "glora": glora,
    "dylora": dylora, "ia3": ia3, "oft": diag_oft, "boft": boft,
}  # fmt: skip


# ── where their parameters are ───────────────────────────────────────────────────────────────────────────────────────


def placed(param: Any, like: Array) -> Place:
    """The same numbers; a convolution has a shape of its own."""
    if param.ndim == 2:
        return Place(param)
    return Place(param, lambda a: a.reshape(param.shape), lambda a: a.reshape(like.shape))


def places(method: str, m: Any) -> Places:
    return PLACES.get(method, products)(m)


def products(m: Any) -> Places:
    """LoHa's and LoKr's, which have HF peft's names."""
    keys = {str(pair[0]): n for method in ("loha", "lokr") for n, pair in METHODS[method].KEYS.items()}
    return {keys[name]: Place(p) for name, p in m.named_parameters()}


def of_locon(m: Any) -> Places:
    found = {"A": Place(m.lora_down.weight), "B": Place(m.lora_up.weight)}
    scaled = {"m": Place(m.dora_scale, lambda a: a[:, None], lambda a: a[:, 0])} if hasattr(m, "dora_scale") else {}
    return found | scaled


def of_glora(m: Any) -> Places:
    return {
        name: Place(getattr(m, str(keys[0]).partition(".")[0]).weight) for name, keys in METHODS["glora"].KEYS.items()
    }


class Blocks:
    """Parameters side by side, as if they were one."""

    def __init__(self, blocks: Any, axis: int) -> None:
        self.blocks, self.axis = list(blocks), axis

    def joined(self, each: Callable[[Any], Any]) -> Any:
        return torch.cat([each(p) for p in self.blocks], dim=self.axis)

    @property
    def data(self) -> Any:
        return self.joined(lambda p: p.data)

    @data.setter
    def data(self, value: Any) -> None:
        for p, part in zip(self.blocks, value.split(self.blocks[0].shape[self.axis], dim=self.axis), strict=True):
            p.data = part.clone()

    @property
    def shape(self) -> Any:
        return self.data.shape

    @property
    def grad(self) -> Any:
        return self.joined(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)

    @property
    def requires_grad(self) -> bool:
        return all(p.requires_grad for p in self.blocks)

    def detach(self) -> Any:
        return self.data


def of_dylora(m: Any) -> Places:
    return {"A": Place(Blocks(m.down_list, 0)), "B": Place(Blocks(m.up_list, 1))}


def of_ia3(m: Any) -> Places:
    takes = m.train_input
    return {"l": Place(m.weight, lambda l: l.reshape(-1) - 1, lambda w: w[None] if takes else w[:, None], 1)}  # noqa: E741


def of_oft(m: Any) -> Places:
    i, j = np.triu_indices(m.oft_blocks.shape[-1], 1)

    def there(u: Array) -> Array:
        Q: Array = np.triu(skew(u)[0])
        return Q

    return {"u": Place(m.oft_blocks, there, lambda B: B[:, i, j])}


def of_boft(m: Any) -> Places:
    p = m.block_size
    ours = np.arange(p).reshape(2, -1).T.reshape(-1)  # which row and column of C each of B is
    theirs = np.argsort(ours)

    def turned(a: Array, k: Array) -> Array:
        return a[..., k, :][..., k]

    C = Place(
        m.oft_blocks, lambda C: turned(C, ours) / -2, lambda dB: turned(dB, theirs) / -2,
        read=lambda B: turned(B, theirs) * -2,
    )  # fmt: skip
    return {"C": C, "s": Place(m.rescale)}


PLACES: Mapping[str, Callable[[Any], Places]] = {
    **dict.fromkeys(("lora", "rslora", "dora"), of_locon), "glora": of_glora, "dylora": of_dylora, "ia3": of_ia3,
    "oft": of_oft, "boft": of_boft,
}  # fmt: skip


def loaded() -> Target:
    quietly("LyCORIS")
    if not find_spec("lycoris.functional"):
        from refpeft.conformance.targets.lycoris_loha import functions

        return functions()
    layers = Layers(
        Adapted, FIELDS, name="lycoris", version=version("lycoris-lora"), methods=list(MAKERS),
        features=["forward", "grads", "init", "change", "merge", "unmerge", "disable", "cores"],
        options=OPTIONS, settings=SETTINGS, versions={"torch": torch.__version__},
    )  # fmt: skip
    if find_spec("transformers") is None:
        return layers
    from refpeft.conformance.targets.lycoris_models import Lycoris

    return Lycoris(layers)
