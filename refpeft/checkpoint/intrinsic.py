"""DID and SAID on disk. No other library has a format for them; this one is made like HF peft's.

adapter_config.json holds the fields of the Config and `peft_type`, 'DID' or 'SAID'. adapter_model.safetensors holds θ
(and λ), for every adapted tensor B as int8, Π as int32 and G as floats (under one of its names, if layers share it),
and what `modules_to_save` trains whole. Names are those of the adapter behind HF peft's prefix 'base_model.model.'.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from refpeft import tune
from refpeft.adapter import Adapter
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.checkpoint.wrapper import CONFIG, FILE, PREFIX
from refpeft.fastfood import length
from refpeft.methods import METHODS as ALL
from refpeft.methods import did
from refpeft.model import Model
from refpeft.ops import Array, is_half

METHODS: Collection[str] = ("did", "said")
PEFT_TYPES: Collection[str] = ("DID", "SAID")
IGNORED = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
}  # fmt: skip


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The adapter of a folder, every tensor of it checked."""
    method = raw["peft_type"].lower()
    try:
        cfg = tune.configured(ALL[method], method, {n: v for n, v in raw.items() if n not in IGNORED}, model)
        adapted, whole = did.tensors(cfg, model), tune.saved_whole(cfg, model)
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    rest = dict(tensors)
    m, dtype = len(adapted) if method == "said" else 0, did.wide(adapted, model)
    if cfg.d <= m:
        raise Malformed(f"{CONFIG}: d must be more than {m}, the number of adapted tensors, found {cfg.d}")
    params = {f"{method}.theta": take(rest, [f"{method}.theta"], (cfg.d - m,)).astype(dtype)}
    if m:
        params["said.lambda"] = take(rest, ["said.lambda"], (m,)).astype(dtype)
    frozen: dict[str, Array] = {}
    for i, (tensor, names) in enumerate(adapted.items()):
        L = length(model.params[tensor].size, cfg.d - m)
        frozen |= projection(rest, method, names, L, dtype)
        if m:
            frozen |= {key(method, name, "index"): np.array(i, np.int32) for name in names}
    for name, tensor in whole.items():
        like = model.params[tensor]
        params[name] = take(rest, [name], like.shape).astype(like.dtype)
    if rest:
        raise Malformed(f"{FILE}: tensor {show(min(rest))} is not one that this adapter has")
    return Adapter(method, cfg, params, frozen)


def key(method: str, name: str, what: str) -> str:
    """'x.c_attn.bias' → 'x.c_attn.did_bias_signs'"""
    path, _, leaf = name.rpartition(".")
    return f"{path}.{method}_{leaf}_{what}"


def projection(rest: dict[str, Array], method: str, names: Any, L: int, dtype: Any) -> dict[str, Array]:
    """B, Π and G of a tensor, by all its names; they are in the file under one of them."""

    def found(what: str, kinds: str) -> tuple[str, Array]:
        return names[0], take(rest, [key(method, name, what) for name in names], (L,), kinds)

    where, B = found("signs", "i")
    if not (np.abs(B) == 1).all():
        raise Malformed(f"{FILE}: tensor {PREFIX + key(method, where, 'signs')!r}: expected signs, 1 or -1")
    _, Π = found("permutation", "i")
    if Π.min() < 0 or Π.max() >= L or (np.bincount(Π, minlength=L) != 1).any():
        raise Malformed(
            f"{FILE}: tensor {PREFIX + key(method, where, 'permutation')!r}: expected a permutation of 0 to {L - 1}"
        )
    _, G = found("gaussian", "f")
    own = {"signs": B.astype(np.int8), "permutation": Π.astype(np.int32), "gaussian": G.astype(dtype)}
    return {key(method, name, what): v for name in names for what, v in own.items()}


def take(rest: dict[str, Array], names: list[str], shape: tuple[int, ...], kinds: str = "f") -> Array:
    """One tensor under one of its names, taken out of the rest; floats ('f') or integers ('i')."""
    at = next((PREFIX + name for name in names if PREFIX + name in rest), None)
    if at is None:
        raise Malformed(f"{FILE}: tensor {PREFIX + names[0]!r} is missing")
    a = rest.pop(at)
    if a.shape != shape:
        raise Malformed(f"{FILE}: tensor {at!r}: expected shape {list(shape)}, found {show(list(a.shape))}")
    if not (a.dtype.kind in kinds or (kinds == "f" and is_half(a.dtype))):
        raise Malformed(f"{FILE}: tensor {at!r}: expected {'floats' if kinds == 'f' else 'integers'}, found {a.dtype}")
    return a


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]:
    """adapter_config.json and the tensors; what layers share is written once, places in λ follow from the order."""
    fields = {n: list(v) if isinstance(v, tuple | set | frozenset) else v for n, v in asdict(adapter.config).items()}
    fields |= {"peft_type": adapter.method.upper(), "task_type": None, "base_model_name_or_path": None}
    once = {id(v): name for name, v in reversed(list(adapter.frozen.items())) if not name.endswith("_index")}
    frozen = {name: v for name, v in adapter.frozen.items() if once.get(id(v)) == name}
    return fields, {PREFIX + name: v for name, v in [*adapter.params.items(), *frozen.items()]}
