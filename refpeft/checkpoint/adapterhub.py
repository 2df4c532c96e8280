"""LoRA, prompts and prefixes as AdapterHub's `adapters` saves them. They are read, and saved as HF peft's.

adapter_config.json     {"config": the fields of its LoRAConfig, PromptTuningConfig or PrefixTuningConfig, "name": …, …}
adapter.safetensors     <module>.loras.<name>.lora_A [r, i], lora_B [o, r]
                        prompt_tuning.prompt_tunings.<name>.prompt_embedding.weight [n, d]
                        …prefix_tunings.<name>.self_prefix.control_trans [n 2 L t], or with its MLP wte.weight,
                        control_trans.0.…, control_trans.2.…: the same once for the model and once for each layer

Where Q, K and V are one layer (GPT-2), each of the k that `attn_matrices` names has an A of its own:

    A [k r, i] = [A_q; A_k; A_v],   B [k o/3, r] = [B_q; B_k; B_v],   ΔW = s [B_q A_q; B_k A_k; B_v A_v],   0 elsewhere

which is a LoRA of rank k r whose B has the blocks B_q, B_k, B_v, and whose α is k α.

Its DoRA, gates and other compositions are not those of this specification, and refused. AdapterHub 1.3.0 itself cannot
write prefixes as safetensors (docs/findings/adapters-safetensors.md); what is made of its pickle is read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import tune
from refpeft.adapter import Adapter
from refpeft.checkpoint import bottleneck
from refpeft.checkpoint.bottleneck import CONFIG, FILE
from refpeft.checkpoint.safetensors import Malformed, show, take
from refpeft.methods import METHODS, prefix_tuning
from refpeft.model import Model
from refpeft.ops import Array, is_half
from refpeft.prompts import P, dtype_of

Raw = Mapping[str, Any]
Tensors = dict[str, Array]
IGNORED = {  # without influence on what is computed where the tensors are given
    "architecture", "init_weights", "init_weights_seed", "dtype", "prompt_init", "prompt_init_text", "encoder_prefix",
    "cross_prefix", "shared_gating",
}  # fmt: skip
ONLY = {"composition_mode": "add", "combine": "prefix", "non_linearity": "tanh"}  # fields with the value that is read
MLP = {"intermediate_lora": "mlp.up", "output_lora": "mlp.down"}
READ = {
    "lora": {"r", "alpha", "dropout", "attn_matrices", "selfattn_lora", *MLP, "leave_out"},
    "prompt_tuning": {"prompt_length"},
    "prefix_tuning": {"prefix_length", "flat", "bottleneck_size", "leave_out"},
}
QKV = "qkv"
HOLDERS = ("loras", "prompt_tunings", "prefix_tunings")  # modules that hold adapters by their names
SWAPPED = ("llama",)  # families in which AdapterHub has the two the other way round
PREFIX = {"E": "wte.weight", "W1": "control_trans.0.weight", "b1": "control_trans.0.bias",
          "W2": "control_trans.2.weight", "b2": "control_trans.2.bias", "P": "control_trans"}  # fmt: skip


def recognises(raw: Raw) -> bool:
    """Is this the adapter_config.json of an adapter of AdapterHub's?"""
    return "peft_type" not in raw and isinstance(raw.get("config"), Mapping)


def read_folder(where: Path, raw: Raw, model: Model) -> Adapter:
    """The adapter of a folder with this adapter_config.json, for this model."""
    return read(raw, bottleneck.in_folder(where, model), model)


def read(raw: Raw, tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The adapter, every tensor of it accounted for."""
    architecture, name = raw["config"].get("architecture"), bottleneck.named(raw)
    if architecture not in tuple(READERS):
        kinds = ", ".join(READERS)
        raise Malformed(f"{CONFIG}: config.architecture must be null or one of {kinds}, found {show(architecture)}")
    base = bottleneck.base_of(model)
    rest = {unnamed(n, name).removeprefix(base): a for n, a in tensors.items()}
    whole = bottleneck.heads_in(tensors, model, {}) or None
    try:
        config = checked(raw["config"], READ[architecture])
        if any(role.startswith("decoder.") for role in model.sites):
            raise ValueError(f"{architecture} of an encoder-decoder is not read from AdapterHub's folders")
        fields, places = READERS[architecture](config, model)
        method = METHODS[architecture]
        tune.check_types(method, fields)
        cfg = tune.configured(method, architecture, fields | {"modules_to_save": whole}, model)
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    params = places(rest, cfg)
    for n, tensor in tune.saved_whole(cfg, model).items():
        params[n] = take(FILE, rest, n.removeprefix(base), model.params[tensor].shape, model.params[tensor].dtype)
    if rest:
        raise Malformed(f"{FILE}: tensor {show(min(rest))} is not one that this adapter has")
    return Adapter(architecture, cfg, params)


def unnamed(name: str, adapter: str) -> str:
    """A tensor's name without the adapter's."""
    for holder in HOLDERS:
        name = name.replace(f"{holder}.{adapter}.", f"{holder}.", 1)
    return name


def checked(config: Raw, known: set[str]) -> dict[str, Any]:
    """The fields that are read; what would make another function of the adapter is refused by name."""
    for name, value in config.items():
        if name in ONLY and value != ONLY[name]:
            raise ValueError(f"config.{name} must be {ONLY[name]!r}, found {show(value)}")
        if name not in known | IGNORED | ONLY.keys() and value not in (None, False, "", [], {}, 0):
            raise ValueError(f"config.{show(name)} is set to {show(value)}, which is not supported")
    return {name: value for name, value in config.items() if name in known and value is not None}


def positive(config: Raw, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.{name} must be a positive integer, found {show(value)}")
    return value


def left_out(config: Raw) -> Sequence[int]:
    layers = config.get("leave_out", [])
    if not isinstance(layers, list) or not all(isinstance(n, int) for n in layers):
        raise ValueError(f"config.leave_out must be a list of layers, found {show(layers)}")
    return layers


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lora(config: Raw, model: Model) -> tuple[dict[str, Any], Any]:
    """The fields of our config, and how to read the parameters."""
    r, α = positive(config, "r"), config.get("alpha", 8)
    if not isinstance(α, int | float) or isinstance(α, bool):
        raise ValueError(f"config.alpha must be a number, found {show(α)}")
    keys = config.get("attn_matrices", ["q", "v"]) if config.get("selfattn_lora", True) else []
    if not isinstance(keys, list) or any(key not in ("q", "k", "v") for key in keys):
        raise ValueError(f"config.attn_matrices must name q, k or v, found {show(keys)}")
    matrices = [key for key in ("q", "k", "v") if key in keys]
    chosen = places_of(config, matrices, model)
    fields: dict[str, Any] = {"r": r, "lora_alpha": α, "lora_dropout": config.get("dropout", 0.0)}
    fields["target_modules"] = [model.sites[role].path for role in chosen]
    if merged := [model.sites[role].path for role in chosen if role.endswith(QKV)]:
        fields["rank_pattern"] = dict.fromkeys(merged, r * len(matrices))
        fields["alpha_pattern"] = dict.fromkeys(merged, α * len(matrices))

    def places(rest: Tensors, cfg: Any) -> Tensors:
        params: Tensors = {}
        for role in chosen:
            params |= of_layer(role, r, matrices, rest, model)
        return params

    return fields, places


def places_of(config: Raw, matrices: Sequence[str], model: Model) -> list[str]:
    """The roles of the layers that have a LoRA."""
    swap = {"mlp.up": "mlp.down", "mlp.down": "mlp.up"} if model.config.family in SWAPPED else {}
    ends = [f"attn.{key}" for key in matrices] + (["attn.qkv"] if matrices else [])
    ends += [swap.get(end, end) for name, end in MLP.items() if config.get(name)]
    out = left_out(config)
    found = [role for role in model.sites if role.startswith("layers.") and role.split(".", 2)[2] in ends]
    if not (chosen := [role for role in found if int(role.split(".")[1]) not in out]):
        raise ValueError("there is no layer with a LoRA: see attn_matrices, intermediate_lora, output_lora, leave_out")
    return chosen


def of_layer(role: str, r: int, matrices: Sequence[str], rest: Tensors, model: Model) -> Tensors:
    """A and B of one layer; where Q, K and V are one, A below each other and B in blocks."""
    part, site = model.part(role), model.sites[role]
    (o, i), dtype = part.W.shape, np.float32 if is_half(part.W.dtype) else part.W.dtype
    stem = site.path.removeprefix(bottleneck.base_of(model)) + ".loras"
    k, d = (len(matrices), o // 3) if role.endswith(QKV) else (1, o)
    A, B = take(FILE, rest, f"{stem}.lora_A", (k * r, i), dtype), take(FILE, rest, f"{stem}.lora_B", (k * d, r), dtype)
    if role.endswith(QKV):
        wide = np.zeros((o, k * r), dtype)
        for n, key in enumerate(matrices):
            at = "qkv".index(key) * d
            wide[at : at + d, n * r : (n + 1) * r] = B[n * d : (n + 1) * d]
        B = wide
    return {f"{site.path}.lora_A.weight": A, f"{site.path}.lora_B.weight": B}


# ── prompts and prefixes ─────────────────────────────────────────────────────────────────────────────────────────────


def prompt(config: Raw, model: Model) -> tuple[dict[str, Any], Any]:
    n, shape = positive(config, "prompt_length"), (positive(config, "prompt_length"), model.config.hidden_size)

    def places(rest: Tensors, cfg: Any) -> Tensors:
        return {P: take(FILE, rest, "prompt_tuning.prompt_tunings.prompt_embedding.weight", shape, dtype_of(model))}

    return {"num_virtual_tokens": n, "placement": "after_embedding"}, places


def prefix(config: Raw, model: Model) -> tuple[dict[str, Any], Any]:
    c, n, flat = model.config, positive(config, "prefix_length"), config.get("flat", False)
    h = 0 if flat else positive(config, "bottleneck_size")
    fields: dict[str, Any] = {"num_virtual_tokens": n, "prefix_projection": not flat, "position_shift": False}
    fields |= {"leave_out": list(left_out(config))}
    fields |= {"encoder_hidden_size": h, "input_size": c.hidden_size} if h else {}

    def places(rest: Tensors, cfg: Any) -> Tensors:
        width = 2 * (c.num_layers - len(cfg.leave_out)) * c.num_kv_heads * c.head_dim
        shapes: dict[str, tuple[int, ...]] = {"P": (n * width,)}
        if h:
            shapes = {"E": (n, c.hidden_size), "W1": (h, c.hidden_size), "b1": (h,), "W2": (width, h), "b2": (width,)}
        found = {symbol: once(rest, PREFIX[symbol], shape, dtype_of(model)) for symbol, shape in shapes.items()}
        shaped = {symbol: a.reshape(n, width) if symbol == "P" else a for symbol, a in found.items()}
        return {prefix_tuning.NAMES[symbol]: a for symbol, a in shaped.items()}

    return fields, places


def once(rest: Tensors, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """A tensor that stands under the model's name for it and those of the layers, the same everywhere."""
    first = f"prefix_tuning.prefix_tunings.self_prefix.{name}"
    a = take(FILE, rest, first, shape, dtype)
    for other in [n for n in rest if n.endswith("pool.prefix_tunings.self_prefix." + name)]:
        if not np.array_equal(take(FILE, rest, other, shape, dtype), a):
            raise Malformed(f"{FILE}: {other} must be equal to {first}, found other values")
    return a


READERS = {"lora": lora, "prompt_tuning": prompt, "prefix_tuning": prefix}
