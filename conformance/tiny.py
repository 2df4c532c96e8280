"""Tiny models: a config.json of each family, and weights at the scale of trained ones."""

import math
from collections.abc import Mapping
from typing import Any

from refpeft.checkpoint.families import plan
from refpeft.conformance.numbers import normal
from refpeft.model import Model

VOCAB = 13
WIDE = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 12,
}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCAB, "n_embd": 8, "n_head": 2, "n_positions": 12},
    "llama": {**WIDE, "num_key_value_heads": 1},
    "qwen2": {**WIDE, "num_key_value_heads": 1},
    "bert": {**WIDE, "type_vocab_size": 2, "pad_token_id": 0},
    "roberta": {**WIDE, "type_vocab_size": 2, "pad_token_id": 1},
    "t5": {
        "vocab_size": VOCAB, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_heads": 2, "pad_token_id": 0,
        "relative_attention_num_buckets": 4, "relative_attention_max_distance": 4,
    },
    "bart": {
        "vocab_size": VOCAB, "d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 12, "decoder_ffn_dim": 10, "max_position_embeddings": 12, "scale_embedding": True,
        "pad_token_id": 1,
    },
}  # fmt: skip
PREFIX = {
    "gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "bert": "Bert", "roberta": "Roberta", "t5": "T5",
    "bart": "Bart",
}  # fmt: skip
LM = {
    "gpt2": "LMHeadModel",
    "llama": "ForCausalLM",
    "qwen2": "ForCausalLM",
    "bert": "ForMaskedLM",
    "roberta": "ForMaskedLM",
    "t5": "ForConditionalGeneration",
    "bart": "ForConditionalGeneration",
}
CLASSIFIER = "ForSequenceClassification"
CAUSAL = ("gpt2", "llama", "qwen2")
ENCODER_DECODERS = ("t5", "bart")
DECODING = (*CAUSAL, *ENCODER_DECODERS)
START = {"t5": 1, "bart": 0}  # what a decoder reads first, where labels are given: no padding, and nobody's default
UNTIED = ("llama", "qwen2")  # families whose output layer, lm_head, is a layer of its own
ROUNDED = ("llama", "qwen2", "t5")  # families whose norms transformers computes in float32, whatever the weights are
DEPTH = {
    "gpt2": ("n_layer",),
    "t5": ("num_layers", "num_decoder_layers"),
    "bart": ("encoder_layers", "decoder_layers"),
}  # elsewhere num_hidden_layers
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # of T5
GATED = {"wi": "wi_1"}  # what T5's layers are called there
LINEARS = {  # what adapters are usually put on
    "gpt2": ("c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "attention.output.dense", "intermediate.dense"),
    "roberta": ("query", "key", "value", "attention.output.dense", "intermediate.dense"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "encoder_attn.v_proj", "fc2"),
}
NORMS = {
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "llama": ("input_layernorm", "post_attention_layernorm", "norm"),
    "qwen2": ("input_layernorm", "post_attention_layernorm", "norm"),
    "bert": ("LayerNorm",),
    "roberta": ("LayerNorm", "layer_norm"),
    "t5": ("layer_norm", "final_layer_norm"),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layernorm_embedding"),
}
TOKENS = {
    "gpt2": "wte", "llama": "embed_tokens", "qwen2": "embed_tokens", "bert": "word_embeddings",
    "roberta": "word_embeddings", "t5": "shared", "bart": "shared",
}  # fmt: skip
# of classifiers; T5 has none here, and that of BART reads a decoder with the tokens of the encoder
HEAD = {"gpt2": "score", "llama": "score", "qwen2": "score", "bert": "classifier", "roberta": "classifier"}


def config_json(family: str, architecture: str, layers: int, **more: Any) -> dict[str, Any]:
    depth = dict.fromkeys(DEPTH.get(family, ("num_hidden_layers",)), layers)
    own = {"model_type": family, "architectures": [PREFIX[family] + architecture], **FAMILIES[family], **depth, **more}
    if architecture == CLASSIFIER:
        own |= {"num_labels": 3} | ({"pad_token_id": 0} if family in CAUSAL else {})
    return own


def model(source: dict[str, Any], seed: int, dtype: Any) -> Model:
    p = plan(source)
    params: dict[str, Any] = {}
    for site in p.sites.values():
        shape = p.shapes[site.weight][:: -1 if site.kind == "conv1d" else 1]
        noise = normal(seed, site.weight, shape)
        W = 1 + 0.1 * noise if site.kind.endswith("norm") else noise / math.sqrt(shape[-1])
        params.setdefault(site.weight, W.T.copy() if site.kind == "conv1d" else W)
        if site.bias in p.shapes:
            params.setdefault(site.bias, 0.1 * normal(seed, site.bias, p.shapes[site.bias]))
    return Model(p.config, p.sites, {name: v.astype(dtype) for name, v in params.items()}, source)
