"""What all engines are given: a tiny LLaMA, and an adapter of each kind that HF peft writes, as HF's folders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import refpeft
from refpeft.adapter import Adapter
from refpeft.checkpoint.safetensors import write_json
from refpeft.conformance import tiny
from refpeft.conformance.numbers import integers, normal
from refpeft.model import Model
from refpeft.ops import Array

SIZES: Mapping[str, Any] = {  # that all engines take: a head of 32, a vocabulary that is not the width
    "vocab_size": 160, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "intermediate_size": 192, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip
LINEARS = tiny.LINEARS["llama"]
PLAIN: Mapping[str, Any] = {"r": 4, "lora_alpha": 12.0, "target_modules": list(LINEARS)}


@dataclass(frozen=True)
class Variant:
    about: str
    method: str
    config: Mapping[str, Any]


VARIANTS: Mapping[str, Variant] = {
    "plain": Variant("s = α/r", "lora", PLAIN),
    "rslora": Variant("`use_rslora`: s = α/√r", "rslora", {**PLAIN, "use_rslora": True}),
    "alpha_pattern": Variant(
        "another α for two kinds of layer", "lora", {**PLAIN, "alpha_pattern": {"v_proj": 4.0, "up_proj": 24.0}}
    ),
    "rank_pattern": Variant("another r for two", "lora", {**PLAIN, "rank_pattern": {"q_proj": 8, "down_proj": 2}}),
    "lora_bias": Variant("a bias on B", "lora", {**PLAIN, "lora_bias": True}),
    "dora": Variant("`use_dora`: magnitudes", "dora", {**PLAIN, "use_dora": True}),
}


def model() -> Model:
    return tiny.model(tiny.config_json("llama", "ForCausalLM", 2, **SIZES), 0, np.float32)


def adapter(name: str, base: Model) -> Adapter:
    """Moved away from where the method starts it, so far that the model says something else."""
    fresh = refpeft.init(VARIANTS[name].method, VARIANTS[name].config, base, seed=0)
    moved = {n: (v + 0.5 * normal(1, n, v.shape) / v.shape[-1] ** 0.5).astype(v.dtype) for n, v in fresh.params.items()}
    return fresh.replace(params=moved)


def prompt() -> Array:
    return integers(0, "ids", (12,), 3, SIZES["vocab_size"] - 1)


DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def word(token: int) -> str:
    """None of them is in another."""
    return f"t{token:03d}"


def tokenizer() -> dict[str, Any]:
    """One word for each token, which some engines want to have; and a chat whose text is what is said, and no more."""
    vocab = {word(n): n for n in range(SIZES["vocab_size"])}
    nothing = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor"])
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": word(0)}
    special = {"id": 2, "content": word(2), "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "tokenizer.json": {
            "version": "1.0", **nothing, "added_tokens": [{**special, "special": True}],
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": DECODER, "model": model,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": word(1), "eos_token": word(2),
            "unk_token": word(0), "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        },
    }  # fmt: skip


def write(folder: Path) -> None:
    base = model()
    refpeft.save(base, folder / "model")
    for name, content in tokenizer().items():
        write_json(folder / "model" / name, content)
    for name in VARIANTS:
        refpeft.save_adapter(adapter(name, base), folder / name)


# ── what an answer that is not right may be ──────────────────────────────────────────────────────────────────────────


def told(change: Callable[[Any], Mapping[str, Any]]) -> Callable[[Adapter], Adapter]:
    """The same tensors under another config."""
    return lambda a: a.replace(config=replace(a.config, **change(a.config)))


def plain(a: Adapter, *dropped: str) -> Adapter:
    """LoRA of A and B, whatever else the config says; without the tensors whose names end so."""
    make = refpeft.METHODS["lora"].Config
    known = {n: v for n, v in vars(a.config).items() if n in vars(make())}
    known |= {"use_rslora": False, "lora_bias": known["lora_bias"] and "lora_B.bias" not in dropped}
    return Adapter("lora", make(**known), {n: v for n, v in a.params.items() if not n.endswith(dropped or ("\0",))})


def one(c: Any) -> Mapping[str, Any]:
    """α such that s = 1 everywhere."""
    α = {k: float(r) for k, r in c.rank_pattern.items()}
    return {"lora_alpha": float(c.r) ** (0.5 if c.use_rslora else 1), "alpha_pattern": α}


def of_config(c: Any) -> Mapping[str, Any]:
    """s = α/r of the config, whatever the rank of a layer is."""
    return {"alpha_pattern": {k: c.lora_alpha * r / c.r for k, r in c.rank_pattern.items()}}


def started(a: Adapter, base: Model) -> Adapter:
    """Magnitudes as DoRA starts them: ‖W‖."""
    fresh = refpeft.init(a.method, a.config, base, seed=0).params
    return a.replace(params={n: fresh[n] if n.endswith(MAGNITUDE) else v for n, v in a.params.items()})


MAGNITUDE = "lora_magnitude_vector"


def mistakes(name: str, a: Adapter, base: Model) -> dict[str, Adapter | None]:
    """What could be computed instead: the mistake → the adapter that it makes of this one; None for the base."""
    unbiased, bare = plain(a, "lora_B.bias"), plain(a, MAGNITUDE)
    own: Mapping[str, Mapping[str, Adapter]] = {
        "rslora": {"α/r for α/√r": plain(a)},
        "alpha_pattern": {"without alpha_pattern": told(lambda c: {"alpha_pattern": {}})(a)},
        "rank_pattern": {"α/r with the r of the config for every layer's": told(of_config)(a)},
        "lora_bias": {
            "without the bias of B": unbiased,
            "without the bias of B, and a scale of 1": told(one)(unbiased),
        },
        "dora": {
            "DoRA with magnitudes as they start, ‖W‖, and not those of the file": started(a, base),
            "LoRA, without magnitudes": bare,
            "LoRA, without magnitudes, and a scale of 1": told(one)(bare),
        },
    }
    return {"the base model": None, "a scale of 1": told(one)(a), **own.get(name, {})}
