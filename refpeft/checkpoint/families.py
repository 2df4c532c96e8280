"""The families: HF's names for the transformer's layers, as data.

A family says how its config.json becomes a `refpeft.config.Config`, and where each site of the model is found in the
checkpoint. Adding one is adding a table here.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.config import Config, Site
from refpeft.ops import activations

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Head:
    """What follows the layers of one HF architecture: steps for `Config.head`, and the sites it adds."""

    steps: tuple[str, ...]
    sites: Mapping[str, tuple[str, str]]  # site → (module path, kind)
    tied: Mapping[str, str] = field(default_factory=dict)  # tensor of a tied layer → the tensor that it shares
    unbiased: tuple[str, ...] = ()  # its layers without a bias
    unused: tuple[str, ...] = ()  # regular expressions: what HF files may hold for this head and it does not read


@dataclass(frozen=True)
class Family:
    """`sites` and `layer` map sites to (module path below `base`, kind); {} is the layer's number."""

    base: str
    sites: Mapping[str, tuple[str, str]]
    layer: Mapping[str, tuple[str, str]]
    heads: Mapping[str, Head]
    config: Callable[[Json], dict[str, Any]]
    biased: Callable[[Json, str], bool]  # has this site of a layer (its name below 'layers.n.') a bias?
    intermediate: Callable[[Json], int]
    unused: tuple[str, ...] = ()  # regular expressions for buffers that files may hold
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


PRETRAINING = (r"bert\.pooler\..*", r"cls\.seq_relationship\..*")  # as in bert-base-uncased

BERT_SITES = {
    "embed.token": ("embeddings.word_embeddings", "embedding"),
    "embed.position": ("embeddings.position_embeddings", "embedding"),
    "embed.type": ("embeddings.token_type_embeddings", "embedding"),
    "embed.norm": ("embeddings.LayerNorm", "layer_norm"),
}


def gpt2_config(c: Json) -> dict[str, Any]:
    require(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d, h = natural(c, "n_embd"), natural(c, "n_head")
    return {
        "hidden_size": d, "num_layers": natural(c, "n_layer"), "num_heads": h, "num_kv_heads": h,
        "head_dim": share(c, "n_embd", "n_head"), "activation": activation(c, "activation_function", "gelu_new"),
        "gated": False, "norm_first": True, "norm_eps": positive(c, "layer_norm_epsilon", 1e-5), "causal": True,
        "pad_token_id": token(c, "pad_token_id"),
    }  # fmt: skip


def llama_config(c: Json) -> dict[str, Any]:
    require(c, use_sliding_window=False)
    h = natural(c, "num_attention_heads")
    e = natural(c, "head_dim", None) or share(c, "hidden_size", "num_attention_heads")
    g = natural(c, "num_key_value_heads", h)
    if h % g or e % 2:
        raise Malformed(f"config.json: {h} heads of width {e} cannot share {g} key-value heads and be rotated in pairs")
    return {
        "hidden_size": natural(c, "hidden_size"), "num_layers": natural(c, "num_hidden_layers"), "num_heads": h,
        "num_kv_heads": g, "head_dim": e, "activation": activation(c, "hidden_act", "silu"), "gated": True,
        "norm_first": True, "norm_eps": positive(c, "rms_norm_eps", 1e-6), "causal": True,
        "inv_freq": frequencies(c, e), "pad_token_id": token(c, "pad_token_id"),
    }  # fmt: skip


def bert_config(c: Json) -> dict[str, Any]:
    require(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    h = natural(c, "num_attention_heads")
    return {
        "hidden_size": natural(c, "hidden_size"), "num_layers": natural(c, "num_hidden_layers"), "num_heads": h,
        "num_kv_heads": h, "head_dim": share(c, "hidden_size", "num_attention_heads"),
        "activation": activation(c, "hidden_act", "gelu"), "gated": False, "norm_first": False,
        "norm_eps": positive(c, "layer_norm_eps", 1e-12), "causal": False, "pad_token_id": token(c, "pad_token_id"),
    }  # fmt: skip


def roberta_config(c: Json) -> dict[str, Any]:
    return bert_config(c) | {"positions": "nonpad", "pad_token_id": token(c, "pad_token_id", 1)}


def llama_bias(c: Json, role: str) -> bool:
    return bool(c.get("attention_bias" if role.startswith("attn") else "mlp_bias", False))


def qwen2_bias(c: Json, role: str) -> bool:
    return role in ("attn.q", "attn.k", "attn.v")


def always(c: Json, role: str) -> bool:
    return True


def bert_width(c: Json) -> int:
    return int(natural(c, "intermediate_size"))


def gpt2_width(c: Json) -> int:
    return int(natural(c, "n_inner", None) or 4 * natural(c, "n_embd"))


def frequencies(c: Json, e: int) -> np.ndarray[Any, Any]:
    """f_k = θ^(−2k/e), k = 0 … e/2 − 1, in float64; 'linear' divides them by a factor, 'llama3' the slow ones only.

    llama3 (Llama 3.1): wavelengths above L/low are stretched by the factor, those below L/high are kept, and those
    between are interpolated by (L/wavelength − low)/(high − low), L the original context length.
    """
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise Malformed(f"config.json: rope_parameters must be an object, found {show(rope)}")
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


def token(c: Json, name: str, default: Any = None) -> Any:
    value = field_of(c, name, default, lambda v: is_number(v, int) and -1 <= v < 2**31, "a token id")
    return None if value == -1 else value


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


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────

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
            ("head.out",),
            {"head.out": ("lm_head", "linear")},
            {"lm_head.weight": "model.embed_tokens.weight"},
            unbiased=("head.out",),
        ),
        "ForSequenceClassification": Head(
            ("last", "head.out"), {"head.out": ("score", "linear")}, unbiased=("head.out",)
        ),
    },
    config=llama_config,
    biased=llama_bias,
    intermediate=bert_width,
    unused=(r".*\.rotary_emb\.inv_freq",),
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
                ("head.out",),
                {"head.out": ("lm_head", "linear")},
                {"lm_head.weight": "transformer.wte.weight"},
                unbiased=("head.out",),
            ),
            "ForSequenceClassification": Head(
                ("last", "head.out"), {"head.out": ("score", "linear")}, unbiased=("head.out",)
            ),
        },
        config=gpt2_config,
        biased=always,
        intermediate=gpt2_width,
        unused=(r".*\.attn\.(masked_)?bias",),
        final=("final.norm",),
    ),
    "llama": LLAMA,
    "qwen2": replace(LLAMA, biased=qwen2_bias),
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
                unused=PRETRAINING,
            ),
            "ForSequenceClassification": Head(
                ("first", "pooler", "tanh", "head.out"),
                {"pooler": ("bert.pooler.dense", "linear"), "head.out": ("classifier", "linear")},
            ),
        },
        config=bert_config,
        biased=always,
        intermediate=bert_width,
        unused=(r".*\.(position|token_type)_ids",),
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
                unused=(r"roberta\.pooler\..*",),
            ),
            "ForSequenceClassification": Head(
                ("first", "head.dense", "tanh", "head.out"),
                {"head.dense": ("classifier.dense", "linear"), "head.out": ("classifier.out_proj", "linear")},
            ),
        },
        config=roberta_config,
        biased=always,
        intermediate=bert_width,
        unused=(r".*\.(position|token_type)_ids",),
    ),
}


# ── from a config to a model without its numbers ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plan:
    """What config.json promises: what the model computes, its sites, and its tensors with the shapes they must have."""

    config: Config
    sites: Mapping[str, Site]
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors that the sites name
    tied: Mapping[str, str]
    base: str  # 'transformer.', or '' for a model without a head
    unused: tuple[str, ...]


def describe(c: Json) -> tuple[Config, dict[str, Site], dict[str, str]]:
    """From a config.json: what the transformer computes, where its sites are, and which tensors share which others."""
    p = plan(c)
    return p.config, dict(p.sites), dict(p.tied)


def plan(c: Json) -> Plan:
    family = family_of(c)
    suffix = head_of(c, family)
    head = family.heads[suffix]
    base = "" if suffix == "Model" else family.base + "."
    fields = family.config(c)
    steps = tuple(fields["activation"] if step == "act" else step for step in family.final + head.steps)
    tied = dict(head.tied) if boolean(c, "tie_word_embeddings", family.tie_by_default) else {}
    sites = {
        role: Site(path, k, tied.get(path + ".weight", path + ".weight"), tied.get(path + ".bias", path + ".bias"))
        for role, (path, k) in places(family, head, base, fields["num_layers"]).items()
    }
    config = Config(family=c["model_type"], head=steps, **fields)
    shapes: dict[str, tuple[int, ...]] = {}
    for role, site in sites.items():
        shape = site_shape(c, family, config, role)
        shapes[site.weight] = shape[::-1] if site.kind == "conv1d" else shape
        if has_bias(c, family, head, role, site.kind):
            shapes[site.bias] = shape[:1]
    unused = (*family.unused, *head.unused, *map(re.escape, head.tied.values() if not tied else head.tied))
    return Plan(config, sites, shapes, tied, base, unused)


def boolean(c: Json, name: str, default: bool) -> bool:
    return bool(field_of(c, name, default, lambda v: isinstance(v, bool), "true or false"))


def family_of(c: Json) -> Family:
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise Malformed(f"config.json: model_type must be one of {', '.join(FAMILIES)}, found {show(kind)}")
    return FAMILIES[kind]


def head_of(c: Json, family: Family) -> str:
    """Which of the family's heads the architecture names."""
    names = c.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise Malformed(f"config.json: architectures must be a list of one name, found {show(names)}")
    suffix = next((s for s in sorted(family.heads, key=len, reverse=True) if names[0].endswith(s)), None)
    if suffix is None or (suffix == "Model" and names[0].endswith(("HeadModel", "HeadsModel"))):
        raise Malformed(
            f"config.json: the architecture must end in one of {', '.join(family.heads)}, found {show(names[0])}"
        )
    return suffix


def places(family: Family, head: Head, base: str, layers: int) -> dict[str, tuple[str, str]]:
    """Every site's module path and kind."""
    where = {role: (base + path, k) for role, (path, k) in family.sites.items()}
    for n in range(layers):
        where |= {f"layers.{n}.{role}": (base + path.format(n), k) for role, (path, k) in family.layer.items()}
    return where | dict(head.sites)


def has_bias(c: Json, family: Family, head: Head, role: str, kind: str) -> bool:
    if kind in ("embedding", "rms_norm") or role in head.unbiased:
        return False
    return kind == "layer_norm" or not role.startswith("layers.") or family.biased(c, role.split(".", 2)[2])


def site_shape(c: Json, family: Family, config: Config, role: str) -> tuple[int, ...]:
    """The shape of a site's W [o, i], an embedding's E [v, d], or a norm's gain [d], as the config has it."""
    d, e = config.hidden_size, config.head_dim
    q, kv = config.num_heads * e, config.num_kv_heads * e
    name = role.split(".", 2)[2] if role.startswith("layers.") else role
    if name.endswith("norm"):
        return (d,)
    if name.startswith("mlp."):
        ff = family.intermediate(c)
        return (d, ff) if name == "mlp.down" else (ff, d)
    if name in ("embed.token", "head.out"):
        classes = name == "head.out" and {"first", "last"} & set(config.head)
        return (labels(c) if classes else natural(c, "vocab_size"), d)
    if name == "embed.position":
        return (natural(c, "n_positions" if "n_positions" in c else "max_position_embeddings"), d)
    if name == "embed.type":
        return (natural(c, "type_vocab_size"), d)
    widths = {"attn.q": (q, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, q), "attn.qkv": (q + 2 * kv, d)}
    return widths.get(name, (d, d))


def labels(c: Json) -> int:
    """How many classes: as many as are named, or `num_labels`, or HF's 2."""
    names = field_of(c, "id2label", None, lambda v: isinstance(v, dict), "an object")
    return len(names) if names else int(natural(c, "num_labels", 2))
