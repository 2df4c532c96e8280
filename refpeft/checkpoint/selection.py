"""Folders of the methods that train tensors of the model: HF peft's where it has the method, else of the same shape.

LN_TUNING           <norm>.ln_tuning_layers.weight, .bias          HF peft reads and writes these
TRAINABLE_TOKENS    <embedding>.trainable_tokens_delta             likewise
FULL, PARTIAL, BITFIT          the tensors by their own names; no other library has a file for these
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from refpeft import tune
from refpeft.adapter import Adapter
from refpeft.checkpoint.families import plan
from refpeft.checkpoint.safetensors import Malformed, fitting, show
from refpeft.checkpoint.wrapper import FILE, PREFIX
from refpeft.count import outline
from refpeft.methods import METHODS as ALL
from refpeft.model import Model
from refpeft.ops import Array

METHODS = ("full", "partial", "bitfit", "ln_tuning", "trainable_tokens")
PEFT_TYPES = tuple(method.upper() for method in METHODS)
NORM = ".ln_tuning_layers."
IGNORED = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
           "peft_version", "runtime_config"}  # fmt: skip


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The adapter of a folder, all of its tensors of the names and shapes that the config makes for this model."""
    method = str(raw["peft_type"]).lower()
    known = {f.name for f in dataclasses.fields(ALL[method].Config)}
    for name, value in raw.items():
        if name not in known | IGNORED and value not in (None, False, "", [], {}):
            raise Malformed(f"adapter_config.json: {show(name)} is set to {show(value)}, which is not supported")
    try:
        cfg = tune.configured(
            ALL[method], method, {n: v for n, v in raw.items() if n in known and v is not None}, model
        )
        start = outline(method, cfg, model).params
    except ValueError as e:
        raise Malformed(f"adapter_config.json: {e}") from None
    plain = {PREFIX + name.removeprefix(PREFIX).replace(NORM, "."): a for name, a in tensors.items()}
    params = {n: fitting(FILE, plain, PREFIX + n, like.shape, like.dtype) for n, like in start.items()}
    found = {name.removeprefix(PREFIX): a for name, a in plain.items()}
    for name in found.keys() - params.keys() - repeated(found, model):
        raise Malformed(f"{FILE}: tensor {show(PREFIX + name)} is not one that this adapter has")
    return Adapter(method, cfg, params)


def repeated(found: Mapping[str, Array], model: Model) -> set[str]:
    """HF peft writes the rows of a tied head a second time, under the head's name; so for other names of the table."""
    weights = {site.path: site.weight for site in model.sites.values()}
    if model.source:
        weights |= {copy.removesuffix(".weight"): name for copy, name in plan(model.source).copies.items()}
    rows = {n: n.removesuffix(".trainable_tokens_delta") for n in found if n.endswith(".trainable_tokens_delta")}
    return {
        n
        for n, path in rows.items()
        for m, other in rows.items()
        if m != n and weights.get(path) == weights.get(other) is not None and np.array_equal(found[n], found[m])
    }


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]:
    fields = {n: list(v) if isinstance(v, tuple) else v for n, v in dataclasses.asdict(adapter.config).items()}
    fields |= {"peft_type": adapter.method.upper(), "task_type": None, "base_model_name_or_path": None}
    return fields | {"inference_mode": True}, {PREFIX + stored(adapter, n): a for n, a in adapter.params.items()}


def stored(adapter: Adapter, name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return path + NORM + leaf if adapter.method == "ln_tuning" else name
