"""The families: HF's names for the transformer's layers, as data.

A family says how its config.json becomes a `refpeft.config.Config`, and where each site of the model is found in the
checkpoint. Adding one is adding a table here.

Where transformers computes otherwise: the norms of LLaMA and T5 take their mean square in float32, whatever the weights
are; a T5 in float16 keeps `wo` in float32 and clamps what overflows.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refpeft.checkpoint.configs import (
    Json,
    always,
    bart_config,
    bart_width,
    bert_config,
    bert_width,
    boolean,
    gpt2_config,
    gpt2_width,
    labels,
    llama_bias,
    llama_config,
    natural,
    never,
    qwen2_bias,
    roberta_config,
    t5_config,
    t5_width,
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
    renamed: Mapping[str, str] = field(default_factory=dict)  # tensor → its name, where that is another
    buffers: tuple[str, ...] = ()  # its tensors that HF keeps as buffers
    encoder_only: bool = False  # of an encoder-decoder
    unused: tuple[str, ...] = ()  # regular expressions: what HF files may hold for this head and it does not read


@dataclass(frozen=True)
class Family:
    """`sites`, `layer` and `decoder` map sites to (module path below `base`, kind); {} is the layer's number. `layer`
    is that of the only stack, or of the encoder where there is a `decoder`."""

    base: str  # 'transformer.': the prefix of all that is below a head
    sites: Mapping[str, tuple[str, str]]
    layer: Mapping[str, tuple[str, str]]
    heads: Mapping[str, Head]
    config: Callable[[Json], dict[str, Any]]
    biased: Callable[[Json, str], bool]  # has this site of a layer (its name below 'layers.n.') a bias?
    intermediate: Callable[[Json, str], int]
    unused: tuple[str, ...] = ()  # regular expressions for buffers that files may hold
    tie_by_default: bool = True
    decoder: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    gated: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # in the place of those sites, if it is gated
    copies: Mapping[str, str] = field(default_factory=dict)  # tensor below `base` → the tensor that it always equals


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


def t5_layer(stack: str) -> dict[str, tuple[str, str]]:
    """Sublayers are numbered: the decoder's have the attention to the encoder between the other two."""
    blocks = {"attn": (0, "SelfAttention"), "cross": (1, "EncDecAttention")}
    if stack == "encoder":
        del blocks["cross"]
    layer: dict[str, tuple[str, str]] = {}
    for name, (n, module) in blocks.items():
        layer |= {f"{name}.{x}": (f"{stack}.block.{{}}.layer.{n}.{module}.{x}", "linear") for x in "qkvo"}
        layer[f"{name}.norm"] = (f"{stack}.block.{{}}.layer.{n}.layer_norm", "rms_norm")
    at = f"{stack}.block.{{}}.layer.{len(blocks)}."
    return layer | {
        "mlp.up": (at + "DenseReluDense.wi", "linear"),
        "mlp.down": (at + "DenseReluDense.wo", "linear"),
        "mlp.norm": (at + "layer_norm", "rms_norm"),
    }


def t5_gated(stack: str, n: int) -> dict[str, tuple[str, str]]:
    at = f"{stack}.block.{{}}.layer.{n}.DenseReluDense."
    return {f"{stack}.mlp.gate": (at + "wi_0", "linear"), f"{stack}.mlp.up": (at + "wi_1", "linear")}


def t5_stack(stack: str) -> dict[str, tuple[str, str]]:
    return {
        f"{stack}.embed.relative": (f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", "embedding"),
        f"{stack}.final.norm": (f"{stack}.final_layer_norm", "rms_norm"),
    }


def bart_layer(stack: str) -> dict[str, tuple[str, str]]:
    at = f"{stack}.layers.{{}}."
    blocks = {"attn": "self_attn", "cross": "encoder_attn"} if stack == "decoder" else {"attn": "self_attn"}
    layer: dict[str, tuple[str, str]] = {}
    for name, module in blocks.items():
        layer |= {f"{name}.{x}": (f"{at}{module}.{x}_proj", "linear") for x in "qkv"}
        layer[f"{name}.o"] = (f"{at}{module}.out_proj", "linear")
        layer[f"{name}.norm"] = (f"{at}{module}_layer_norm", "layer_norm")
    return layer | {
        "mlp.up": (at + "fc1", "linear"),
        "mlp.down": (at + "fc2", "linear"),
        "mlp.norm": (at + "final_layer_norm", "layer_norm"),
    }


def bart_stack(stack: str) -> dict[str, tuple[str, str]]:
    return {
        f"{stack}.embed.position": (f"{stack}.embed_positions", "embedding"),
        f"{stack}.embed.norm": (f"{stack}.layernorm_embedding", "layer_norm"),
    }


TOKENS = Head(("head.out",), {"head.out": ("classifier", "linear")})  # a class for every token
PRETRAINING = (r"bert\.pooler\..*", r"cls\.seq_relationship\..*")  # as in bert-base-uncased

BERT_SITES = {
    "embed.token": ("embeddings.word_embeddings", "embedding"),
    "embed.position": ("embeddings.position_embeddings", "embedding"),
    "embed.type": ("embeddings.token_type_embeddings", "embedding"),
    "embed.norm": ("embeddings.LayerNorm", "layer_norm"),
}

# transformers 5 looks tokens up in the copies and never runs `shared`, so that an adapter of HF peft on `shared` does
# nothing there, and one on `embed_tokens` is two, of the encoder and of the decoder. Here `shared` is the one layer.
COPIES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}
T5_LM = Head(
    ("scale", "head.out"),
    {"head.out": ("lm_head", "linear")},
    {"lm_head.weight": "shared.weight"},
    unbiased=("head.out",),
)


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA = Family(
    base="model.",
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
    tie_by_default=False,
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        base="transformer.",
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
    ),
    "llama": LLAMA,
    "qwen2": replace(LLAMA, biased=qwen2_bias),
    "bert": Family(
        base="bert.",
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
        base="roberta.",
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
    "t5": Family(
        base="",
        sites={"embed.token": ("shared", "embedding"), **t5_stack("encoder"), **t5_stack("decoder")},
        layer=t5_layer("encoder"),
        decoder=t5_layer("decoder"),
        gated=t5_gated("encoder", 1) | t5_gated("decoder", 2),
        heads={
            "Model": Head((), {}, unused=(r"lm_head\.weight",)),
            "EncoderModel": Head((), {}, encoder_only=True, unused=(r"lm_head\.weight", r"decoder\..*")),
            "ForConditionalGeneration": T5_LM,
            "WithLMHeadModel": T5_LM,  # what the class was called first
        },
        config=t5_config,
        biased=never,
        intermediate=t5_width,
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        copies=COPIES,
    ),
    "bart": Family(
        base="model.",
        sites={"embed.token": ("shared", "embedding"), **bart_stack("encoder"), **bart_stack("decoder")},
        layer=bart_layer("encoder"),
        decoder=bart_layer("decoder"),
        heads={
            "Model": Head((), {}, unused=(r"lm_head\.weight", r"final_logits_bias")),
            "ForConditionalGeneration": Head(
                ("head.out",),
                {"head.out": ("lm_head", "linear")},
                {"lm_head.weight": "model.shared.weight"},
                renamed={"lm_head.bias": "final_logits_bias"},
                buffers=("final_logits_bias",),
            ),
            "ForSequenceClassification": Head(
                ("eos", "head.dense", "tanh", "head.out"),
                {
                    "head.dense": ("classification_head.dense", "linear"),
                    "head.out": ("classification_head.out_proj", "linear"),
                },
            ),
        },
        config=bart_config,
        biased=always,
        intermediate=bart_width,
        unused=(r"(.*\.)?(encoder|decoder)\.version",),
        copies=COPIES,
    ),
}


# ── from a config to a model without its numbers ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plan:
    """What config.json promises: what the model computes, its sites, and its tensors with the shapes they must have."""

    config: Config
    sites: Mapping[str, Site]
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors that the sites name
    tied: Mapping[str, str]  # tensor → the one that it shares
    copies: Mapping[str, str]  # those of them that do so whatever config.json says of ties
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
    base = "" if suffix == "Model" else family.base
    fields = family.config(c)
    if head.encoder_only:
        fields |= {"num_decoder_layers": None, "causal": False}
    scale = fields.pop("head_scale", True)
    steps = tuple(fields["activation"] if step == "act" else step for step in head.steps if step != "scale" or scale)
    tied = dict(head.tied) if boolean(c, "tie_word_embeddings", family.tie_by_default) else {}
    names = {**tied, **head.renamed}
    config = Config(family=c["model_type"], head=steps, buffers=head.buffers, **fields)
    sites = {
        role: Site(path, k, names.get(path + ".weight", path + ".weight"), names.get(path + ".bias", path + ".bias"))
        for role, (path, k) in places(family, head, base, config).items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for role, site in sites.items():
        shape = site_shape(c, family, config, role)
        shapes[site.weight] = shape[::-1] if site.kind == "conv1d" else shape
        if has_bias(c, family, head, role, site.kind):
            shapes[site.bias] = shape[:1]
    unused = (*family.unused, *head.unused, *map(re.escape, head.tied.values() if not tied else head.tied))
    copies = {base + copy: base + original for copy, original in family.copies.items()}
    return Plan(config, sites, shapes, tied | copies, copies, base, (*unused, *map(re.escape, copies)))


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


LAYER = re.compile(r"(?:(encoder|decoder)\.)?layers\.\d+\.(.*)")


def places(family: Family, head: Head, base: str, config: Config) -> dict[str, tuple[str, str]]:
    """Every site's module path and kind."""
    where = {role: (base + path, k) for role, (path, k) in family.sites.items()}
    stacks = {"encoder.": config.num_layers, "decoder.": config.num_decoder_layers or 0}
    for stack, layers in stacks.items() if family.decoder else [("", config.num_layers)]:
        layer = dict(family.decoder if stack == "decoder." else family.layer)
        if config.gated:
            layer |= {r.removeprefix(stack): v for r, v in family.gated.items() if r.startswith(stack)}
        for n in range(layers):
            where |= {f"{stack}layers.{n}.{role}": (base + path.format(n), k) for role, (path, k) in layer.items()}
    if head.encoder_only:  # one stack, named like one
        where = {r.removeprefix("encoder."): v for r, v in where.items() if not r.startswith("decoder.")}
    return where | dict(head.sites)


def has_bias(c: Json, family: Family, head: Head, role: str, kind: str) -> bool:
    if kind in ("embedding", "rms_norm") or role in head.unbiased:
        return False
    in_layer = LAYER.fullmatch(role)
    return kind == "layer_norm" or in_layer is None or family.biased(c, in_layer[2])


def site_shape(c: Json, family: Family, config: Config, role: str) -> tuple[int, ...]:
    """The shape of a site's W [o, i], an embedding's E [v, d], or a norm's gain [d], as the config has it."""
    d, e = config.hidden_size, config.head_dim
    q, kv = config.num_heads * e, config.num_kv_heads * e
    stack, name = (
        m.groups() if (m := LAYER.fullmatch(role)) else ("", role.removeprefix("encoder.").removeprefix("decoder."))
    )
    if name.endswith("norm"):
        return (d,)
    if name.startswith("mlp."):
        ff = family.intermediate(c, stack or "")
        return (d, ff) if name == "mlp.down" else (ff, d)
    if name in ("embed.token", "head.out"):
        classes = name == "head.out" and c["architectures"][0].endswith("Classification")
        return (labels(c) if classes else natural(c, "vocab_size"), d)
    if name == "embed.position":
        room = natural(c, "n_positions" if "n_positions" in c else "max_position_embeddings")
        return (room + config.position_offset, d)
    if name == "embed.relative" and config.relative:
        return (config.relative[0], config.num_heads)
    if name == "embed.type":
        return (natural(c, "type_vocab_size"), d)
    widths = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "qkv": (q + 2 * kv, d)}
    where, _, last = name.partition(".")
    return widths[last] if where in ("attn", "cross") else (d, d)
