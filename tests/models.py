"""Models small enough for tests: random weights, at the scale of trained ones, for every family and architecture."""

import math
from typing import Any

import numpy as np

from refpeft.checkpoint.families import describe, plan
from refpeft.model import Model, Site

GPT2 = {"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}
LLAMA = {
    "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 24,
}  # fmt: skip
BERT = {
    "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 24, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": 29, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 29, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20, "max_position_embeddings": 24,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": LLAMA,
    "bert": BERT,
    "roberta": BERT | {"pad_token_id": 1},
    "t5": T5,
    "bart": BART,
}
PREFIX = {
    "gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "bert": "Bert", "roberta": "Roberta", "t5": "T5",
    "bart": "Bart",
}  # fmt: skip
ARCHITECTURES = [
    ("gpt2", "GPT2Model"), ("gpt2", "GPT2LMHeadModel"), ("gpt2", "GPT2ForSequenceClassification"),
    ("llama", "LlamaModel"), ("llama", "LlamaForCausalLM"), ("llama", "LlamaForSequenceClassification"),
    ("qwen2", "Qwen2Model"), ("qwen2", "Qwen2ForCausalLM"), ("qwen2", "Qwen2ForSequenceClassification"),
    ("bert", "BertModel"), ("bert", "BertForMaskedLM"), ("bert", "BertForSequenceClassification"),
    ("bert", "BertForTokenClassification"), ("roberta", "RobertaForTokenClassification"),
    ("roberta", "RobertaModel"), ("roberta", "RobertaForMaskedLM"), ("roberta", "RobertaForSequenceClassification"),
]  # fmt: skip
ENCODER_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "T5": ("t5", "ForConditionalGeneration", {}),
    "T5 v1.1": ("t5", "ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "T5Model": ("t5", "Model", {}),
    "BART": ("bart", "ForConditionalGeneration", {}),
    "BART, scaled": ("bart", "ForConditionalGeneration", {"scale_embedding": True, "activation_function": "relu"}),
    "BartModel": ("bart", "Model", {}),
    "BART classifier": ("bart", "ForSequenceClassification", {}),
}
DEFAULT = {"gpt2": "LMHeadModel", "llama": "ForCausalLM", "qwen2": "ForCausalLM", "bert": "Model", "roberta": "Model"}
NORMS = ("layer_norm", "rms_norm")


def config_json(family: str, architecture: str | None = None, **config: Any) -> dict[str, Any]:
    """A config.json of a tiny model; `architecture` is HF's class, with or without its prefix ('ForCausalLM')."""
    name = architecture or DEFAULT[family]
    full = name if name.startswith(PREFIX[family]) else PREFIX[family] + name
    own: dict[str, Any] = {"model_type": family, "architectures": [full], **CONFIGS[family], **config}
    if full.endswith("Classification"):
        own = {"num_labels": 3} | own
        if PREFIX[family] in ("GPT2", "Llama", "Qwen2"):  # those that read the last token that is not padding
            own = {"pad_token_id": 0} | own
    return own


def tiny(family: str, architecture: str | None = None, seed: int = 0, dtype: Any = np.float64, **config: Any) -> Model:
    """A model of this family with random weights, two layers of width 16 unless `config` says otherwise.

    Matrices have entries of size 1/√(input width), gains lie around 1 and biases around 0, so that activations keep
    the size they have in trained models and every nonlinearity is met where it bends.
    """
    source = config_json(family, architecture, **config)
    fields, sites, _ = describe(source)
    rng = np.random.default_rng(seed)
    params: dict[str, np.ndarray[Any, Any]] = {}
    if family in ("t5", "bart"):
        p = plan(source)
        kinds = {site.weight: site.kind for site in p.sites.values()}
        params = {n: weight(rng, kinds.get(n, ""), shape) for n, shape in p.shapes.items()}
        return Model(fields, sites, {name: v.astype(dtype) for name, v in params.items()}, source)
    for role, site in sites.items():
        shape = shape_of(source, role, site)
        params.setdefault(site.weight, weight(rng, site.kind, shape))
        if has_bias(source, role, site):
            params.setdefault(site.bias, 0.1 * rng.normal(size=shape[0]))
    return Model(fields, sites, {name: v.astype(dtype) for name, v in params.items()}, source)


def weight(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if kind in NORMS:
        return 1 + 0.1 * rng.normal(size=shape)
    if len(shape) == 1:
        return 0.1 * rng.normal(size=shape)
    W = rng.normal(size=shape) / math.sqrt(shape[1])
    return np.ascontiguousarray(W.T) if kind == "conv1d" else W


def shape_of(c: dict[str, Any], role: str, site: Site) -> tuple[int, ...]:
    """[o, i] of a matrix, [v, d] of an embedding, [d] of a norm."""
    fields, _, _ = describe(c)
    d, e = fields.hidden_size, fields.head_dim
    wide, narrow = fields.num_heads * e, fields.num_kv_heads * e
    inner = c.get("intermediate_size") or c.get("n_inner") or 4 * d
    if site.kind in NORMS:
        return (d,)
    out = c["num_labels"] if c["architectures"][0].endswith("Classification") else c["vocab_size"]
    sizes = {
        "embed.token": (c["vocab_size"], d),
        "embed.position": (c.get("n_positions") or c.get("max_position_embeddings"), d),
        "embed.type": (c.get("type_vocab_size"), d),
        "qkv": (wide + 2 * narrow, d),
        "q": (wide, d), "k": (narrow, d), "v": (narrow, d), "o": (d, wide),
        "up": (inner, d), "gate": (inner, d), "down": (d, inner),
        "pooler": (d, d), "head.dense": (d, d), "head.out": (out, d),
    }  # fmt: skip
    shape: tuple[int, ...] = sizes.get(role) or sizes[role.rpartition(".")[2]]
    return shape


def has_bias(c: dict[str, Any], role: str, site: Site) -> bool:
    """Which layers HF gives a bias."""
    family = c["model_type"]
    if site.kind in ("embedding", "rms_norm"):
        return False
    if family in ("bert", "roberta"):
        return True
    if family == "gpt2":
        return role != "head.out"
    if role.endswith(("attn.q", "attn.k", "attn.v")):
        return family == "qwen2" or bool(c.get("attention_bias"))
    return bool(c.get("attention_bias")) if role.endswith("attn.o") else ".mlp." in role and bool(c.get("mlp_bias"))
