"""HF peft adapter folders ↔ `Adapter`.

Everything in adapter_config.json is either read as HF peft reads it, or without influence on the function, or refused
by name. Every tensor of adapter_model.safetensors is accounted for.

* dtypes as in HF peft: an adapter's own parameters take the dtype of the layer they adapt, but float32 for layers of
  16 bits, whatever the file has (its `autocast_adapter_dtype`); tensors that replace the model's take the model's.
* init_lora_weights 'pissa' or 'olora' in a file means that A and B belong on top of a base from which the factors
  that A and B started from were subtracted: HF peft subtracts them from the base again while loading. Here they are
  computed from the base in the same way and kept beside A and B (`refpeft.methods.lora`). 'pissa_niter_k' draws random
  numbers there, hence is refused, like the other ways of changing the base.
* saved, such an adapter is the plain one of twice the rank, with init_lora_weights true.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np

from refpeft import tune
from refpeft.adapter import Adapter
from refpeft.checkpoint import (
    adapterhub,
    bottleneck,
    folder,
    intrinsic,
    models,
    prefix,
    products,
    prompts,
    safetensors,
    selection,
)
from refpeft.checkpoint.format import Format
from refpeft.checkpoint.safetensors import Malformed, fitting, show
from refpeft.checkpoint.wrapper import (
    CLASSES,
    CONFIG,
    FILE,
    HEADS,
    PREFIX,
    check_rest,
    elsewhere,
    module_names,
    stored_name,
    to_save,
)  # fmt: skip
from refpeft.methods import METHODS, lora, vera
from refpeft.model import Model
from refpeft.ops import Array, is_half
from refpeft.part import Part

SHARED = "base_model."  # before what belongs to no module
IGNORED = {  # without influence on the function
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "use_dora",
}  # fmt: skip
NO_BASE = {"task_type": None, "base_model_name_or_path": None, "inference_mode": True}
PLAIN_INITS = ("eva", "mica")  # they leave the base alone: A and B in the file are all there is
# of the methods that are not of LoRA's kind, each in a module of its own
FORMATS = cast(Sequence[Format], (selection, prompts, prefix, intrinsic, bottleneck, products))
METHOD_FLAGS = {"lora": (False, False), "rslora": (True, False), "dora": (False, True)}  # use_rslora, use_dora
TYPES = {"IA3": "ia3", "VERA": "vera", "ADALORA": "adalora"}  # peft_type → method, of the others that are read here
UNREAD = {"adalora": {"r", "alpha_pattern"}}  # fields that HF peft's config inherits, and nobody reads
LACKING = {"ia3": ("layers_to_transform", "layers_pattern")}  # fields that are not in HF peft's config


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_adapter(path: str | os.PathLike[str], model: Model) -> Adapter:
    """The adapter of a folder of HF peft's or AdapterHub's, for this model."""
    where = folder.existing(path)
    raw = safetensors.read_json(where / CONFIG)
    if bottleneck.recognises(raw):
        return bottleneck.read_folder(where, raw, model)
    if adapterhub.recognises(raw):
        return adapterhub.read_folder(where, raw, model)
    for form in FORMATS:
        if raw.get("peft_type") in form.PEFT_TYPES:
            return form.read(raw, folder.tensors(where, "adapter_model"), model)
    try:
        method, cfg = read_config(raw, model)
        chosen = {model.sites[role].path: model.part(role) for role in tune.targets(cfg, model)}
        whole = tune.saved_whole(cfg, model)
        own = {name: spec for part in chosen.values() for name, spec in expected(method, cfg, part).items()}
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    tensors = folder.tensors(where, "adapter_model")
    frozen = start(cfg, chosen) if method != "vera" else projection(cfg, chosen, tensors)
    found = module_names(tensors)
    params: dict[str, Array] = {}
    for name, (shape, dtype) in own.items():
        params[name] = take(found, [name, name + ".weight"], name, shape, dtype, model)
    for name, tensor in whole.items():
        path_, _, leaf = name.rpartition(".")
        aliases = [f"{path_}.base_layer.{leaf}", name] if path_ in chosen else [name]
        like = model.params[tensor]
        params[name] = take(found, aliases, name, like.shape, like.dtype, model)
    check_rest(found, cfg, model, whole)
    return Adapter(method, cfg, params, frozen)


def read_config(raw: Mapping[str, Any], model: Model) -> tuple[str, Any]:
    """The method and its Config, from adapter_config.json."""
    method = method_of(raw)
    known = METHODS[method].Config.__dataclass_fields__.keys()
    for name, value in raw.items():
        if (
            name not in known
            and name not in IGNORED | UNREAD.get(method, set())
            and value not in (None, False, "", [], {})
        ):
            raise ValueError(f"{show(name)} is set to {show(value)}, which is not supported")
    fields = {n: v for n, v in raw.items() if n in known and n != "use_dora" and v is not None}
    return method, tune.configured(METHODS[method], method, meant(fields, raw, model), model)


def method_of(raw: Mapping[str, Any]) -> str:
    kind = raw.get("peft_type")
    if isinstance(kind, str) and kind in TYPES:
        return TYPES[kind]
    if kind != "LORA":
        raise ValueError(f"peft_type must be 'LORA', found {show(kind)}")
    for flag in ("use_dora", "use_rslora"):
        if not isinstance(raw.get(flag) or False, bool):
            raise ValueError(f"{flag} must be true or false, found {show(raw[flag])}")
    return "dora" if raw.get("use_dora") else "rslora" if raw.get("use_rslora") else "lora"


def meant(fields: dict[str, Any], raw: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Where HF peft reads a field as something else than it says."""
    how = fields.get("init_lora_weights", True)
    if how in PLAIN_INITS:
        fields["init_lora_weights"] = True
    elif isinstance(how, str) and how not in lora.INITS:
        raise ValueError(f"init_lora_weights={show(how)} changes the base model in a way that the file does not hold")
    if raw.get("task_type") in CLASSES:
        there = any(path.endswith(HEADS) for path in tune.modules(model))
        fields["modules_to_save"] = [n for n in to_save(raw) if there or n not in HEADS] or None
    return fields


Spec = tuple[tuple[int, ...], Any]  # shape, dtype


def expected(method: str, cfg: Any, part: Part) -> dict[str, Spec]:
    """The tensors that the adapter has for one module."""
    m, dtype = METHODS[method], np.float32 if is_half(part.W.dtype) else part.W.dtype
    shapes = m.shapes(cfg.at(part.path), part)
    return {f"{part.path}.{tune.key(m, part.kind, n)}": (s, dtype) for n, s in shapes.items() if n not in m.FROZEN}


def take(found: dict[str, Array], aliases: list[str], name: str, shape: tuple[int, ...], dtype: Any, m: Model) -> Array:
    """One tensor, taken out of those found."""
    at = next((alias for alias in aliases if alias in found), None)
    if at is None:
        raise Malformed(f"{FILE}: tensor {PREFIX + aliases[0]!r} is missing{elsewhere(found, m)}")
    return fitting(FILE, {PREFIX + at: found.pop(at)}, PREFIX + at, shape, dtype)


def projection(cfg: vera.Config, chosen: Mapping[str, Part], tensors: dict[str, Array]) -> dict[str, Array]:
    """VeRA's A∗ and B∗, taken out of the file, where they are saved, and otherwise drawn from their key."""
    parts = list(chosen.values())
    if not cfg.save_projection:
        return vera.projection(cfg, parts)
    shapes = {vera.SHARED[n]: shape for n, shape in vera.sizes(cfg, parts).items()}
    return {n: safetensors.take(FILE, tensors, SHARED + n, shape, vera.wide(parts)) for n, shape in shapes.items()}


def start(cfg: Any, chosen: Mapping[str, Part]) -> dict[str, Array]:
    """A₀ and B₀ of a pissa or olora file, from the base."""
    frozen: dict[str, Array] = {}
    if getattr(cfg, "init_lora_weights", None) not in ("pissa", "olora"):
        return frozen
    for path, part in chosen.items():
        if part.kind == "embedding" or (part.kind == "conv1d" and cfg.init_lora_weights == "olora"):
            raise Malformed(f"{CONFIG}: {cfg.init_lora_weights} is not defined for {path}, a {part.kind} layer")
        dtype = np.float32 if is_half(part.W.dtype) else part.W.dtype
        A0, B0 = lora.factors(cfg.at(path), part.W)
        frozen |= {f"{path}.lora_A0.weight": A0.astype(dtype), f"{path}.lora_B0.weight": B0.astype(dtype)}
    return frozen


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """An HF peft folder that HF peft and `load_adapter` read, written whole or not at all; of what AdapterHub has and
    HF peft has not, one of AdapterHub's."""
    config, tensors = contents(adapter)
    with folder.new_folder(path) as new:
        safetensors.write_json(new / CONFIG, config)
        safetensors.write(new / (FILE if "config" not in config else bottleneck.FILE), tensors)


def contents(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a folder holds: adapter_config.json, and the tensors of adapter_model.safetensors by their names there."""
    if adapterhub.writes(adapter):
        return adapterhub.write(adapter)
    form = next((f for f in FORMATS if adapter.method in f.METHODS), None)
    if form is not None:
        return form.write(adapter)
    savable = (*METHOD_FLAGS, *TYPES.values())
    if adapter.method not in savable:
        raise ValueError(f"{adapter.method} adapters have no HF folder: only {', '.join(savable)} do")
    tensors = {PREFIX + stored_name(adapter, name): a for name, a in plain_params(adapter).items()}
    if adapter.method == "vera" and adapter.config.save_projection:
        tensors |= {SHARED + name: a for name, a in adapter.frozen.items()}
    return as_json(adapter), tensors


def as_json(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json; with the ranks and α of the plain adapter where this one carries A₀ and B₀."""
    if adapter.method in TYPES.values():
        return other_json(adapter)
    cfg = doubled(adapter.config) if adapter.frozen else adapter.config
    use_rslora, use_dora = METHOD_FLAGS[adapter.method]
    fields = plain_fields(cfg)
    if fields.get("detach_norm", False):  # HF peft's reading needs no mention
        del fields["detach_norm"]
    fields |= {"peft_type": "LORA", **NO_BASE}
    return fields | {"use_rslora": cfg.use_rslora or use_rslora, "use_dora": use_dora}


def other_json(adapter: Adapter) -> dict[str, Any]:
    """Of methods that are not of LoRA's config."""
    fields = {n: v for n, v in plain_fields(adapter.config).items() if n not in LACKING.get(adapter.method, ())}
    forward, targets = fields.get("feedforward_modules"), fields.get("target_modules")
    if isinstance(forward, list) and isinstance(targets, list) and set(forward) - set(targets):
        ends = "|".join(map(re.escape, forward))  # HF peft refuses such a list, and not the pattern that means the same
        fields["feedforward_modules"] = f".*({ends})"
    return fields | {"peft_type": next(kind for kind, method in TYPES.items() if method == adapter.method), **NO_BASE}


def plain_fields(cfg: Any) -> dict[str, Any]:
    return {n: list(v) if isinstance(v, tuple | set | frozenset) else v for n, v in asdict(cfg).items()}


def doubled(cfg: Any) -> Any:
    """The config of rank 2r with the same scale s: α/r = 2α/2r, α/√r = √2α/√(2r)."""
    k = 2**0.5 if cfg.use_rslora else 2
    return replace(
        cfg,
        r=2 * cfg.r,
        lora_alpha=k * cfg.lora_alpha,
        rank_pattern={p: 2 * r for p, r in cfg.rank_pattern.items()},
        alpha_pattern={p: k * α for p, α in cfg.alpha_pattern.items()},
        init_lora_weights=True,
    )


def plain_params(adapter: Adapter) -> dict[str, Array]:
    """A ← [A; A₀], B ← [B, −B₀] where they are kept, all else as it is (a masked-LM bias under both its names)."""
    params = dict(adapter.params)
    for name, start0 in adapter.frozen.items():
        if name.endswith(".lora_A0.weight"):
            full = name.replace(".lora_A0.", ".lora_A.")
            params[full] = np.concatenate([params[full], start0], axis=0)
        elif name.endswith(".lora_B0.weight"):
            full = name.replace(".lora_B0.", ".lora_B.")
            params[full] = np.concatenate([params[full], -start0], axis=1)
    return params | {twin: params[name] for name, twin in models.TWINS.items() if name in params}
