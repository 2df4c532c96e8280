"""HF peft, as installed: any version from 0.4 on. What it can do is found out by looking, not by its version.

Layer cases adapt a module that has one layer; models are transformers' own, made from the case's config, with eager
attention. Parameters are copied in, and nothing is downloaded.
"""

import contextlib
import inspect
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from refpeft.conformance import tiny
from refpeft.conformance.case import DTYPES, Case, read
from refpeft.conformance.targets import models
from refpeft.conformance.targets import peft_prompts as prompts
from refpeft.conformance.targets.base import FEATURES, Arrays, Life, Skip
from refpeft.conformance.targets.models import (
    Driver,
    base_model,
    buildable,
    decoded,
    decoder_of,
    model_buffers,
    output,
    steps_of,
    values_of,
)
from refpeft.conformance.targets.spec import LATIN, mask_of, real
from refpeft.conformance.targets.tensors import array, quietly, tensor
from refpeft.conformance.targets.torch_layers import Patches
from refpeft.methods import METHODS
from refpeft.methods.lora import FACTORS
from refpeft.ops import Array

PREFIX = "base_model.model."
OWN = (  # what holds an adapter's parameters by its name
    r"lora_[A-Za-z_]+|ia3_l|vera_lambda_[bd]|hada_\w+|lokr_\w+|oft_R|oft_embedding_R|boft_[Rs]|ln_tuning_layers"
    r"|trainable_tokens_delta"
)
FIELDS = frozenset(inspect.signature(peft.LoraConfig).parameters)
CLASSES = {  # of methods that are no LoRA
    "ln_tuning": "LNTuningConfig", "trainable_tokens": "TrainableTokensConfig", "ia3": "IA3Config",
    "vera": "VeraConfig", "adalora": "AdaLoraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig", "oft": "OFTConfig",
    "boft": "BOFTConfig",
}  # fmt: skip
TURNED = ("loha", "lokr", "oft", "boft")  # methods that it lacks where a layer stores W as [i, o]
FLAG = {"rslora": "use_rslora", "dora": "use_dora"}
NEEDED = {"bias": "lora_bias", "patterns": "alpha_pattern"}  # features that stand or fall with a config field

ABSENT = ("rows", "pull", "butterfly", "nf4")  # features that no version has, or only with CUDA, or a target of its own


class Peft(Driver):
    def __init__(self) -> None:
        quietly("transformers")
        self.declared = {
            "name": "peft", "version": peft.__version__, "levels": ["layer", "model", "lifecycle", "story"],
            "methods": ["lora", *(method for method, flag in FLAG.items() if flag in FIELDS),
                        *(method for method, name in {**CLASSES, **prompts.CLASSES}.items() if hasattr(peft, name))],
            "dtypes": list(DTYPES),
            "options": {**prompts.OPTIONS, "oft": {"side": "input"},
                        "boft": {"side": "input", "boft_n_butterfly_factor": 1}},
            "features": [f for f in FEATURES if f not in ABSENT and NEEDED.get(f, "r") in FIELDS
                         and (f != "together" or together()) and (f != "convert" or conversion())
                         and (f != "swap" or find_spec("peft.utils.hotswap"))],
            "without": {method: lacking(method) for method in ("lora", *FLAG, *CLASSES, *prompts.CLASSES)},
            "families": [family for family in tiny.FAMILIES if buildable(family)],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip

    def of_case(self, case: Case) -> "Layer | Whole":
        return Layer(case) if case.level == "layer" else Whole(case)

    def of_life(self, case: Case, folder: Path) -> "Session":
        from refpeft.conformance.targets.peft_stories import Prompted, Story

        if case.level != "story":
            return Session(case, folder)
        return Prompted(case, folder) if case.method in prompts.CLASSES else Story(case, folder)


def lacking(method: str) -> list[str]:
    """Features that it lacks for a method."""
    found = [] if method == "ia3" else ["average"]
    if method in FLAG and not adapts_embeddings(FLAG[method]):
        found.append("embedding")
    if method in prompts.CLASSES:
        found += ["together", "train-loaded"]  # one at a time, and for good
    if method in TURNED:
        found += ["conv1d", "embedding", *(["tied"] if method == "oft" else [])]
    return found + (["train-any"] if method == "adalora" else [])


# ── what this version has, found out by trying ───────────────────────────────────────────────────────────────────────


def adapts_embeddings(flag: str) -> bool:
    """DoRA on embeddings came later than DoRA, and was refused until then."""
    if flag not in FIELDS:
        return False
    try:
        peft.get_peft_model(Toy(torch.nn.Embedding(3, 2)), lora_config({flag: True}, target_modules=["layer"]))
    except ValueError:
        return False
    return True


def conversion() -> str | None:
    """What save_pretrained calls the folder of an adapter before training, which is to be subtracted."""
    there = inspect.signature(peft.PeftModel.save_pretrained).parameters
    return next((n for n in ("path_initial_model_for_weight_conversion", "convert_pissa_to_lora") if n in there), None)


def together() -> bool:
    """Before several adapters could be active at once, a list of names was taken for one name."""
    model = peft.get_peft_model(Toy(torch.nn.Linear(2, 2)), lora_config({}, target_modules=["layer"]), "one")
    model.add_adapter("two", lora_config({}, target_modules=["layer"]))
    try:
        model.base_model.set_adapter(["one", "two"])
        model(torch.zeros(1, 2))
    except TypeError:
        return False
    return True


# ── numbers, configs, names ──────────────────────────────────────────────────────────────────────────────────────────


def lora_config(fields: Mapping[str, Any], **more: Any) -> Any:
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise Skip(f"peft {peft.__version__} has no config field {unknown[0]!r}")
    return peft.LoraConfig(**fields, **more)


def matrix_config(method: str, fields: Mapping[str, Any], turned: bool, **more: Any) -> Any:
    """Of a method that adapts matrices, which are stored turned by GPT-2's layers."""
    if method not in CLASSES:
        return lora_config(fields, fan_in_fan_out=turned, **more)
    make = getattr(peft, CLASSES[method])
    if turned and method in TURNED:
        raise Skip(f"peft {peft.__version__} has no {make.__name__} for Conv1D")
    if fields.get("side", "input") != "input":
        raise Skip("OFT turns inputs there")
    if fields.get("boft_n_butterfly_factor", 1) != 1:
        raise Skip("more than one butterfly factor needs a CUDA extension there")
    cores = {"use_effective_conv2d": True} if fields.get("taps", 1) > 1 else {}
    fields = {n: v for n, v in fields.items() if n not in ("side", "taps")} | cores
    own = {"fan_in_fan_out": turned} if "fan_in_fan_out" in inspect.signature(make).parameters else {}
    return make(**fields, **own, **more)


def parameters(model: Any, adapter: str) -> dict[str, Any]:
    """An adapter's parameters, under the names they have in its file (without the prefix)."""
    if prompts.prompted(model, adapter):
        return prompts.parameters(model, adapter)
    found = {}
    for full, p in model.named_parameters():
        name = full.removeprefix(PREFIX)
        own = name.replace(f".modules_to_save.{adapter}.", ".")
        own = re.sub(rf"\.({OWN})\.{re.escape(adapter)}(?=\.|$)", r".\1", own)
        if own != name:
            own = own.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            found[own.replace(".ln_tuning_layers.", ".")] = p
    return found


def write(model: Any, adapter: str, values: Mapping[str, Array]) -> None:
    """Values into an adapter's parameters, in place; all of them, and no others."""
    there = parameters(model, adapter)
    if there.keys() != values.keys():
        odd = sorted(there.keys() ^ values.keys())[0]
        raise ValueError(f"the parameters of the adapter are not those of the specification: {odd}")
    with torch.no_grad():
        for name, p in there.items():
            if p.dtype == tensor(values[name]).dtype:
                p.copy_(tensor(values[name]).reshape(p.shape))
            else:
                p.data = tensor(values[name]).reshape(p.shape).clone()


# ── one layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Toy(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class Layer:
    def __init__(self, case: Case) -> None:
        self.case, a = case, case.arrays
        self.kind = case.meta["layer"]["kind"]
        config = matrix_config(case.method, case.meta["config"], self.kind == "conv1d", target_modules=["layer"])
        self.taps = case.meta["config"].get("taps", 1)
        self.model = peft.get_peft_model(self.host(a["W"], a.get("b")), config).eval()
        self.x = tensor(a["x"])
        keys = METHODS[case.method].KEYS
        self.short = {LATIN.get(n, n): pair[self.kind == "embedding"] for n, pair in keys.items()}
        if "fresh" not in case.meta["want"]:
            self.write("")

    def host(self, W: Array, b: Array | None) -> Any:
        return Toy(plain(self.kind, W, b)) if self.taps == 1 else Patches(W, b, self.taps)

    def write(self, prefix: str) -> None:
        values = {f"layer.{self.short[n]}": self.case.arrays[prefix + n] for n in self.case.meta["params"]}
        write(self.model, "default", values)

    def own(self) -> dict[str, Any]:
        """A, B, … by their names in cases."""
        there = parameters(self.model, "default")
        return {n: there[f"layer.{s}"] for n, s in self.short.items() if f"layer.{s}" in there}

    @property
    def base(self) -> Any:
        layer = self.model.base_model.model.layer
        return getattr(layer, "base_layer", layer)

    def y(self, x: Any = None) -> Array:
        return array(self.model(self.x if x is None else x))

    def output(self) -> Arrays:
        return {"y": self.y()}

    def first_row(self) -> Arrays:
        return {"y_row": self.y(self.x[:1])}

    def grads(self) -> Arrays:
        x = self.x if self.kind == "embedding" else self.x.clone().requires_grad_()
        self.model(x).backward(tensor(self.case.arrays["dy"]))
        found = {f"d{n}": array(p.grad).reshape(self.case.arrays[n].shape) for n, p in self.own().items()}
        return found if self.kind == "embedding" else {"dx": array(x.grad), **found}

    def trained(self) -> Arrays:
        base = {"W": self.base.weight, "b": getattr(self.base, "bias", None)}
        there = {**base, **self.own()}
        return {
            f"trained/{n}": np.array(p.requires_grad) for n, p in there.items() if p is not None and n in self.asked
        }

    @property
    def asked(self) -> Sequence[str]:
        return ["W", *(["b"] if "b" in self.case.arrays else []), *self.case.meta["params"]]

    def fresh(self) -> Arrays:
        return {"y_fresh": self.y(), **{f"shape/{n}": np.array(p.shape) for n, p in self.own().items()}}

    def changed(self) -> Arrays:
        y = self.y()
        self.write("new/")
        return {"y": y, "y_changed": self.y()}

    def weights(self, state: str, layer: Any = None, y: Array | None = None) -> Arrays:
        there = layer or self.base
        W = array(there.weight)
        W = W if self.taps == 1 else W.reshape(self.case.arrays["W"].shape)
        found = {f"W_{state}": W, f"y_{state}": self.y() if y is None else y}
        bias = getattr(there, "bias", None)
        return found if bias is None or "b" not in self.asked else {**found, f"b_{state}": array(bias)}

    def merged(self) -> Arrays:
        self.model.merge_adapter()
        return self.weights("merged")

    def unmerged(self) -> Arrays:
        self.model.merge_adapter()
        self.model.unmerge_adapter()
        return self.weights("unmerged")

    def unloaded(self) -> Arrays:
        plain = self.model.merge_and_unload()
        return self.weights("unloaded", plain.layer, array(plain(self.x)))

    def disabled(self) -> Arrays:
        with self.model.disable_adapter():
            y = self.y()
        return {"y_disabled": y, "y_enabled": self.y()}


def plain(kind: str, W: Array, b: Array | None) -> Any:
    """torch's or transformers' layer with these weights."""
    layer: Any
    if kind == "embedding":
        layer = torch.nn.Embedding(*W.shape)
    elif kind == "conv1d":
        make: Any = Conv1D
        layer = make(W.shape[1], W.shape[0])
    else:
        layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    layer.weight = torch.nn.Parameter(tensor(W).clone())
    if kind != "embedding" and (b is not None or kind == "conv1d"):
        layer.bias = torch.nn.Parameter(tensor(np.zeros(W.shape[1], W.dtype) if b is None else b).clone())
    return layer


# ── a whole model ────────────────────────────────────────────────────────────────────────────────────────────────────


def adapter_config(case: Case, name: str) -> Any:
    about = case.meta["adapters"][name]
    if about["method"] in prompts.CLASSES:
        return prompts.config(case, name)
    return matrix_config(about["method"], about["config"], case.meta["model"]["model_type"] == "gpt2")


def trained_of(case: Case, name: str) -> Arrays:
    still = case.meta["adapters"][name].get("frozen", ())
    return {n: a for n, a in values_of(case, name + "/").items() if n not in still}


def add(case: Case, model: Any, name: str) -> Any:
    config = adapter_config(case, name)
    if getattr(config, "init_lora_weights", None) in FACTORS and case.meta["dtype"] == "float64":
        raise Skip("factors of float64 weights are refused")
    if case.method == "adalora":  # of which one at a time can be trained
        config.inference_mode = isinstance(model, peft.PeftModel)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    if case.method == "vera":
        for n in case.meta["adapters"][name]["frozen"]:  # A and B, which are no parameters
            getattr(model.base_model, n)[name] = tensor(case.arrays[f"{name}/{n}"])
    if getattr(config, "init_lora_weights", None) in FACTORS:
        start(case, model, name, name)
    write(model, name, trained_of(case, name))
    return model.eval()


def start(case: Case, model: Any, name: str, of: str) -> None:
    """A₀ and B₀ into A and B, and off the weights, as peft does with its own: those differ by more than rounding where
    two singular values are close."""
    began = {n: case.arrays[f"{of}/{n}"] for n in case.meta["adapters"][of]["frozen"]}
    there = {n: array(p) for n, p in parameters(model, name).items()}
    write(model, name, there | {n.replace("0.weight", ".weight"): a for n, a in began.items()})
    for path, layer in model.base_model.model.named_modules():
        if f"{path}.lora_A0.weight" in began:
            W = tensor(case.arrays[f"model/{path}.weight"])
            layer.get_base_layer().weight.data = W - layer.get_delta_weight(name).detach()


class Whole:
    def __init__(self, case: Case) -> None:
        self.case, self.names = case, case.meta["active"]
        self.ids = case.arrays["ids"]
        self.model, self.unloaded = base_model(case), None
        for name in self.names:
            self.model = add(case, self.model, name)
        if len(self.names) > 1:
            self.model.base_model.set_adapter(self.names)

    def real(self, y: Array) -> Array:
        return real(y, mask_of(self.case))

    def said(self, model: Any) -> Any:
        return output(model, self.ids, self.case.arrays.get("attention_mask"), **decoder_of(self.case))

    def logits(self) -> Arrays:
        with torch.no_grad():
            return {"logits": self.real(array(self.said(self.model)))}

    def other_logits(self) -> Arrays:
        with torch.no_grad():
            ids, more = self.case.arrays.get("other_ids", self.ids), decoder_of(self.case, other=True)
            return {"other_logits": array(output(self.model, ids, **more))}

    def grads(self) -> Arrays:
        self.said(self.model).backward(tensor(self.case.arrays["dout"]))
        found = {f"grad/{a}/{n}": p for a in self.names for n, p in parameters(self.model, a).items()}
        return {n: array(p.grad if p.grad is not None else torch.zeros_like(p)) for n, p in found.items()}

    def plain(self) -> Any:
        self.unloaded = self.unloaded or self.model.merge_and_unload()
        return self.unloaded

    def merged(self) -> Arrays:
        found = {n: array(p) for n, p in self.plain().named_parameters()}
        return {f"merged/{n}": a for n, a in (found | model_buffers(self.plain(), self.case)).items()}

    def merged_logits(self) -> Arrays:
        with torch.no_grad():
            return {"merged_logits": self.real(array(self.said(self.plain())))}

    def loss(self) -> Arrays:
        with torch.no_grad():
            return {"loss": array(models.loss(self.model, self.case))}

    def dropped(self) -> Arrays:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            plain = prompts.dropped(self.model, base_model(self.case), Path(folder))
            return {"dropped": self.real(array(self.said(plain)))}

    def decoded(self) -> Arrays:
        if not prompts.prompted(self.model, self.names[0]):
            return {"decoded": decoded(self.model, self.case)}
        with torch.no_grad():
            said = prompts.decoded(self.model, steps_of(self.case))
            return {"decoded": np.concatenate([array(y) for y in said], axis=1)}

    def count(self) -> Arrays:
        return {"count": np.array(sum(p.numel() for p in self.model.parameters() if p.requires_grad))}


# ── a life ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Session(Life):
    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model = base_model(case)
        self.disabled: Any = None

    def logits(self) -> Array:
        with torch.no_grad():
            return array(output(self.model, self.case.arrays["ids"], **decoder_of(self.case)))

    def add(self, adapter: str) -> None:
        self.model = add(self.case, self.model, adapter)

    def activate(self, adapters: Sequence[str]) -> None:
        if len(adapters) == 1:
            self.model.set_adapter(adapters[0])
        else:
            self.model.base_model.set_adapter(list(adapters))

    def merge(self, safe: bool = False) -> None:
        if not safe:
            self.model.merge_adapter()
        elif "safe_merge" in inspect.signature(self.model.merge_adapter).parameters:
            self.model.merge_adapter(safe_merge=True)
        else:  # older releases have it in merge_and_unload, which says so to one layer after the other
            self.merge_safely()

    def merge_safely(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer  # which came with 0.5.0

        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        if not all("safe_merge" in inspect.signature(layer.merge).parameters for layer in layers):
            raise Skip("merging has no safe_merge here")
        for layer in layers:
            layer.merge(safe_merge=True)

    def refused_merge(self, adapter: str) -> Arrays:
        values = trained_of(self.case, adapter)
        write(self.model, adapter, {n: v * np.nan for n, v in values.items()})
        refused = False
        try:
            self.merge(safe=True)
        except ValueError:
            refused = True
        write(self.model, adapter, values)
        return {"refused": np.array(refused)}

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def disable(self) -> None:
        self.disabled = contextlib.ExitStack()
        self.disabled.enter_context(self.model.disable_adapter())

    def enable(self) -> None:
        self.disabled.close()

    def weighted(self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str) -> None:
        self.model.add_weighted_adapter(list(of), list(weights), adapter, combination_type=how)
        self.model.set_adapter(adapter)

    def delete(self, adapter: str) -> Arrays | None:
        self.model.delete_adapter(adapter)
        return None

    def save(self, adapter: str) -> Arrays:
        self.model.save_pretrained(str(self.folder), selected_adapters=[adapter], safe_serialization=True)
        tensors, _ = read(self.folder / adapter / "adapter_model.safetensors")
        return {f"file/{name.removeprefix(PREFIX)}": a for name, a in tensors.items()}

    def convert(self, adapter: str) -> None:
        """With a second adapter, as it was before training, whose file says that the weights are not to be changed."""
        fresh = peft.get_peft_model(base_model(self.case), adapter_config(self.case, adapter), adapter_name="initial")
        start(self.case, fresh, "initial", adapter)
        fresh.peft_config["initial"].init_lora_weights = True
        fresh.save_pretrained(str(self.folder))
        option = {conversion() or "": str(self.folder / "initial")}
        try:
            self.model.save_pretrained(str(self.folder), selected_adapters=[adapter], **option)
        except ValueError as error:
            if "use_rslora" not in str(error):
                raise
            raise Skip(str(error)) from None
        self.load([adapter])

    def load(self, adapters: Sequence[str]) -> None:
        first, *others = adapters
        self.model = peft.PeftModel.from_pretrained(base_model(self.case), str(self.folder / first), adapter_name=first)
        for name in others:
            self.model.load_adapter(str(self.folder / name), adapter_name=name)
        self.model.eval()

    def change(self, adapter: str) -> None:
        write(self.model, adapter, values_of(self.case, f"new-{adapter}/"))
