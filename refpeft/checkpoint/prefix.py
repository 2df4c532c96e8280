"""Prefix tuning and P-tuning v2 as HF peft saves them: 'prompt_embeddings' [n, 2 L t], and the modules trained whole.

HF peft never saves the MLP of `prefix_projection`, only what it made of E, and reads no other form: so what is read
here is without MLP, and so is what is written (`prefix_tuning.flat`). What it cannot say is saved in AdapterHub's
format (`refpeft.checkpoint.adapterhub`): layers without a prefix, tokens that keep their positions, and the prefixes of
an encoder-decoder. Its own files of encoder-decoders are refused, since what HF peft makes of them is not what they
hold (`prefix_tuning`, 'Where implementations differ').
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft import tune
from refpeft.adapter import Adapter
from refpeft.checkpoint.safetensors import Malformed, show, take
from refpeft.checkpoint.wrapper import CLASSES, CONFIG, FILE, to_save
from refpeft.methods import METHODS as ALL
from refpeft.methods import prefix_tuning
from refpeft.model import Model
from refpeft.ops import Array, is_half

METHODS: Collection[str] = ("prefix_tuning", "p_tuning_v2")
PEFT_TYPES: Collection[str] = ("PREFIX_TUNING",)
PREFIX, P = "base_model.", "prompt_embeddings"
FIELDS = (
    "num_virtual_tokens", "encoder_hidden_size", "token_dim", "num_layers", "num_attention_heads", "init_weights",
    "modules_to_save", "task_type",
)  # fmt: skip
IGNORED = {  # without influence on the function
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "num_transformer_submodules", "prefix_projection",
}  # fmt: skip


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The adapter of an HF peft folder, without MLP: P-tuning v2 where the task is to name classes."""
    try:
        for name, value in raw.items():
            if name not in FIELDS and name not in IGNORED and value not in (None, False, "", [], {}):
                raise ValueError(f"{show(name)} is set to {show(value)}, which is not supported")
        if raw.get("num_transformer_submodules") not in (None, 1):
            raise ValueError(
                "num_transformer_submodules must be 1: HF peft's prefixes of encoder-decoders are not read"
            )
        fields = {n: raw[n] for n in FIELDS if raw.get(n) is not None}
        if raw.get("task_type") in CLASSES:
            fields["modules_to_save"] = to_save(raw)
        method = "p_tuning_v2" if raw.get("task_type") in CLASSES else "prefix_tuning"
        cfg = tune.configured(ALL[method], method, fields, model)
        whole = tune.saved_whole(cfg, model)
        one_stack(model)
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    like = model.params[model.sites["embed.token"].weight].dtype
    width = 2 * model.config.num_layers * cfg.token_dim
    found = dict(tensors)
    params = {P: take(FILE, found, P, (cfg.num_virtual_tokens, width), np.float32 if is_half(like) else like)}
    for name, tensor in whole.items():
        params[name] = take(FILE, found, PREFIX + name, model.params[tensor].shape, model.params[tensor].dtype)
    if found:
        raise Malformed(f"{FILE}: tensor {show(min(found))} is not one that this adapter has")
    return Adapter(method, cfg, params)


def one_stack(model: Model) -> None:
    if any(role.startswith("decoder.") for role in model.sites):
        raise ValueError("HF peft has no prefixes for the parts of an encoder-decoder that are as the paper describes")


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]:
    """adapter_config.json and the tensors, without MLP."""
    adapter = prefix_tuning.flat(adapter)
    cfg = adapter.config
    config = {n: list(v) if isinstance(v := getattr(cfg, n), tuple) else v for n in FIELDS}
    config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "inference_mode": True}
    config |= {"num_transformer_submodules": 1, "base_model_name_or_path": None}
    return config, {name if name == P else PREFIX + name: a for name, a in adapter.params.items()}


# ── P-tuning v2's own code ───────────────────────────────────────────────────────────────────────────────────────────


def from_thudm(tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The prefix and head of a model that github.com/THUDM/P-tuning-v2 saved, from its tensors (the frozen base model's
    own are left aside): 'prefix_encoder.embedding.weight' [n, 2 L d], with the MLP [n, d] and
    'prefix_encoder.trans.…', and 'classifier.…'. The layout is HF peft's; BERT's positions are shifted there too."""
    names = {"P": "embedding", "E": "embedding", "W1": "trans.0", "W2": "trans.2"}
    found = {
        name.removeprefix("prefix_encoder."): a for name, a in tensors.items() if name.startswith("prefix_encoder.")
    }
    if "embedding.weight" not in found:
        raise Malformed("tensor 'prefix_encoder.embedding.weight' is missing")
    (n, c), projection = found["embedding.weight"].shape, "trans.0.weight" in found
    h = found["trans.0.weight"].shape[0] if projection else None
    fields = {"num_virtual_tokens": n, "prefix_projection": projection, "encoder_hidden_size": h}
    cfg = replace(
        tune.configured(ALL["p_tuning_v2"], "p_tuning_v2", fields, model), input_size=c if projection else None
    )
    adapter = tune.init("p_tuning_v2", cfg, model)
    where = {prefix_tuning.NAMES[k]: names[k] + ".weight" for k in names}
    where |= {prefix_tuning.NAMES[k]: v + ".bias" for k, v in (("b1", "trans.0"), ("b2", "trans.2"))}
    have = {name: found[where[name]] if name in where else tensors.get(name) for name in adapter.params}
    params: dict[str, Array] = {}
    for name, p in adapter.params.items():
        a = have[name]
        if a is None or a.shape != p.shape:
            raise Malformed(
                f"tensor for {name!r}: expected shape {list(p.shape)}, found {None if a is None else list(a.shape)}"
            )
        params[name] = a.astype(p.dtype)
    return adapter.replace(params=params)
