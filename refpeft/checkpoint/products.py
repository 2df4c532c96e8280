"""Folders of LoHa, LoKr, OFT and BOFT, as HF peft has them, and of GLoRA, which is another method there, and DyLoRA.

LOHA     <module>.hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b              B₁, A₁, B₂, A₂;   hada_t1, hada_t2   T₁, T₂
LOKR     <module>.lokr_w1, or lokr_w1_a, lokr_w1_b;   likewise lokr_w2      C, or C_b, C_a;   D, or B, A
OFT      <module>.oft_R.weight;   of an embedding oft_embedding_R.weight    v;   −v where `use_cayley_neumann` is false
BOFT     <module>.boft_R [m, n, p, p], boft_s [o, 1]                        A, s
LYCORIS_GLORA    <module>.a1.weight, a2.weight, b1.weight, b2.weight       A_u, A_d, B_u, B_d;   no other library's
DYLORA   <module>.lora_A.weight, lora_B.weight                             A, B;   likewise

Where HF peft means something else by a field, it is read as it is meant there, and written so that it means the same:
3 `num_cayley_neumann_terms` are 4, the exact Cayley transform is that of −v, and where LoKr's `scale_full` is off, α is
r for the modules whose factors are both full.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from refpeft import tune
from refpeft.adapter import Adapter
from refpeft.checkpoint.safetensors import Malformed, fitting, show
from refpeft.checkpoint.wrapper import CONFIG, FILE, PREFIX, check_rest, module_names, stored_name
from refpeft.count import outline
from refpeft.methods import METHODS as ALL
from refpeft.model import Model
from refpeft.ops import Array

TYPES = {"LOHA": "loha", "LOKR": "lokr", "OFT": "oft", "BOFT": "boft", "LYCORIS_GLORA": "glora", "DYLORA": "dylora"}
METHODS, PEFT_TYPES = tuple(TYPES.values()), tuple(TYPES)
OWN = ("scale_full", "side", "taps")  # fields that HF peft does not have: written where they are not as it means them
IGNORED = {  # without influence on the function
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "eps",
    "boft_dropout",
}  # fmt: skip


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The adapter of a folder, all of its tensors of the names and shapes that the config makes for this model."""
    method = TYPES[raw["peft_type"]]
    known = {f.name for f in dataclasses.fields(ALL[method].Config)}
    for name, value in raw.items():
        if name not in known | IGNORED and value not in (None, False, "", [], {}):
            raise Malformed(f"{CONFIG}: {show(name)} is set to {show(value)}, which is not supported")
    fields = {n: v for n, v in raw.items() if n in known and v is not None}
    if method == "oft" and fields.get("num_cayley_neumann_terms") == 3:
        fields["num_cayley_neumann_terms"] = 4
    try:
        cfg = tune.configured(ALL[method], method, fields, model)
        start = outline(method, cfg, model)
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    params = {}
    for name, like in start.params.items():
        stored = PREFIX + stored_name(start, name)
        at = stored if stored in tensors else PREFIX + name
        params[name] = fitting(FILE, tensors, at, like.shape, like.dtype)
    theirs = {PREFIX + name for name in params} | {PREFIX + stored_name(start, name) for name in params}
    check_rest(module_names({n: a for n, a in tensors.items() if n not in theirs}), cfg, model, {})
    return turned(Adapter(method, cfg, params))


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]:
    default = ALL[adapter.method].Config()
    cfg = adapter.config
    fields: dict[str, Any] = {n: list(v) if isinstance(v, tuple) else v for n, v in dataclasses.asdict(cfg).items()}
    if not fields.get("scale_full", True):
        fields |= {"scale_full": True, "alpha_pattern": {**unit(adapter), **cfg.alpha_pattern}}
    fields = {n: v for n, v in fields.items() if n not in OWN or v != getattr(default, n)}
    fields |= {
        "peft_type": PEFT_TYPES[METHODS.index(adapter.method)],
        "task_type": None,
        "base_model_name_or_path": None,
    }
    named = {PREFIX + stored_name(adapter, name): a for name, a in turned(adapter).params.items()}
    return fields | {"inference_mode": True}, named


def unit(adapter: Adapter) -> dict[str, float]:
    """α = r for the modules whose factors are both full; the first pattern that matches wins."""
    full = [path for path, (φ, _) in adapter.by_module.items() if "C" in φ and "D" in φ]
    return {re.escape(path): adapter.at(path).r for path in full}


def turned(adapter: Adapter) -> Adapter:
    """v ↔ −v where HF peft's Cayley transform turns the other way."""
    if adapter.method != "oft" or adapter.config.use_cayley_neumann:
        return adapter
    own = {name for φ, _ in adapter.by_module.values() for name in φ.values()}
    return adapter.replace(params={n: -a if n in own else a for n, a in adapter.params.items()})
