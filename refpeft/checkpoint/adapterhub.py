"""LoRA, prompts and prefixes as AdapterHub's `adapters` saves them.

They are read, and saved as HF peft's, but for the prefixes that HF peft has no format for: those of an encoder-decoder,
of some layers only, and those before tokens that keep their positions. These are written as they are read.

adapter_config.json     {"config": the fields of its LoRAConfig, PromptTuningConfig or PrefixTuningConfig, "name": …, …}
adapter.safetensors     <module>.loras.<name>.lora_A [r, i], lora_B [o, r]
                        prompt_tuning.prompt_tunings.<name>.prompt_embedding.weight [n, d]
                        …prefix_tunings.<name>.self_prefix.control_trans [n 2 L t], or with its MLP wte.weight,
                        control_trans.0.…, control_trans.2.…: the same once for the model and once for each layer;
                        in an encoder-decoder encoder_prefix and cross_prefix too

Where Q, K and V are one layer (GPT-2), each of the k that `attn_matrices` names has an A of its own:

    A [k r, i] = [A_q; A_k; A_v],   B [k o/3, r] = [B_q; B_k; B_v],   ΔW = s [B_q A_q; B_k A_k; B_v A_v],   0 elsewhere

which is a LoRA of rank k r whose B has the blocks B_q, B_k, B_v, and whose α is k α.

One name for a prefix is enough for AdapterHub: what is written has that of the model, without the layers'.

Its DoRA, gates and other compositions are not those of this specification, and refused. AdapterHub 1.3.0 itself cannot
write prefixes as safetensors (docs/findings/adapters-safetensors.md); what is made of its pickle is read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import __version__, tune
from refpeft.adapter import Adapter
from refpeft.checkpoint import bottleneck
from refpeft.checkpoint.bottleneck import CONFIG, FILE
from refpeft.checkpoint.safetensors import Malformed, show, take
from refpeft.methods import METHODS, prefix_tuning
from refpeft.methods.prefix_tuning import SHARED
from refpeft.model import Model
from refpeft.ops import Array, is_half
from refpeft.prompts import P, dtype_of

Raw = Mapping[str, Any]
Tensors = dict[str, Array]
IGNORED = {  # without influence on what is computed where the tensors are given
    "architecture", "init_weights", "init_weights_seed", "dtype", "prompt_init", "prompt_init_text", "shared_gating",
}  # fmt: skip
ONLY = {"composition_mode": "add", "combine": "prefix", "non_linearity": "tanh"}  # fields with the value that is read
MLP = {"intermediate_lora": "mlp.up", "output_lora": "mlp.down"}
READ = {
    "lora": {"r", "alpha", "dropout", "attn_matrices", "selfattn_lora", *MLP, "leave_out"},
    "prompt_tuning": {"prompt_length"},
    "prefix_tuning": {"prefix_length", "flat", "bottleneck_size", "leave_out", "encoder_prefix", "cross_prefix"},
}
QKV = "qkv"
LAYER = re.compile(r"((?:encoder\.|decoder\.)?)layers\.(\d+)\.(.*)")
HOLDERS = ("loras", "prompt_tunings", "prefix_tunings")  # modules that hold adapters by their names
SWAPPED = ("llama",)  # families in which AdapterHub has the two the other way round
PREFIX = {"E": "wte.weight", "W1": "control_trans.0.weight", "b1": "control_trans.0.bias",
          "W2": "control_trans.2.weight", "b2": "control_trans.2.bias", "P": "control_trans"}  # fmt: skip
OF_STACK = {"": "self_prefix", "encoder.": "encoder_prefix", "cross.": "cross_prefix"}
PREFIXES = ("prefix_tuning", "p_tuning_v2")


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
        if architecture == "prompt_tuning" and model.config.encoder_decoder:
            raise ValueError("prompt_tuning of an encoder-decoder is not read from AdapterHub's folders")
        fields, places = READERS[architecture](config, model)
        kind = "p_tuning_v2" if architecture == "prefix_tuning" and whole else architecture
        tune.check_types(METHODS[kind], fields)
        cfg = tune.configured(METHODS[kind], kind, fields | {"modules_to_save": whole}, model)
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    params = places(rest, cfg)
    for n, tensor in tune.saved_whole(cfg, model).items():
        params[n] = take(FILE, rest, n.removeprefix(base), model.params[tensor].shape, model.params[tensor].dtype)
    if rest:
        raise Malformed(f"{FILE}: tensor {show(min(rest))} is not one that this adapter has")
    return Adapter(kind, cfg, params)


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
    ends = [f"{at}.{key}" for key in matrices for at in ("attn", "cross")] + (["attn.qkv"] if matrices else [])
    ends += [swap.get(end, end) for name, end in MLP.items() if config.get(name)]
    out, first = left_out(config), {"decoder.": layers_of(model, "encoder.")}  # a decoder's are numbered on
    found = [m for role in model.sites if (m := LAYER.fullmatch(role)) and m[3] in ends]
    if not (chosen := [m[0] for m in found if int(m[2]) + first.get(m[1], 0) not in out]):
        raise ValueError("there is no layer with a LoRA: see attn_matrices, intermediate_lora, output_lora, leave_out")
    return chosen


def layers_of(model: Model, stack: str) -> int:
    return len({m[2] for role in model.sites if (m := LAYER.fullmatch(role)) and m[1] == stack})


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
    n, flat = positive(config, "prefix_length"), config.get("flat", False)
    h = 0 if flat else positive(config, "bottleneck_size")
    fields: dict[str, Any] = {"num_virtual_tokens": n, "prefix_projection": not flat, "position_shift": False}
    fields |= {"leave_out": list(left_out(config))}
    fields |= {"encoder_hidden_size": h, "input_size": model.config.hidden_size} if h else {}
    for name in ("encoder_prefix", "cross_prefix"):
        if model.config.encoder_decoder and not config.get(name, True):
            raise ValueError(f"config.{name} must be true, found {show(config[name])}")

    def places(rest: Tensors, cfg: Any) -> Tensors:
        outline, _ = prefix_tuning.outline_model(cfg, model, ())
        symbols = {SHARED[stack + symbol]: (stack, symbol) for stack in OF_STACK for symbol in prefix_tuning.NAMES}
        params: Tensors = {}
        for name, like in outline.items():
            stack, symbol = symbols[name]
            shape = (like.size,) if symbol == "P" else like.shape
            params[name] = once(rest, OF_STACK[stack], PREFIX[symbol], shape, like.dtype).reshape(like.shape)
        return params

    return fields, places


def once(rest: Tensors, stack: str, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """A tensor that stands under the model's name for it and those of the layers, the same everywhere."""
    first = f"prefix_tuning.prefix_tunings.{stack}.{name}"
    a = take(FILE, rest, first, shape, dtype)
    for other in [n for n in rest if n.endswith(f"pool.prefix_tunings.{stack}.{name}")]:
        if not np.array_equal(take(FILE, rest, other, shape, dtype), a):
            raise Malformed(f"{FILE}: {other} must be equal to {first}, found other values")
    return a


def writes(adapter: Adapter) -> bool:
    """Is this one of those that HF peft has no format for?"""
    if adapter.method not in PREFIXES:
        return False
    several = any(stack and name.startswith(stack) for name in adapter.params for stack in OF_STACK)
    return several or not adapter.config.position_shift or bool(adapter.config.leave_out)


def write(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    """adapter_config.json and the tensors of a prefix, without MLP, as in HF peft's."""
    adapter = prefix_tuning.flat(adapter)
    cfg = adapter.config
    if cfg.position_shift:
        raise ValueError(
            "AdapterHub cannot represent position_shift=True, and HF peft no prefixes of an encoder-decoder or of some "
            "layers only: set position_shift=False"
        )
    stem = f"prefix_tuning.prefix_tunings.{bottleneck.NAME}."
    places = {SHARED[stack + "P"]: f"{stem}{there}.{PREFIX['P']}" for stack, there in OF_STACK.items()}
    tensors = {places.get(n, n): a.reshape(-1) if n in places else a for n, a in adapter.params.items()}
    config = {
        "architecture": "prefix_tuning", "flat": True, "prefix_length": cfg.num_virtual_tokens,
        "bottleneck_size": cfg.encoder_hidden_size, "leave_out": list(cfg.leave_out), "encoder_prefix": True,
        "cross_prefix": True, "dropout": 0.0, "non_linearity": "tanh", "use_gating": False, "shared_gating": True,
    }  # fmt: skip
    about = {"name": bottleneck.NAME, "version": f"refpeft.{__version__}", "model_name": None}
    return {"config": config, **about}, tensors


READERS = {"lora": lora, "prompt_tuning": prompt, "prefix_tuning": prefix}
