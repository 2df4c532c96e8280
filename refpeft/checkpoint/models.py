"""HF model folders ↔ `Model`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refpeft.checkpoint import folder, safetensors
from refpeft.checkpoint.families import Plan, plan
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.model import Model
from refpeft.ops import Array, is_half

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names from TensorFlow's time
FLOATS = ("float64", "float32", "float16", "bfloat16")


def load(path: str | os.PathLike[str], dtype: Any = None) -> Model:
    """The model of an HF folder: config.json and safetensors files, mapped; nothing is copied unless `dtype` asks for
    another one than the files have. Every tensor is accounted for: a missing, unknown or misshapen one is an error."""
    where = folder.existing(path)
    source: Mapping[str, Any] = safetensors.read_json(where / "config.json")
    if source.get("quantization_config"):
        raise Malformed("config.json: quantization_config is set, and quantised checkpoints are not read")
    tensors = folder.tensors(where, "model")
    source = with_ties(source, tensors)
    p = plan(source)
    params = named_as_planned(p, tensors)
    params = check(p, params)
    if dtype is not None:
        to = float_dtype(dtype)
        params = {name: a.astype(to, copy=False) for name, a in params.items()}
    sites = {role: s for role, s in p.sites.items() if s.weight in params}
    return Model(p.config, sites, params, source)


def with_ties(source: Mapping[str, Any], tensors: Mapping[str, Array]) -> Mapping[str, Any]:
    """config.json of a T5 with a head of its own says so again, if transformers 5 wrote it, which then unties the two
    if the file has both."""
    a, b = tensors.get("shared.weight"), tensors.get("lm_head.weight")
    if source.get("model_type") != "t5" or "scale_decoder_outputs" not in source or a is None or b is None:
        return source
    return source if np.array_equal(a, b) else {**source, "tie_word_embeddings": False}


def float_dtype(dtype: Any) -> "np.dtype[Any]":
    try:
        to: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    except TypeError:
        to = np.dtype(object)
    if to.name not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, found {show(dtype)}")
    return to


def named_as_planned(p: Plan, found: Mapping[str, Array]) -> dict[str, Array]:
    """The file's tensors under the names that the model's class gives them. Files may have been saved without a head,
    hence without its prefix ('h.0…' for 'transformer.h.0…'), or with one that the model lacks, and with old names."""
    head = any(name.startswith(p.base) for name in found) if p.base else True
    stray = p.config.family in ("bert", "roberta") and f"{p.config.family}."
    named: dict[str, Array] = {}
    for name, a in found.items():
        new = name
        for old, now in LEGACY.items():
            new = new.removesuffix(old) + now if new.endswith(old) else new
        if not head and p.base + new in p.shapes:
            new = p.base + new
        elif not p.base and new not in p.shapes:
            new = without_prefix(p, new, stray or prefix_of(p))
        if new in named:
            raise Malformed(f"tensors {show(name)} and another one both stand for {new!r}")
        named[new] = a[0] if new in ROWS and a.ndim == 2 and len(a) == 1 else a
    return named


def prefix_of(p: Plan) -> str:
    return {"gpt2": "transformer.", "llama": "model.", "qwen2": "model.", "bart": "model."}.get(p.config.family, "")


def without_prefix(p: Plan, name: str, prefix: str) -> str:
    bare = name.removeprefix(prefix)
    return bare if bare in p.shapes else name


def check(p: Plan, named: Mapping[str, Array]) -> dict[str, Array]:
    """Exactly the tensors that the plan names, each of its shape. A pooler that nothing reads may be absent, and so may
    a buffer, which is zero then."""
    resolve_ties(p, named := dict(named))
    optional = set()
    if "pooler" in p.sites and "pooler" not in p.config.head:
        pooler = {p.sites["pooler"].weight, p.sites["pooler"].bias}
        optional = pooler if not pooler & named.keys() else set()
    optional |= {name for name in p.config.buffers if name not in named}
    for name, shape in p.shapes.items():
        if name in optional:
            continue
        if name not in named:
            raise Malformed(f"tensor {name!r} is missing, expected of shape {list(shape)}{hint(p, name, named)}")
        a = named[name]
        if a.shape != shape:
            raise Malformed(
                f"tensor {name!r}: expected shape {list(shape)}, as config.json says, found {show(list(a.shape))}"
            )
        if not (a.dtype.kind == "f" or is_half(a.dtype)):
            raise Malformed(f"tensor {name!r}: expected a float dtype, found {a.dtype}")
    for name in named:
        if name not in p.shapes and not any(re.fullmatch(pattern, name) for pattern in p.unused):
            raise Malformed(f"tensor {show(name)} is not one that a {p.config.family} model of this config.json has")
    return {name: named[name] for name in p.shapes if name in named}


def hint(p: Plan, name: str, named: Mapping[str, Array]) -> str:
    return f"; the files begin with {show(min(named))}" if not p.shapes.keys() & named.keys() and named else ""


def resolve_ties(p: Plan, named: dict[str, Array]) -> None:
    """A layer that config.json ties may be stored under either name, or twice if both are equal."""
    for copy, original in p.tied.items():
        if copy not in named:
            continue
        if original not in named:
            named[original] = named[copy]
        elif not np.array_equal(named[copy], named[original]):
            raise Malformed(
                f"tensor {copy!r} differs from {original!r}, "
                + ("of which it must be a copy" if copy in p.copies else TIED)
            )


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """An HF folder that `load` and transformers read (config.json, model.safetensors), written whole or not at all."""
    with folder.new_folder(path, needs=size(model)) as new:
        write(model, new)


def write(model: Model, new: Path) -> None:
    """The files of a model, into a folder that is being made."""
    tensors = planned_tensors(model)
    safetensors.write_json(new / "config.json", with_dtype(model.source, tensors))
    safetensors.write(new / "model.safetensors", tensors)


def size(model: Model) -> int:
    """The bytes of all tensors."""
    return sum(a.nbytes for a in model.params.values())


def planned_tensors(model: Model) -> dict[str, Array]:
    """The model's tensors by the names that HF's class gives them; what that class cannot hold is refused."""
    if not model.source:
        raise ValueError("the model has no config.json (`source`), without which HF cannot read it")
    p = plan(model.source)
    tensors: dict[str, Array] = {}
    for role, site in model.sites.items():
        to = p.sites[role]
        for mine, name in ((site.weight, to.weight), (site.bias, to.bias)):
            if mine not in model.params:
                continue
            if name not in p.shapes:
                raise ValueError(f"{name!r} cannot be saved: HF's class for this config.json has no such tensor")
            a = model.params[mine]
            if name in tensors and tensors[name] is not a and not np.array_equal(tensors[name], a):
                raise ValueError(f"{name!r} stands for two different tensors, since config.json ties them")
            tensors[name] = a
    check(p, tensors)
    tensors |= {name: tensors[name][None] for name in ROWS if name in tensors}
    if not p.tied.keys() - p.copies.keys():  # a loader that is told of no ties looks for them
        tensors |= {copy: tensors[original] for copy, original in p.copies.items()}
    return tensors | {twin: tensors[name] for name, twin in TWINS.items() if name in tensors and not p.tied}


TIED = "though config.json ties them: set tie_word_embeddings to false"
ROWS = ("final_logits_bias",)  # [1, v] in files
TWINS = {  # HF keeps the bias of an untied masked-LM head in two places
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}


def with_dtype(source: Mapping[str, Any], tensors: Mapping[str, Array]) -> dict[str, Any]:
    """config.json with the dtype of the tensors: `dtype` since transformers 5, `torch_dtype` before."""
    names = {a.dtype.name for a in tensors.values()}
    name = names.pop() if len(names) == 1 else max(names, key=lambda n: float_dtype(n).itemsize)
    key = "dtype" if "dtype" in source else "torch_dtype"
    return {k: v for k, v in source.items() if k not in ("dtype", "torch_dtype")} | {key: name}
