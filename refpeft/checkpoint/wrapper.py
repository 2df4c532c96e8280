"""What the folders of HF peft's adapters have in common: their files, and names of tensors below its wrapper."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.checkpoint import models
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.model import Model
from refpeft.ops import Array

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the name of a module
CLASSES = ("SEQ_CLS", "TOKEN_CLS")  # tasks to classify, of which HF peft trains the heads whole, named or not,
HEADS = ("classifier", "score")  # if they are called so
TWINS = {twin: name for name, twin in models.TWINS.items()}


def to_save(raw: Mapping[str, Any]) -> list[str]:
    """`modules_to_save` of one of CLASSES, with the heads: looked at before the types of all fields are."""
    found = raw.get("modules_to_save") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"modules_to_save must be a list of names, found {show(found)}")
    return list(dict.fromkeys([*found, *HEADS]))


def module_names(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The file's tensors without the prefix of HF peft's wrapper."""
    for name in tensors:
        if not name.startswith(PREFIX):
            raise Malformed(f"{FILE}: tensor names must begin with {PREFIX!r}, found {show(name)}")
    return {name.removeprefix(PREFIX): a for name, a in tensors.items()}


def stored_name(adapter: Adapter, name: str) -> str:
    """HF peft keeps an adapted layer's own tensors below 'base_layer'."""
    path, _, leaf = name.rpartition(".")
    own, whole = adapter.by_module.get(path, ({}, {}))
    return f"{path}.base_layer.{leaf}" if own and leaf in whole else name


def check_rest(found: Mapping[str, Array], cfg: Any, model: Model, whole: Mapping[str, str]) -> None:
    """What is left in the file may only repeat the base model (as HF peft does for targeted embeddings)."""
    for name, a in found.items():
        parts = name.split(".")
        bare = ".".join(p for p in parts if p not in ("base_layer", "original_module"))
        if getattr(cfg, "bias", "none") == "all" and parts[-2:] == ["modules_to_save", "bias"]:
            continue  # a second copy of what is stored without 'modules_to_save'
        if TWINS.get(bare) in whole:
            continue  # the other name of a bias that has been read
        tensor = tensor_of(model, bare)
        if tensor is None:
            raise Malformed(
                f"{FILE}: tensor {show(PREFIX + name)} is not one that this adapter has{elsewhere(found, model)}"
            )
        like = model.params[tensor]
        if a.shape != like.shape or not np.array_equal(a.astype(like.dtype, copy=False), like):
            raise Malformed(
                f"{FILE}: tensor {show(PREFIX + name)} differs from the model's, so the adapter belongs to another base"
            )


def tensor_of(model: Model, name: str) -> str | None:
    """The model's tensor behind a name of a module's weight or bias."""
    for site in model.sites.values():
        for tensor, leaf in ((site.weight, ".weight"), (site.bias, ".bias")):
            if site.path + leaf == name and tensor in model.params:
                return tensor
    return None


def elsewhere(found: Mapping[str, Array], m: Model) -> str:
    """What to add about a missing tensor if none of the file's belongs to a module of this model."""
    paths = {site.path for site in m.sites.values()}
    if not found or any(name.startswith(tuple(p + "." for p in paths)) for name in found):
        return ""
    return f": this is an adapter of another base, its tensors are named like {show(PREFIX + min(found))}"
