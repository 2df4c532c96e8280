"""AdapterHub's `adapters`, as installed, on transformers' models, which it changes in place.

An adapter is added with the config that says in AdapterHub's terms what the case says in HF peft's
(`refpeft.conformance.targets.adapterhub`), its parameters are copied in, and nothing is downloaded.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import adapters  # type: ignore[import-not-found, unused-ignore]
import torch
import transformers

from refpeft.conformance import tiny
from refpeft.conformance.case import Case, read
from refpeft.conformance.targets import models
from refpeft.conformance.targets.adapterhub import METHODS, Place, head_places
from refpeft.conformance.targets.base import Arrays, Life, Skip
from refpeft.conformance.targets.models import (
    Driver,
    base_model,
    buildable,
    decoded,
    decoder_of,
    model_buffers,
    output,
    values_of,
)
from refpeft.conformance.targets.spec import real
from refpeft.conformance.targets.tensors import array, fill_all, quietly, tensor
from refpeft.ops import Array

LINEARS = {  # of the layers that the suite adapts, those at which AdapterHub has a LoRA
    "gpt2": ("c_attn", "c_fc", "mlp.c_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "intermediate.dense"),
    "roberta": ("query", "key", "value", "intermediate.dense"),
    "t5": ("q", "k", "v", "wi", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {  # what of a method's options AdapterHub has
    "dora": {"detach_norm": False},
    "prompt_tuning": {"placement": "after_embedding"},
    "ia3": {"feedforward_modules": []},
    "houlsby": {"train_norms": False},
    "p_tuning_v2": {"position_shift": False},
    "prefix_tuning": {"position_shift": False, "input_size": tiny.WIDE["hidden_size"]},
}
SETTINGS = {
    "attention": ["sdpa", "eager"],  # of transformers; the first is its default
    "alpha": [1, 2],  # of (IA)³, whose vectors are multiplied by it: half as large, they are the same
}
FEATURES = (
    "forward", "grads", "frozen", "change", "merge", "unmerge", "disable", "several", "delete", "save", "conv1d",
    "cache", "together", "weighted", "loss", "drop", "train", "train-any", "train-loaded", "average",
)  # fmt: skip
SUMS = ("lora", "dora", "ia3", "prompt_tuning")  # whose adapters do not add up in a Stack, or of which there can be one
HEADS = ("disable", "several", "delete", "save")  # for the head, which the method trains, belongs to no adapter there


class AdapterHub(Driver):
    def __init__(self) -> None:
        quietly("transformers", "adapters")
        self.declared = {
            "name": "adapters", "version": adapters.__version__, "levels": ["model", "lifecycle", "story"],
            "methods": list(METHODS), "dtypes": ["float32", "float64"], "features": list(FEATURES),
            "families": [family for family in LINEARS if buildable(family) and adapted(family)],
            "linears": LINEARS, "stories": "bert", "options": OPTIONS, "settings": SETTINGS,
            "without": {method: lacks(method) for method in METHODS},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip

    def of_case(self, case: Case) -> "Whole":
        return Whole(case)

    def of_life(self, case: Case, folder: Path) -> "Session":
        from refpeft.conformance.targets.adapters_stories import Story

        return Story(case, folder) if case.level == "story" else Session(case, folder)


def lacks(method: str) -> list[str]:
    """Features and settings."""
    without = [*(["together"] if method in SUMS else []), *(HEADS if method == "p_tuning_v2" else [])]
    return without if method == "ia3" else [*without, "alpha"]


def adapted(family: str) -> bool:
    """Has this release adapters for such models, in a folder of their own or by an interface to transformers'?"""
    if (Path(adapters.__file__).parent / "models" / family).is_dir():
        return True
    try:
        from adapters.wrappers import interfaces  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # in older releases
        return False
    return family in interfaces.CUSTOM_INTERFACES


# ── models and adapters ──────────────────────────────────────────────────────────────────────────────────────────────


def adaptable(case: Case) -> Any:
    """transformers' model with the case's weights, ready for adapters; T5 has one kind of attention only."""
    asked = case.meta.get("settings", {}).get("attention", "eager" if case.level == "story" else "sdpa")
    model = base_model(case, "eager" if case.meta["model"]["model_type"] == "t5" else asked)
    adapters.init(model)
    return model


def add(case: Case, model: Any, name: str) -> None:
    about = case.meta["adapters"][name]
    make, _ = METHODS[about["method"]]
    config = make(about["config"], model)
    if α := case.meta.get("settings", {}).get("alpha"):
        config = config.replace(alpha=α)
    supports = getattr(model.base_model, "supports_adapter", None)  # older releases do not say
    if supports and not supports(config):
        raise Skip(f"AdapterHub has no {about['method']} for {model.config.model_type}")
    model.add_adapter(name, config)
    model.eval()
    write(case, model, name, values_of(case, name + "/"))


@contextlib.contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """In which AdapterHub makes new parameters, whatever the model and the file have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def activate(model: Any, names: Sequence[str]) -> None:
    model.set_active_adapters(adapters.Stack(*names) if len(names) > 1 else names[0])


def places(case: Case, model: Any, name: str) -> dict[str, Place]:
    config = case.meta["adapters"].get(name, {}).get("config", {})  # none of one that was loaded under another name
    _, find = METHODS[case.method]
    found = [*find(model, name), *head_places(config.get("modules_to_save"), model)]
    return {p.name: p for p in found}


def write(case: Case, model: Any, name: str, values: Mapping[str, Array]) -> None:
    """Values into an adapter's parameters, in place; all of them, and no others."""
    fill_all(places(case, model, name), values)


class Whole:
    def __init__(self, case: Case) -> None:
        self.case, self.names = case, case.meta["active"]
        self.ids, self.mask = case.arrays["ids"], case.arrays.get("attention_mask")
        self.model = adaptable(case)
        for name in self.names:
            add(case, self.model, name)
        activate(self.model, self.names)

    def said(self, ids: Array, mask: Array | None = None, other: bool = False) -> Array:
        more = decoder_of(self.case, other)
        with torch.no_grad():
            return real(array(output(self.model, ids, mask, **more)), None if more else mask)

    def logits(self) -> Arrays:
        return {"logits": self.said(self.ids, self.mask)}

    def other_logits(self) -> Arrays:
        return {"other_logits": self.said(self.case.arrays.get("other_ids", self.ids), other=True)}

    def grads(self) -> Arrays:
        self.train()
        output(self.model, self.ids, self.mask, **decoder_of(self.case)).backward(tensor(self.case.arrays["dout"]))
        found = {}
        for name in self.names:
            for n, p in places(self.case, self.model, name).items():
                grad = p.param.grad if p.param.grad is not None else torch.zeros_like(p.param)
                found[f"grad/{name}/{n}"] = p.pull(array(grad))
        return found

    def train(self) -> None:
        """Train the adapter, as AdapterHub sets it up, without dropout."""
        self.model.train_adapter(self.names)
        self.model.eval()

    def merged(self) -> Arrays:
        """What is beside the adapter, which stays where it was when it is merged."""
        self.model.merge_adapter(self.names[0])
        own = {id(p.param) for p in places(self.case, self.model, self.names[0]).values()}
        tensors = {n: array(p) for n, p in self.model.named_parameters() if id(p) not in own}
        return {f"merged/{n}": a for n, a in (tensors | model_buffers(self.model, self.case)).items()}

    def merged_logits(self) -> Arrays:
        self.model.merge_adapter(self.names[0])
        return {"merged_logits": self.said(self.ids, self.mask)}

    def loss(self) -> Arrays:
        with torch.no_grad():
            return {"loss": array(models.loss(self.model, self.case))}

    def dropped(self) -> Arrays:
        self.model.eject_prefix_tuning(self.names[0])
        return {"dropped": self.said(self.ids, self.mask)}

    def decoded(self) -> Arrays:
        return {"decoded": decoded(self.model, self.case)}

    def count(self) -> Arrays:
        """Without the head of the task, which AdapterHub always trains, unless the adapter has it too."""
        self.train()
        own = [p for name in self.names for p in places(self.case, self.model, name).values()]
        if any(p.copies > 1 for p in own):
            raise Skip("AdapterHub has an A for each of Q, K and V")
        asked = {*self.model.base_model.parameters(), *(p.param for p in own)}
        return {"count": np.array(sum(p.numel() for p in asked if p.requires_grad))}


# ── a life ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Session(Life):
    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model = adaptable(case)
        self.active: list[str] = []

    def logits(self) -> Array:
        with torch.no_grad():
            return array(output(self.model, self.case.arrays["ids"], **decoder_of(self.case)))

    def add(self, adapter: str) -> None:
        add(self.case, self.model, adapter)
        if not self.active:
            self.activate([adapter])

    def activate(self, adapters: Sequence[str]) -> None:
        self.active = list(adapters)
        activate(self.model, self.active)

    def merge(self, safe: bool = False) -> None:
        if safe:
            raise Skip("merge_adapter has no check for nan")
        self.model.merge_adapter(self.active[0])

    def refused_merge(self, adapter: str) -> None:
        self.merge(safe=True)

    def unmerge(self) -> None:
        self.model.reset_adapter()

    def disable(self) -> None:
        self.model.set_active_adapters(None)

    def enable(self) -> None:
        self.activate(self.active)

    def weighted(self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str) -> None:
        """By SVD, the only one of its ways that sums ΔW; with all the rank that the sum can have."""
        if not getattr(self.model.base_model, "support_lora_delta_w_svd", True):
            raise Skip(f"AdapterHub cannot sum ΔW for {self.model.config.model_type}")
        rank = len(of) * self.model.adapters_config.get(of[0]).r
        by_svd = "lora_delta_w_svd"
        with default_dtype(self.case.meta["dtype"]):
            self.model.average_adapter(adapter, list(of), list(weights), by_svd, normalize_weights=False, svd_rank=rank)
        self.activate([adapter])

    def delete(self, adapter: str) -> None:
        self.model.delete_adapter(adapter)

    def save(self, adapter: str) -> Arrays:
        where = self.folder / adapter
        self.model.save_adapter(str(where), adapter, use_safetensors=True, with_head=False)
        tensors, _ = read(where / "adapter.safetensors")
        known = {id(p.param): p for p in places(self.case, self.model, adapter).values()}
        mine = {n: known.get(id(p)) for n, p in self.model.named_parameters(remove_duplicate=False)}
        named = {n: mine.get(n) for n in tensors}
        return {f"file/{p.name if p else n}": p.back(tensors[n]) if p else tensors[n] for n, p in named.items()}

    def load(self, adapters: Sequence[str]) -> None:
        self.model = adaptable(self.case)
        with default_dtype(self.case.meta["dtype"]):
            for name in adapters:
                self.model.load_adapter(str(self.folder / name), load_as=name, use_safetensors=True, with_head=False)
        self.model.eval()
        self.activate(adapters[:1])

    def change(self, adapter: str) -> None:
        write(self.case, self.model, adapter, values_of(self.case, f"new-{adapter}/"))
