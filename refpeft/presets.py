"""Models by name: the config.json of well-known ones, as far as shapes and the choice of layers depend on it.

Sources: the config.json files that are published with the models; for GPT-3, Brown et al. 2020, arXiv 2005.14165,
table 2.1 (175B: 96 layers, 96 heads, d = 12,288; a context of 2,048; GPT-2's vocabulary). No weights, no tokenizers.
"""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def bert(d: int, layers: int, vocab: int = 30522) -> Json:
    return {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": vocab, "hidden_size": d,
        "num_hidden_layers": layers, "num_attention_heads": d // 64, "intermediate_size": 4 * d,
        "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    }  # fmt: skip


def roberta(d: int, layers: int) -> Json:
    own = {"architectures": ["RobertaForMaskedLM"], "max_position_embeddings": 514, "type_vocab_size": 1}
    return bert(d, layers, 50265) | {"model_type": "roberta", "layer_norm_eps": 1e-5, "pad_token_id": 1} | own


def gpt2(d: int, layers: int, heads: int) -> Json:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
        "n_embd": d, "n_layer": layers, "n_head": heads,
    }  # fmt: skip


def llama(d: int, ff: int, layers: int, heads: int, groups: int | None = None, **own: Any) -> Json:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": d,
        "intermediate_size": ff, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups or heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    } | own  # fmt: skip


def qwen2(d: int, ff: int, layers: int, heads: int, groups: int, **own: Any) -> Json:
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0}
    return llama(d, ff, layers, heads, groups, max_position_embeddings=131072) | kind | own


def t5(d: int, ff: int, layers: int, heads: int, width: int = 64, gated: bool = False) -> Json:
    """Of version 1.1: gated, and with a head of its own."""
    return {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128, "d_model": d,
        "d_ff": ff, "d_kv": width, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads,
        "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "is_encoder_decoder": True,
    }  # fmt: skip


def bart(d: int, layers: int) -> Json:
    return {
        "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": 50265, "d_model": d,
        "encoder_layers": layers, "decoder_layers": layers, "encoder_attention_heads": d // 64,
        "decoder_attention_heads": d // 64, "encoder_ffn_dim": 4 * d, "decoder_ffn_dim": 4 * d,
        "max_position_embeddings": 1024, "activation_function": "gelu", "scale_embedding": False, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "is_encoder_decoder": True,
    }  # fmt: skip


LLAMA2: Json = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA3: Json = {"vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}

PRESETS: Mapping[str, Json] = {
    "bert-base": bert(768, 12),
    "bert-large": bert(1024, 24),
    "roberta-base": roberta(768, 12),
    "roberta-large": roberta(1024, 24),
    "deberta-v2-xxlarge": {
        "model_type": "deberta-v2", "architectures": ["DebertaV2Model"], "vocab_size": 128100, "hidden_size": 1536,
        "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144, "max_position_embeddings": 512,
        "type_vocab_size": 0, "layer_norm_eps": 1e-7, "position_biased_input": False, "relative_attention": True,
        "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3,
    },
    "gpt2": gpt2(768, 12, 12),
    "gpt2-medium": gpt2(1024, 24, 16),
    "gpt2-large": gpt2(1280, 36, 20),
    "gpt2-xl": gpt2(1600, 48, 25),
    "gpt3": gpt2(12288, 96, 96) | {"model_type": "gpt3", "architectures": ["GPT3LMHeadModel"], "n_positions": 2048},
    "llama-7b": llama(4096, 11008, 32, 32),
    "llama-13b": llama(5120, 13824, 40, 40),
    "llama-33b": llama(6656, 17920, 60, 52),
    "llama-65b": llama(8192, 22016, 80, 64),
    "llama2-7b": llama(4096, 11008, 32, 32, **LLAMA2),
    "llama2-13b": llama(5120, 13824, 40, 40, **LLAMA2),
    "llama2-70b": llama(8192, 28672, 80, 64, 8, **LLAMA2),
    "llama3-8b": llama(4096, 14336, 32, 32, 8, **LLAMA3),
    "llama3-70b": llama(8192, 28672, 80, 64, 8, **LLAMA3),
    "qwen2-0.5b": qwen2(896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2-7b": qwen2(3584, 18944, 28, 28, 4, vocab_size=152064),
    "t5-small": t5(512, 2048, 6, 8),
    "t5-base": t5(768, 3072, 12, 12),
    "t5-large": t5(1024, 4096, 24, 16),
    "t5-3b": t5(1024, 16384, 24, 32, 128),
    "t5-11b": t5(1024, 65536, 24, 128, 128),
    "t5-v1.1-small": t5(512, 1024, 8, 6, gated=True),
    "t5-v1.1-base": t5(768, 2048, 12, 12, gated=True),
    "t5-v1.1-large": t5(1024, 2816, 24, 16, gated=True),
    "t5-v1.1-xl": t5(2048, 5120, 24, 32, gated=True),
    "t5-v1.1-xxl": t5(4096, 10240, 24, 64, gated=True),
    "bart-base": bart(768, 6),
    "bart-large": bart(1024, 12),
}  # fmt: skip
ALIASES: Mapping[str, str] = {
    "deberta-xxl": "deberta-v2-xxlarge",
    "gpt2-small": "gpt2",
    "gpt3-175b": "gpt3",
    "t5-xl": "t5-v1.1-xl",
    "t5-xxl": "t5-v1.1-xxl",
}
