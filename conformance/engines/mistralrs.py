"""mistral.rs: an adapter's folder is loaded beside the model while it runs; asked for are the 20 likeliest tokens.

The law of the last token's successor, as far as it is told: the rest is nan. The prompt is words of the model's
tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path

import mistralrs  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from refpeft.checkpoint.safetensors import read_json
from refpeft.conformance.engines.variants import word
from refpeft.ops import Array

MOST = 20  # that are told
RANK = 16


class MistralRs:
    def __init__(self, model: Path, work: Path) -> None:
        self.vocab = read_json(model / "config.json")["vocab_size"]
        how = {"dtype": mistralrs.ModelDType.F32, "max_adapters": 8, "max_rank": RANK}
        which = mistralrs.Which.Lora(model_id=str(model), adapters=[], **how)
        self.runner = mistralrs.Runner(which, no_paged_attn=True, max_seqs=1)

    def load(self, name: str, folder: Path) -> None:
        self.runner.load_lora_adapter(name, str(folder))

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        text = " ".join(word(int(n)) for n in ids)
        asked = mistralrs.ChatCompletionRequest(
            messages=[{"role": "user", "content": text}], model="default", logprobs=True, top_logprobs=MOST,
            max_tokens=1, temperature=0, adapter=adapters[0] if adapters else None,
        )  # fmt: skip
        said = self.runner.send_chat_completion_request(asked)
        if said.usage.prompt_tokens != len(ids):
            raise ValueError(f"a prompt of {len(ids)} tokens became one of {said.usage.prompt_tokens}")
        found = np.full((len(ids), self.vocab), np.nan)
        for top in said.choices[0].logprobs.content[0].top_logprobs:
            found[-1, top.token] = top.logprob
        return found

    def close(self) -> None:
        pass
