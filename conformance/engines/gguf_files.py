"""GGUF files, as llama.cpp reads them: a model, and LoRA adapters for it.

Linear layers keep their shapes [o, i]. LLaMA's rows of Q and K are in another order: HF rotates pairs (k, k + e/2) of a
head of width e, llama.cpp pairs (2k, 2k + 1). So the rows of W and of B of Q and K are permuted, and those of a bias; A
is not. Of Qwen2 none are. An adapter has one `adapter.lora.alpha`, and s = α/r with r the rank of each layer, so α is
that of the config and what else a scale can be goes into B:  B ← B s/(α/r).  With α = 0 llama.cpp takes s = 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.checkpoint.families import describe
from refpeft.config import Config
from refpeft.conformance.engines.libllama import scripts
from refpeft.ops import Array

scripts()  # whose gguf is of the same release as the library
import gguf  # type: ignore[import-not-found, unused-ignore]  # noqa: E402

ARCHITECTURES: Mapping[str, Any] = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
THETA = 10000.0  # of the rotary frequencies, where there are not two of them to tell


def names(source: Mapping[str, Any]) -> Any:
    config = describe(source)[0]
    return gguf.get_tensor_name_map(ARCHITECTURES[config.family], config.num_layers)


def turned(source: Mapping[str, Any], path: str, a: Array) -> Array:
    """Rows in llama.cpp's order, those of Q and K of LLaMA: [h, 2, e/2] → [h, e/2, 2]."""
    config = describe(source)[0]
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(path.rpartition(".")[2])
    if config.family != "llama" or heads is None:
        return a
    return a.reshape(heads, 2, -1, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)


def theta(config: Config) -> float:
    """θ of inv_freqₖ = θ^(−2k/e)."""
    f = config.inv_freq
    return THETA if f is None or len(f) < 2 else float(f[1]) ** -float(len(f))


def write_model(path: Path, source: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """The tensors by HF's names."""
    config = describe(source)[0]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.family]])
    writer.add_context_length(source["max_position_embeddings"])
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(source["intermediate_size"])
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(theta(config))
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(source["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    known = names(source)
    for name, a in tensors.items():
        stem, _, kind = name.rpartition(".")
        put(writer, f"{known.get_name(stem)}.{kind}", turned(source, stem, a))
    finish(writer)


def write_adapter(path: Path, source: Mapping[str, Any], adapter: Adapter) -> None:
    family = describe(source)[0].family
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    α = adapter.config.lora_alpha
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, α)
    known = names(source)
    for name, a in adapter.params.items():
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        there = f"{known.get_name(stem)}.weight"
        if kind == "lora_A":
            put(writer, there + ".lora_a", a)
        else:
            s, r = adapter.at(stem).scale, a.shape[1]
            own = α / r if α else 1.0
            put(writer, there + ".lora_b", turned(source, stem, a) * np.float32(s / own))
    finish(writer)


def put(writer: Any, name: str, a: Array) -> None:
    writer.add_tensor(name, np.ascontiguousarray(a, np.float32))


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
