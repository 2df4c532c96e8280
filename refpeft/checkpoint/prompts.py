"""Soft prompts in HF peft's folders: PROMPT_TUNING and P_TUNING.

The tensors are 'prompt_embeddings' [n S, d], the output of the encoder if there was one, and 'base_model.<module>.…' of
what was trained beside. `task_type` decides there how the prompt is put in, and is written as the head of the model
wants it. `placement`, where it is not HF peft's, is written too: HF peft warns that it does not know it.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refpeft import tune
from refpeft.adapter import Adapter
from refpeft.checkpoint import models, tokens
from refpeft.checkpoint.safetensors import Malformed, fitting, show
from refpeft.checkpoint.wrapper import CLASSES, CONFIG, FILE, HEADS, to_save
from refpeft.methods import METHODS as ALL
from refpeft.methods import p_tuning
from refpeft.model import Model
from refpeft.ops import Array
from refpeft.prompts import P, dtype_of

TYPES = {"prompt_tuning": "PROMPT_TUNING", "p_tuning": "P_TUNING"}
METHODS: Collection[str] = TYPES.keys()
PEFT_TYPES: Collection[str] = TYPES.values()
PREFIX = "base_model."
IGNORED = {  # without influence on the function
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
}  # fmt: skip
STARTS = ("init_vocab_size", "init_token_ids", "init_label_ids")  # how P began: of no use where P is


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The adapter of a folder; that of P-tuning has no encoder any more."""
    method = next(name for name, peft_type in TYPES.items() if peft_type == raw["peft_type"])
    try:
        cfg = tune.configured(ALL[method], method, fields(method, raw, tensors), model)
        whole = tune.saved_whole(cfg, model)
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    shape, dtype = (cfg.total, model.config.hidden_size), dtype_of(model)
    params = {P: fitting(FILE, tensors, P, shape, dtype)}
    for name, tensor in whole.items():
        like = model.params[tensor]
        params[name] = fitting(FILE, tensors, PREFIX + name, like.shape, like.dtype)
    twins = {other for own, other in models.TWINS.items() if own in whole}
    for name in sorted(tensors.keys() - params.keys()):
        if not name.startswith(PREFIX) or name.removeprefix(PREFIX) not in whole.keys() | twins:
            raise Malformed(f"{FILE}: tensor {show(name)} is not one that this adapter has")
    return Adapter(method, cfg, params)


def fields(method: str, raw: Mapping[str, Any], tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Those of the method's Config, as HF peft means them."""
    known = ALL[method].Config.__dataclass_fields__.keys()
    for name, value in raw.items():
        if name not in known and name not in IGNORED and value not in (None, False, "", [], {}):
            raise ValueError(f"{show(name)} is set to {show(value)}, which is not supported")
    found = {name: value for name, value in raw.items() if name in known and value is not None}
    if "num_transformer_submodules" not in found:
        found["num_transformer_submodules"] = 2 if raw.get("task_type") == "SEQ_2_SEQ_LM" else 1
    if raw.get("task_type") in CLASSES:
        own = {name.removeprefix(PREFIX).split(".")[0] for name in tensors}
        found["modules_to_save"] = [name for name in to_save(raw) if name not in HEADS or name in own] or None
    return {name: value for name, value in found.items() if value is not None}


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]:
    """adapter_config.json and the tensors. The encoder of P-tuning is replaced by its output, as in HF peft."""
    cfg = adapter.config
    params = p_tuning.plain(cfg, adapter.params) if adapter.method == "p_tuning" else adapter.params
    if len(params[P]) != cfg.total:
        raise ValueError(f"an adapter of {len(params[P]) // cfg.total} prompts has no HF folder: save each of them")
    config = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(cfg).items() if n not in STARTS}
    if cfg.placement == "before":
        del config["placement"]
    if config.get("prompt_tuning_init") == "TEXT" and not (cfg.prompt_tuning_init_text and cfg.tokenizer_name_or_path):
        config["prompt_tuning_init"] = "RANDOM"  # HF peft refuses a TEXT without them, though it will not use them
    config |= {"peft_type": TYPES[adapter.method], "base_model_name_or_path": None, "inference_mode": True}
    tensors = {name if name == P else PREFIX + name: a for name, a in params.items()}
    twins = {PREFIX + other: params[own] for own, other in models.TWINS.items() if own in params}
    return config, tensors | twins


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model's folder, which neither cuts nor pads."""
    found = tokens.read(folder)
    found.no_truncation()
    found.no_padding()
    return found


def with_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a prompt_tuning config with `init_token_ids`: what the tokenizer in the folder
    `tokenizer_name_or_path` makes of `prompt_tuning_init_text`, its special tokens included, as in HF peft."""
    if config.get("prompt_tuning_init") != "TEXT" or config.get("init_token_ids") is not None:
        return dict(config)
    for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
        if not config.get(name):
            raise ValueError(f"prompt_tuning_init 'TEXT' needs {name}, found {config.get(name)!r}")
    if config.get("tokenizer_kwargs"):
        raise ValueError(f"tokenizer_kwargs are not supported, found {config['tokenizer_kwargs']!r}")
    words = tokenizer(config["tokenizer_name_or_path"])
    return {**config, "init_token_ids": words.encode(config["prompt_tuning_init_text"]).ids}
