"""The families: HF's names for the transformer's layers, as data.

A family says how its config.json becomes a `refpeft.config.Config`, and where each site of the model is found in the
checkpoint. Adding one is adding a table here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refpeft.config import Config, Site

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Head:
    """What follows the layers of one HF architecture: steps for `Config.head`, and the sites it adds."""

    steps: tuple[str, ...]
    sites: Mapping[str, tuple[str, str]]  # site → (module path, kind)
    tied: Mapping[str, str] = field(
        default_factory=dict
    )  # tensor of a tied layer → the tensor it shares, if the config ties them


@dataclass(frozen=True)
class Family:
    """`sites` and `layer` map sites to (module path below `base`, kind); {} is the layer's number."""

    base: str
    sites: Mapping[str, tuple[str, str]]
    layer: Mapping[str, tuple[str, str]]
    heads: Mapping[str, Head]
    config: Callable[[Json], dict[str, Any]]
    final: tuple[str, ...] = ()  # steps after the layers of every architecture
    tie_by_default: bool = True


def bert_layer(prefix: str = "encoder.layer.{}.") -> dict[str, tuple[str, str]]:
    return {
        "attn.q": (prefix + "attention.self.query", "linear"),
        "attn.k": (prefix + "attention.self.key", "linear"),
        "attn.v": (prefix + "attention.self.value", "linear"),
        "attn.o": (prefix + "attention.output.dense", "linear"),
        "attn.norm": (prefix + "attention.output.LayerNorm", "layer_norm"),
        "mlp.up": (prefix + "intermediate.dense", "linear"),
        "mlp.down": (prefix + "output.dense", "linear"),
        "mlp.norm": (prefix + "output.LayerNorm", "layer_norm"),
    }


BERT_SITES = {
    "embed.token": ("embeddings.word_embeddings", "embedding"),
    "embed.position": ("embeddings.position_embeddings", "embedding"),
    "embed.type": ("embeddings.token_type_embeddings", "embedding"),
    "embed.norm": ("embeddings.LayerNorm", "layer_norm"),
}


def gpt2_config(c: Json) -> dict[str, Any]:
    require(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d, h = c["n_embd"], c["n_head"]
    return {
        "hidden_size": d, "num_layers": c["n_layer"], "num_heads": h, "num_kv_heads": h, "head_dim": d // h,
        "activation": c.get("activation_function", "gelu_new"), "gated": False, "norm_first": True,
        "norm_eps": c.get("layer_norm_epsilon", 1e-5), "causal": True, "pad_token_id": c.get("pad_token_id"),
    }  # fmt: skip


def llama_config(c: Json) -> dict[str, Any]:
    require(c, use_sliding_window=False)
    d, h = c["hidden_size"], c["num_attention_heads"]
    e = c.get("head_dim") or d // h
    return {
        "hidden_size": d, "num_layers": c["num_hidden_layers"], "num_heads": h,
        "num_kv_heads": c.get("num_key_value_heads") or h, "head_dim": e,
        "activation": c.get("hidden_act", "silu"), "gated": True, "norm_first": True,
        "norm_eps": c.get("rms_norm_eps", 1e-6), "causal": True, "inv_freq": frequencies(c, e),
        "pad_token_id": c.get("pad_token_id"),
    }  # fmt: skip


def bert_config(c: Json) -> dict[str, Any]:
    require(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    d, h = c["hidden_size"], c["num_attention_heads"]
    return {
        "hidden_size": d, "num_layers": c["num_hidden_layers"], "num_heads": h, "num_kv_heads": h, "head_dim": d // h,
        "activation": c.get("hidden_act", "gelu"), "gated": False, "norm_first": False,
        "norm_eps": c.get("layer_norm_eps", 1e-12), "causal": False, "pad_token_id": c.get("pad_token_id"),
    }  # fmt: skip


def roberta_config(c: Json) -> dict[str, Any]:
    return bert_config(c) | {"positions": "nonpad", "pad_token_id": c.get("pad_token_id", 1)}


def frequencies(c: Json, e: int) -> np.ndarray[Any, Any]:
    """f_k = θ^(−2k/e), k = 0 … e/2 − 1, in float64; 'linear' divides them by a factor, 'llama3' the slow ones only.

    llama3 (Llama 3.1): wavelengths above L/low are stretched by the factor, those below L/high are kept, and those
    between are interpolated by (L/wavelength − low)/(high − low), L the original context length.
    """
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    θ = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    f = θ ** (-np.arange(0, e, 2) / e)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return f
    if kind == "linear":
        return f / rope["factor"]
    if kind == "llama3":
        low, high, L = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        keep = np.clip((L * f / (2 * math.pi) - low) / (high - low), 0, 1)
        return f * (keep + (1 - keep) / rope["factor"])
    raise ValueError(f"config.json: rope_type must be 'default', 'linear' or 'llama3', found {kind!r}")


def require(c: Json, **expected: Any) -> None:
    for name, value in expected.items():
        if c.get(name, value) not in (value, None):
            raise ValueError(f"config.json: {name} must be {value!r}, found {c[name]!r}")


LLAMA = Family(
    base="model",
    sites={"embed.token": ("embed_tokens", "embedding"), "final.norm": ("norm", "rms_norm")},
    layer={
        "attn.norm": ("layers.{}.input_layernorm", "rms_norm"),
        "attn.q": ("layers.{}.self_attn.q_proj", "linear"),
        "attn.k": ("layers.{}.self_attn.k_proj", "linear"),
        "attn.v": ("layers.{}.self_attn.v_proj", "linear"),
        "attn.o": ("layers.{}.self_attn.o_proj", "linear"),
        "mlp.norm": ("layers.{}.post_attention_layernorm", "rms_norm"),
        "mlp.gate": ("layers.{}.mlp.gate_proj", "linear"),
        "mlp.up": ("layers.{}.mlp.up_proj", "linear"),
        "mlp.down": ("layers.{}.mlp.down_proj", "linear"),
    },
    heads={
        "Model": Head((), {}),
        "ForCausalLM": Head(
            ("head.out",), {"head.out": ("lm_head", "linear")}, {"lm_head.weight": "model.embed_tokens.weight"}
        ),
        "ForSequenceClassification": Head(("last", "head.out"), {"head.out": ("score", "linear")}),
    },
    config=llama_config,
    final=("final.norm",),
    tie_by_default=False,
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        base="transformer",
        sites={
            "embed.token": ("wte", "embedding"),
            "embed.position": ("wpe", "embedding"),
            "final.norm": ("ln_f", "layer_norm"),
        },
        layer={
            "attn.norm": ("h.{}.ln_1", "layer_norm"),
            "attn.qkv": ("h.{}.attn.c_attn", "conv1d"),
            "attn.o": ("h.{}.attn.c_proj", "conv1d"),
            "mlp.norm": ("h.{}.ln_2", "layer_norm"),
            "mlp.up": ("h.{}.mlp.c_fc", "conv1d"),
            "mlp.down": ("h.{}.mlp.c_proj", "conv1d"),
        },
        heads={
            "Model": Head((), {}),
            "LMHeadModel": Head(
                ("head.out",), {"head.out": ("lm_head", "linear")}, {"lm_head.weight": "transformer.wte.weight"}
            ),
            "ForSequenceClassification": Head(("last", "head.out"), {"head.out": ("score", "linear")}),
        },
        config=gpt2_config,
        final=("final.norm",),
    ),
    "llama": LLAMA,
    "qwen2": LLAMA,
    "bert": Family(
        base="bert",
        sites=BERT_SITES,
        layer=bert_layer(),
        heads={
            "Model": Head((), {"pooler": ("pooler.dense", "linear")}),
            "ForMaskedLM": Head(
                ("head.dense", "act", "head.norm", "head.out"),
                {
                    "head.dense": ("cls.predictions.transform.dense", "linear"),
                    "head.norm": ("cls.predictions.transform.LayerNorm", "layer_norm"),
                    "head.out": ("cls.predictions.decoder", "linear"),
                },
                {
                    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                    "cls.predictions.decoder.bias": "cls.predictions.bias",
                },
            ),
            "ForSequenceClassification": Head(
                ("first", "pooler", "tanh", "head.out"),
                {"pooler": ("bert.pooler.dense", "linear"), "head.out": ("classifier", "linear")},
            ),
        },
        config=bert_config,
    ),
    "roberta": Family(
        base="roberta",
        sites=BERT_SITES,
        layer=bert_layer(),
        heads={
            "Model": Head((), {"pooler": ("pooler.dense", "linear")}),
            "ForMaskedLM": Head(
                ("head.dense", "gelu", "head.norm", "head.out"),
                {
                    "head.dense": ("lm_head.dense", "linear"),
                    "head.norm": ("lm_head.layer_norm", "layer_norm"),
                    "head.out": ("lm_head.decoder", "linear"),
                },
                {
                    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                    "lm_head.decoder.bias": "lm_head.bias",
                },
            ),
            "ForSequenceClassification": Head(
                ("first", "head.dense", "tanh", "head.out"),
                {"head.dense": ("classifier.dense", "linear"), "head.out": ("classifier.out_proj", "linear")},
            ),
        },
        config=roberta_config,
    ),
}


def describe(c: Json) -> tuple[Config, dict[str, Site], dict[str, str]]:
    """From a config.json: what the transformer computes, where its sites are, and which tensors share which others."""
    kind = c.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {', '.join(FAMILIES)}, found {kind!r}")
    family = FAMILIES[kind]
    architecture = (c.get("architectures") or [None])[0]
    if architecture is None:
        raise ValueError("config.json: architectures is missing, so there is no telling which head the model has")
    suffix = next((s for s in sorted(family.heads, key=len, reverse=True) if architecture.endswith(s)), None)
    if suffix is None or (suffix == "Model" and architecture.endswith(("HeadModel", "HeadsModel"))):
        raise ValueError(
            f"config.json: architecture {architecture!r} is not one of {', '.join(family.heads)} of {kind}"
        )
    head = family.heads[suffix]
    base = "" if suffix == "Model" else family.base + "."
    fields = family.config(c)
    where = {role: (base + path, k) for role, (path, k) in family.sites.items()}
    for n in range(fields["num_layers"]):
        where |= {f"layers.{n}.{role}": (base + path.format(n), k) for role, (path, k) in family.layer.items()}
    where |= head.sites
    tied = dict(head.tied) if c.get("tie_word_embeddings", family.tie_by_default) else {}
    steps = tuple(fields["activation"] if step == "act" else step for step in family.final + head.steps)
    sites = {
        role: Site(path, k, tied.get(path + ".weight", path + ".weight"), tied.get(path + ".bias", path + ".bias"))
        for role, (path, k) in where.items()
    }
    return Config(family=kind, head=steps, **fields), sites, tied
