"""LyCORIS: whole models of transformers, and the lives of adapters there.

An adapter is a `LycorisNetwork`, which is what `create_lycoris` makes (without `rs_lora`, which it does not know). The
modules that it adapts are named one by one, `name_algo_map`. A network is put over a model by `apply_to`, and taken off
by `restore`; so one is active, and others are not. Before `apply_to` a network has no parameters, and a file of it is
empty: each is applied once, whether it will be active or not. Norms are trained by `train_norm`: `w_norm` is γ′ − γ,
`b_norm` β′ − β, of LayerNorm and not of RMS norms. LyCORIS's `full` trains the linear layers that are named, which
beside `train_norm` is ours of the last layers, `partial`: `diff` is W′ − W, `diff_b` b′ − b. Until `apply_to` its
parameters are differences; there W is added and taken away from the layer.

Its files have the names of kohya's scripts, `lycoris_<path with _ for .>.<parameter>`, and α, but no config: they are
read by `create_lycoris_from_weights`. What `saved-keys` compares is what they hold, by the specification's names.

Of the settings, `multiplier` and `off` are heeded: the rest is asked of layers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lycoris import LycorisNetwork, create_lycoris_from_weights  # type: ignore[import-not-found, unused-ignore]
from safetensors.torch import load_file

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays, Info, Life, Skip
from refpeft.conformance.targets.layers import HONOURED, Layers, Place
from refpeft.conformance.targets.lycoris import FIELDS, UNDONE, Settings, blocks, not_wide, places
from refpeft.conformance.targets.models import Driver, base_model, decoder_of, output, values_of
from refpeft.conformance.targets.spec import mask_of, real
from refpeft.conformance.targets.tensors import array, fill_all, tensor
from refpeft.conformance.targets.torch_layers import gradient
from refpeft.method import Targets, targeted
from refpeft.methods import METHODS
from refpeft.ops import Array

ALGOS = {
    "lora": "lora", "rslora": "lora", "dora": "lora", "loha": "loha", "lokr": "lokr", "glora": "glora", "ia3": "ia3",
    "oft": "diag-oft",
    "boft": "boft", "ln_tuning": "lora", "partial": "full",
}  # fmt: skip
NORMS = ("ln_tuning",)
WHOLE = (*NORMS, "partial")  # what they train is the model's own
DIFFERENCES = {"weight": "diff", "bias": "diff_b"}  # of `full`, in a file
FAMILIES = ("llama", "bert", "bart")
READ = {*HONOURED, *FIELDS, "target_modules", "layers", "head", "tied"}
OPTIONS = {"partial": {"head": False, "tied": False}}  # of which the embeddings and RMS norms are no part
KEPT = ("alpha", "on_input")  # in a file, besides the parameters


class Lycoris(Driver):
    """Layers as they are, and models beside them."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        own = layers.info()
        self.declared: Info = {
            **own, "levels": ["layer", "model", "lifecycle"], "methods": [*own["methods"], *WHOLE],
            "families": list(FAMILIES), "features": [*own["features"], "several", "together", "delete", "save"],
                    "options": {**own["options"], **OPTIONS},
                    "versions": {**own["versions"], "transformers": transformers.__version__},
        }  # fmt: skip

    def run(self, case: Case) -> Arrays:
        return self.layers.run(case) if case.level == "layer" else super().run(case)

    def close(self) -> None:
        self.layers.close()

    def of_case(self, case: Case) -> "Whole":
        return Whole(case)

    def of_life(self, case: Case, folder: Path) -> "Session":
        return Session(case, folder)


# ── one adapter ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Adapter:
    """A network over a model, and where the parameters of the case are in it."""

    def __init__(self, network: Any, model: Any, method: str, m: float) -> None:
        self.network, self.model, self.method, self.m = network, model, method, m
        paths = {id(module): path for path, module in model.named_modules()}
        self.modules = {paths[id(lora.org_module[0])]: lora for lora in network.loras}
        self.multiply(1.0)

    def multiply(self, by: float) -> None:
        """By m, or none of it; a LoKr that does not look at α has 1 for m."""
        self.network.set_multiplier(by * self.m)
        for lora in self.network.loras:
            if getattr(lora, "use_w1", False) and getattr(lora, "use_w2", False):
                lora.multiplier = by

    def places(self) -> dict[str, Place]:
        """By the names of the case's tensors."""
        found: dict[str, Place] = {}
        for path, lora in self.modules.items():
            if self.method in WHOLE:
                found |= (of_norm if hasattr(lora, "w_norm") else of_full)(path, lora)
            else:
                keys = METHODS[self.method].KEYS
                found |= {f"{path}.{keys[n][0]}": place for n, place in places(self.method, lora).items()}
        return found

    def write(self, values: Mapping[str, Array]) -> None:
        fill_all(self.places(), values)

    def apply(self) -> None:
        self.network.apply_to()

    def restore(self) -> None:
        self.network.restore()

    def merge(self, sign: float = 1.0) -> None:
        for lora in self.network.loras:
            lora.merge_to(sign * lora.multiplier)

    def filed(self, file: Path) -> Arrays:
        """What a file of it holds, by the case's names."""
        self.network.save_weights(str(file), None, {})
        there, found = load_file(str(file)), {}
        names = {id(p): name for name, p in self.network.named_parameters()}
        for name, place in self.places().items():
            key = names[id(place.param)]
            if key not in there:
                path, _, leaf = key.rpartition(".")
                key = f"{path}.{DIFFERENCES[leaf]}"
            found[in_file(name, self.method)] = (place.read or place.back)(array(there.pop(key))) + place.less
        return found | {name: array(a) for name, a in there.items() if name.rpartition(".")[2] not in KEPT}


def in_file(name: str, method: str) -> str:
    """HF peft keeps a copy of a norm beside it."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.ln_tuning_layers.{leaf}" if method in NORMS else name


def of_norm(path: str, lora: Any) -> dict[str, Place]:
    norm = lora.org_module[0]
    both = {"weight": (lora.w_norm, norm.weight), "bias": (lora.b_norm, norm.bias)}
    return {f"{path}.{leaf}": beside(p, array(was)) for leaf, (p, was) in both.items()}


def of_full(path: str, lora: Any) -> dict[str, Place]:
    both = {"weight": (lora.weight, lora._org_weight), "bias": (lora.bias, lora.org_bias)}
    there = {f"{path}.{leaf}": (p, array(was[0])) for leaf, (p, was) in both.items() if p is not None}
    if lora.is_diff:
        return {name: beside(p, was) for name, (p, was) in there.items()}
    return {name: Place(p, less=was) for name, (p, was) in there.items()}


def beside(param: Any, was: Array) -> Place:
    """A difference from what was."""
    return Place(param, lambda a: a - was, less=was)


def made(case: Case, model: Any, name: str) -> Adapter:
    about = case.meta["adapters"][name]
    method, config = about["method"], about["config"]
    if method not in ALGOS:
        raise Skip(f"{method} is asked layer by layer")
    for field in config:
        if field not in READ:
            raise Skip(f"there is no field {field!r} here")
    how = Settings(case, config)
    own = {
        path: {"algo": ALGOS[method], **options(case, name, path, module)}
        for path, module in chosen(case, name, model).items()
    }
    LycorisNetwork.apply_preset(
        {
            "enable_conv": False, "target_module": [], "target_name": [], "exclude_name": [], "module_algo_map": {},
            "name_algo_map": {re.escape(path) + "$": more for path, more in own.items()},
        }
    )  # fmt: skip
    network = LycorisNetwork(model, **arguments_of(method, how))
    if not network.loras:
        raise ValueError(f"target_modules: no module is called {config['target_modules']}")
    adapter = Adapter(network, model, method, how.m)
    for lora in network.loras:
        lora.to(model.dtype)
    adapter.write(values_of(case, name + "/"))
    if method != "partial":
        adapter.apply()
        adapter.restore()
    return adapter


def arguments_of(method: str, how: Settings) -> dict[str, Any]:
    if method in NORMS:
        return {"lora_dim": 0, "train_norm": True}
    own = {"ia3": {}, "oft": {}, "boft": {"rescaled": True}, "partial": {"train_norm": True}}
    if method in own:
        return own[method]
    return {
        "lora_dim": how["r"], "alpha": how.alpha, "rs_lora": how.get("use_rslora"),
        "weight_decompose": how.get("use_dora"), "wd_on_out": True, "decompose_both": how.get("decompose_both"),
        "factor": how.get("decompose_factor", -1),
    }  # fmt: skip


def chosen(case: Case, name: str, model: Any) -> dict[str, Any]:
    """The modules by their paths."""
    about = case.meta["adapters"][name]
    method, config = about["method"], about["config"]
    if method in WHOLE:
        paths = {tensor.rpartition(".")[0] for tensor in values_of(case, name + "/")}
        whole = {path: m for path, m in model.named_modules() if path in paths}
        if not all(isinstance(m, torch.nn.LayerNorm | torch.nn.Linear) for m in whole.values()):
            raise Skip("RMS norms are not supported")
        return whole
    cfg = Targets(target_modules=config["target_modules"])
    return {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and targeted(cfg, path)}


def options(case: Case, name: str, path: str, module: Any) -> dict[str, Any]:
    """What one module has that others may not have."""
    about = case.meta["adapters"][name]
    if about["method"] == "ia3":
        return {"train_on_input": METHODS["ia3"].Config(**about["config"]).at(path).takes}
    if about["method"] == "boft":
        not_wide(module)
        return {"dim": case.arrays[f"{name}/{path}.{METHODS['boft'].KEYS['C'][0]}"].shape[-1]}
    if about["method"] == "oft":
        return {"dim": blocks(len(case.arrays[f"{name}/{path}.{METHODS['oft'].KEYS['u'][0]}"]), module)}
    return {}


# ── a whole model ────────────────────────────────────────────────────────────────────────────────────────────────────


class Whole:
    def __init__(self, case: Case) -> None:
        self.case, self.ids = case, case.arrays["ids"]
        self.model, self.is_merged = base_model(case), False
        self.adapters = {name: made(case, self.model, name) for name in case.meta["active"]}
        for adapter in self.adapters.values():
            adapter.apply()

    def said(self) -> Any:
        return output(self.model, self.ids, self.case.arrays.get("attention_mask"), **decoder_of(self.case))

    def real(self, y: Any) -> Array:
        return real(array(y), mask_of(self.case))

    def logits(self) -> Arrays:
        return {"logits": self.real(self.said())}

    def other_logits(self) -> Arrays:
        ids, more = self.case.arrays.get("other_ids", self.ids), decoder_of(self.case, other=True)
        return {"other_logits": array(output(self.model, ids, **more))}

    def grads(self) -> Arrays:
        self.said().backward(tensor(self.case.arrays["dout"]))
        return {
            f"grad/{name}/{k}": place.back(gradient(place.param))
            for name, adapter in self.adapters.items()
            for k, place in adapter.places().items()
        }

    def merge(self) -> None:
        if not self.is_merged:
            for adapter in self.adapters.values():
                adapter.restore()
                adapter.merge()
        self.is_merged = True

    def merged(self) -> Arrays:
        self.merge()
        own = self.model.state_dict()
        asked = {n: a.shape for n, a in values_of(self.case, "model/").items()}
        return {f"merged/{n}": array(own[n]).reshape(shape) for n, shape in asked.items()}

    def merged_logits(self) -> Arrays:
        self.merge()
        return {"merged_logits": self.real(self.said())}


# ── a life ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Session(Life):
    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.off = case.meta["settings"]["off"]
        self.model = base_model(case)
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.is_merged = False

    def logits(self) -> Array:
        return array(output(self.model, self.case.arrays["ids"], **decoder_of(self.case)))

    def now(self) -> list[Adapter]:
        return [self.adapters[name] for name in self.active]

    def add(self, adapter: str) -> None:
        self.adapters[adapter] = made(self.case, self.model, adapter)
        if not self.active:
            self.activate([adapter])

    def activate(self, adapters: Sequence[str]) -> None:
        self.taken_off()
        self.active = list(adapters)
        self.put_on()

    def put_on(self) -> None:
        for adapter in self.now():
            adapter.apply()

    def taken_off(self) -> None:
        for adapter in reversed(self.now()):
            adapter.restore()

    def merge(self, safe: bool = False) -> None:
        if safe:
            raise Skip("merge_to does not look for nan")
        if self.is_merged:
            raise Skip("merge_to adds what it is told to, and does not know what was merged")
        self.taken_off()
        for adapter in self.now():
            adapter.merge()
        self.is_merged = True

    def refused_merge(self, adapter: str) -> Arrays:
        raise Skip("merge_to does not look for nan")

    def unmerge(self) -> None:
        if self.case.method not in UNDONE:
            raise Skip(f"merge_to(-1) is the inverse where ΔW does not depend on W, as that of {self.case.method} does")
        for adapter in self.now():
            adapter.merge(-1.0)
        self.is_merged = False
        self.put_on()

    def disable(self) -> None:
        if self.off == "restore":
            self.taken_off()
        else:
            for adapter in self.now():
                adapter.multiply(0.0)

    def enable(self) -> None:
        if self.off == "restore":
            self.put_on()
        else:
            for adapter in self.now():
                adapter.multiply(1.0)

    def delete(self, adapter: str) -> None:
        self.taken_off()
        del self.adapters[adapter]
        self.active = [name for name in self.active if name != adapter] or list(self.adapters)[:1]
        self.put_on()

    def save(self, adapter: str) -> Arrays:
        found = self.adapters[adapter].filed(self.folder / f"{adapter}.safetensors")
        return {f"file/{name}": a for name, a in found.items()}

    def load(self, adapters: Sequence[str]) -> None:
        """From the files alone: into a new model."""
        m = {name: self.adapters[name].m for name in adapters}
        self.model, self.adapters, self.active = base_model(self.case), {}, []
        for name in adapters:
            network, _ = create_lycoris_from_weights(m[name], str(self.folder / f"{name}.safetensors"), self.model)
            for lora in network.loras:
                lora.to(self.model.dtype)
            self.adapters[name] = Adapter(network, self.model, self.case.method, m[name])
        self.activate(adapters[:1])

    def change(self, adapter: str) -> None:
        self.adapters[adapter].write(values_of(self.case, f"new-{adapter}/"))
