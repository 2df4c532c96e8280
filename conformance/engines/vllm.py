"""vLLM, on a CPU: an adapter's folder is named by a `LoRARequest`; asked for are the logits of a prompt's places.

The engine runs in this process, in float32, eagerly, without a tokenizer. It reads adapter_config.json: `use_rslora`
and the patterns.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.checkpoint.safetensors import read_json
from refpeft.ops import Array

QUIET = {  # read when vLLM is imported
    "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
RANK = 16  # the largest of an adapter


class VLLM:
    def __init__(self, model: Path, work: Path) -> None:
        os.environ.update(QUIET)
        from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

        config = read_json(model / "config.json")
        self.vocab = config["vocab_size"]
        self.llm = LLM(
            model=str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, enable_lora=True,
            max_lora_rank=RANK, max_model_len=config["max_position_embeddings"], logprobs_mode="raw_logits",
            max_logprobs=-1, max_num_seqs=2, enable_prefix_caching=False,
        )  # fmt: skip
        self.folders: dict[str, Path] = {}

    def load(self, name: str, folder: Path) -> None:
        """A name is known by its number; whether the folder can be loaded shows when it is."""
        self.folders[name] = folder
        self.llm.llm_engine.add_lora(self.request(name))

    def request(self, name: str) -> Any:
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]

        return LoRARequest(name, 1 + list(self.folders).index(name), str(self.folders[name]))

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        request = self.request(adapters[0]) if adapters else None
        prompt = {"prompt_token_ids": ids.tolist()}
        (said,) = self.llm.generate([prompt], how, lora_request=request, use_tqdm=False)
        rows = [*said.prompt_logprobs[1:], said.outputs[0].logprobs[0]]  # of the first token there is no law
        return np.array([[row[k].logprob for k in range(self.vocab)] for row in rows])

    def close(self) -> None:
        pass
