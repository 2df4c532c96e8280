"""Reading a config.json: what each family's fields mean for the transformer. No field is used unchecked."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.ops import activations

Json = Mapping[str, Any]
DEEPEST, WIDEST = 10_000, 1 << 16  # layers, and a head's width: both are walked through before any tensor is looked at


def gpt2_config(c: Json) -> dict[str, Any]:
    require(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d, h = natural(c, "n_embd"), natural(c, "n_head")
    return {
        "hidden_size": d, "num_layers": depth(c, "n_layer"), "num_heads": h, "num_kv_heads": h,
        "head_dim": share(c, "n_embd", "n_head"), "activation": activation(c, "activation_function", "gelu_new"),
        "gated": False, "norm_first": True, "norm_eps": positive(c, "layer_norm_epsilon", 1e-5), "causal": True,
        "pad_token_id": token(c, "pad_token_id"),
    }  # fmt: skip


def llama_config(c: Json) -> dict[str, Any]:
    require(c, use_sliding_window=False)
    h = natural(c, "num_attention_heads")
    e = natural(c, "head_dim", None) or share(c, "hidden_size", "num_attention_heads")
    g = natural(c, "num_key_value_heads", h)
    if e > WIDEST:
        raise Malformed(f"config.json: heads must be of width {WIDEST} at most, found {e}")
    if h % g or e % 2:
        raise Malformed(f"config.json: {h} heads of width {e} cannot share {g} key-value heads and be rotated in pairs")
    return {
        "hidden_size": natural(c, "hidden_size"), "num_layers": depth(c, "num_hidden_layers"), "num_heads": h,
        "num_kv_heads": g, "head_dim": e, "activation": activation(c, "hidden_act", "silu"), "gated": True,
        "norm_first": True, "norm_eps": positive(c, "rms_norm_eps", 1e-6), "causal": True,
        "inv_freq": frequencies(c, e), "pad_token_id": token(c, "pad_token_id"),
    }  # fmt: skip


def bert_config(c: Json) -> dict[str, Any]:
    require(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    h = natural(c, "num_attention_heads")
    return {
        "hidden_size": natural(c, "hidden_size"), "num_layers": depth(c, "num_hidden_layers"), "num_heads": h,
        "num_kv_heads": h, "head_dim": share(c, "hidden_size", "num_attention_heads"),
        "activation": activation(c, "hidden_act", "gelu"), "gated": False, "norm_first": False,
        "norm_eps": positive(c, "layer_norm_eps", 1e-12), "causal": False, "pad_token_id": token(c, "pad_token_id"),
    }  # fmt: skip


def roberta_config(c: Json) -> dict[str, Any]:
    return bert_config(c) | {"positions": "nonpad", "pad_token_id": token(c, "pad_token_id", 1)}


def t5_config(c: Json) -> dict[str, Any]:
    """v1.0: a tied head, whose inputs are scaled. v1.1: a head of its own, and `tie_word_embeddings` false; but there
    transformers 5 writes true in all cases, and says what the field meant in `scale_decoder_outputs`."""
    require(c, is_decoder=False)
    h = natural(c, "num_heads")
    gate, _, act = str(c.get("feed_forward_proj") or "relu").rpartition("-")
    name = {"gated-gelu": "gelu_new"}.get(f"{gate}-{act}", act)
    if gate not in ("", "gated") or name not in activations:
        fits = f"one of {', '.join(activations)}, or 'gated-' and one of them"
        raise Malformed(f"config.json: feed_forward_proj must be {fits}, found {show(c['feed_forward_proj'])}")
    n, longest = natural(c, "relative_attention_num_buckets", 32), natural(c, "relative_attention_max_distance", 128)
    if n < 4 or longest <= n // 2:
        raise Malformed(f"config.json: {n} relative_attention_num_buckets do not fit a max_distance of {longest}")
    layers = depth(c, "num_layers")
    return {
        "hidden_size": natural(c, "d_model"), "num_layers": layers, "num_heads": h, "num_kv_heads": h,
        "num_decoder_layers": depth(c, "num_decoder_layers", layers), "head_dim": natural(c, "d_kv"),
        "activation": name, "gated": gate == "gated", "norm_first": True, "causal": True,
        "norm_eps": positive(c, "layer_norm_epsilon", 1e-6), "attention_scale": 1.0, "relative": (n, longest),
        "pad_token_id": token(c, "pad_token_id", 0), "eos_token_id": first_token(c, "eos_token_id", 1),
        "decoder_start_token_id": token(c, "decoder_start_token_id"),
        "head_scale": boolean(c, "scale_decoder_outputs", boolean(c, "tie_word_embeddings", True)),
    }  # fmt: skip


def bart_config(c: Json) -> dict[str, Any]:
    require(c, is_encoder_decoder=True, is_decoder=False, normalize_before=False, normalize_embedding=True)
    require(c, static_position_embeddings=False, add_final_layer_norm=False, extra_pos_embeddings=2)
    h = natural(c, "encoder_attention_heads", 16)
    require(c, decoder_attention_heads=h)
    d = natural(c, "d_model", 1024)
    return {
        "hidden_size": d, "num_layers": depth(c, "encoder_layers", 12), "num_heads": h, "num_kv_heads": h,
        "num_decoder_layers": depth(c, "decoder_layers", 12),
        "head_dim": share({"d_model": d, "encoder_attention_heads": h}, "d_model", "encoder_attention_heads"),
        "activation": activation(c, "activation_function", "gelu"), "gated": False, "norm_first": False,
        "norm_eps": 1e-5, "causal": True, "position_offset": 2, "shifts_input": True,
        "embed_scale": math.sqrt(d) if boolean(c, "scale_embedding", False) else 1.0,
        "pad_token_id": token(c, "pad_token_id", 1), "eos_token_id": first_token(c, "eos_token_id", 2),
        "decoder_start_token_id": token(c, "decoder_start_token_id", 2),
    }  # fmt: skip


def llama_bias(c: Json, role: str) -> bool:
    return bool(c.get("attention_bias" if role.startswith("attn") else "mlp_bias", False))


def qwen2_bias(c: Json, role: str) -> bool:
    return role in ("attn.q", "attn.k", "attn.v")


def always(c: Json, role: str) -> bool:
    return True


def never(c: Json, role: str) -> bool:
    return False


def bert_width(c: Json, stack: str) -> int:
    return int(natural(c, "intermediate_size"))


def gpt2_width(c: Json, stack: str) -> int:
    return int(natural(c, "n_inner", None) or 4 * natural(c, "n_embd"))


def t5_width(c: Json, stack: str) -> int:
    return int(natural(c, "d_ff"))


def bart_width(c: Json, stack: str) -> int:
    return int(natural(c, f"{stack}_ffn_dim", 4096))


def frequencies(c: Json, e: int) -> np.ndarray[Any, Any]:
    """f_k = θ^(−2k/e), k = 0 … e/2 − 1, in float64; 'linear' divides them by a factor, 'llama3' the slow ones only.

    llama3 (Llama 3.1): wavelengths above L/low are stretched by the factor, those below L/high are kept, and those
    between are interpolated by (L/wavelength − low)/(high − low), L the original context length.
    """
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise Malformed(f"config.json: rope_parameters must be an object, found {show(rope)}")
    for fields in (c, rope):
        require(fields, partial_rotary_factor=1)
    θ = positive(rope, "rope_theta", None) or positive(c, "rope_theta", 10000.0)
    f: np.ndarray[Any, Any] = θ ** (-np.arange(0, e, 2) / e)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return f
    if kind == "linear":
        return f / float(positive(rope, "factor"))
    if kind == "llama3":
        low, high = positive(rope, "low_freq_factor"), positive(rope, "high_freq_factor")
        L, factor = positive(rope, "original_max_position_embeddings"), float(positive(rope, "factor"))
        if low >= high:
            raise Malformed(f"config.json: low_freq_factor must be below high_freq_factor, found {low} and {high}")
        keep: np.ndarray[Any, Any] = np.clip((L * f / (2 * math.pi) - low) / (high - low), 0, 1)
        return f * (keep + (1 - keep) / factor)
    raise Malformed(f"config.json: rope_type must be 'default', 'linear' or 'llama3', found {show(kind)}")


# ── reading fields ───────────────────────────────────────────────────────────────────────────────────────────────────

REQUIRED: Any = object()


def field_of(c: Json, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
    """A field of config.json; null, as in HF, means its default."""
    value = c.get(name)
    if value is None and default is REQUIRED:
        raise Malformed(f"config.json: {name} is missing, which must be {what}")
    if value is not None and not fits(value):
        raise Malformed(f"config.json: {name} must be {what}, found {show(value)}")
    return default if value is None else value


def is_number(v: Any, *kinds: type) -> bool:
    return isinstance(v, kinds) and not isinstance(v, bool)


def natural(c: Json, name: str, default: Any = REQUIRED) -> Any:
    return field_of(c, name, default, lambda v: is_number(v, int) and 0 < v < 2**31, "a positive integer")


def depth(c: Json, name: str, default: Any = REQUIRED) -> Any:
    fits = f"a positive integer, {DEEPEST} at most"
    return field_of(c, name, default, lambda v: is_number(v, int) and 0 < v <= DEEPEST, fits)


def token(c: Json, name: str, default: Any = None) -> Any:
    value = field_of(c, name, default, lambda v: is_number(v, int) and -1 <= v < 2**31, "a token id")
    return None if value == -1 else value


def first_token(c: Json, name: str, default: int) -> Any:
    """Of several, the first."""
    several = c.get(name)
    return token({name: several[0]} if isinstance(several, list) and several else c, name, default)


def positive(c: Json, name: str, default: Any = REQUIRED) -> Any:
    return field_of(c, name, default, lambda v: is_number(v, int, float) and 0 < v < 1e30, "a positive number")


def activation(c: Json, name: str, default: str) -> Any:
    fits = f"one of {', '.join(activations)}"
    return field_of(c, name, default, lambda v: isinstance(v, str) and v in activations, fits)


def share(c: Json, width: str, heads: str) -> int:
    d, h = natural(c, width), natural(c, heads)
    if d % h:
        raise Malformed(f"config.json: {heads} must divide {width}, found {h} and {d}")
    return int(d // h)


def require(c: Json, **expected: Any) -> None:
    for name, value in expected.items():
        if c.get(name, value) not in (value, None):
            raise Malformed(f"config.json: {name} must be {value!r}, found {show(c[name])}")


def boolean(c: Json, name: str, default: bool) -> bool:
    return bool(field_of(c, name, default, lambda v: isinstance(v, bool), "true or false"))


def labels(c: Json) -> int:
    """How many classes: as many as are named, or `num_labels`, or HF's 2."""
    names = field_of(c, "id2label", None, lambda v: isinstance(v, dict), "an object")
    return len(names) if names else int(natural(c, "num_labels", 2))
