"""The families: HF's names for the transformer's layers, as data.

A family says how its config.json becomes a `refpeft.config.Config`, and where each site of the model is found in the
checkpoint. Adding one is adding a table here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refpeft.checkpoint.configs import (
    Json,
    always,
    bert_config,
    bert_width,
    boolean,
    gpt2_config,
    gpt2_width,
    labels,
    llama_bias,
    llama_config,
    natural,
    qwen2_bias,
    roberta_config,
)
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.config import Config, Site


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


TOKENS = Head(("head.out",), {"head.out": ("classifier", "linear")})  # a class for every token
PRETRAINING = (r"bert\.pooler\..*", r"cls\.seq_relationship\..*")  # as in bert-base-uncased

BERT_SITES = {
    "embed.token": ("embeddings.word_embeddings", "embedding"),
    "embed.position": ("embeddings.position_embeddings", "embedding"),
    "embed.type": ("embeddings.token_type_embeddings", "embedding"),
    "embed.norm": ("embeddings.LayerNorm", "layer_norm"),
}


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
            "ForTokenClassification": TOKENS,
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
            "ForTokenClassification": TOKENS,
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


def plan(c: Json, families: Mapping[str, Family] | None = None) -> Plan:
    family = family_of(c, families or FAMILIES)
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


def family_of(c: Json, families: Mapping[str, Family]) -> Family:
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        raise Malformed(f"config.json: model_type must be one of {', '.join(families)}, found {show(kind)}")
    return families[kind]


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
        classes = name == "head.out" and c["architectures"][0].endswith("Classification")
        return (labels(c) if classes else natural(c, "vocab_size"), d)
    if name == "embed.position":
        return (natural(c, "n_positions" if "n_positions" in c else "max_position_embeddings"), d)
    if name == "embed.type":
        return (natural(c, "type_vocab_size"), d)
    widths = {"attn.q": (q, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, q), "attn.qkv": (q + 2 * kv, d)}
    return widths.get(name, (d, d))
