"""OpenVINO GenAI: the model as optimum-intel exports it, an adapter by its safetensors file, in float32.

`Adapter` reads the file and not adapter_config.json, so no scale: `AdapterConfig(adapter)` takes 1, and
`AdapterConfig(adapter, s)` what it is told, one number for all layers. Both are asked, the second with the s of the
config where that is one number. The law of the next token is told by 64 beams of one token; the rest is nan.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import openvino  # type: ignore[import-not-found, unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found, unused-ignore]

import refpeft
from refpeft.ops import Array

BEAMS = 64
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class OpenVINO:
    def __init__(self, model: Path, work: Path) -> None:
        from optimum.intel import OVModelForCausalLM  # type: ignore[import-not-found, unused-ignore]

        self.base, self.folder = refpeft.load(model), str(work / "openvino")
        exported = OVModelForCausalLM.from_pretrained(model, export=True, compile=False, load_in_8bit=False)
        exported.save_pretrained(self.folder)
        self.pipelines: dict[str, Any] = {}

    def load(self, name: str, folder: Path) -> None:
        config = genai.AdapterConfig(genai.Adapter(str(folder / "adapter_model.safetensors")), *self.scale(folder))
        self.pipelines[name] = genai.LLMPipeline(self.folder, "CPU", adapters=config, **EXACT)

    def scale(self, folder: Path) -> Sequence[float]:
        return ()

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        found = np.full((len(ids), self.base.source["vocab_size"]), np.nan)
        how = genai.GenerationConfig(
            max_new_tokens=1, num_beams=BEAMS, num_return_sequences=BEAMS, num_beam_groups=1, apply_chat_template=False,
            eos_token_id=self.base.source["eos_token_id"],
        )  # fmt: skip
        tensors = [openvino.Tensor(a.astype(np.int64)) for a in (ids[None], np.ones_like(ids)[None])]
        said = self.pipelines[adapters[0]].generate(genai.TokenizedInputs(*tensors), how)
        for (token,), score in zip(said.tokens, said.scores, strict=True):
            found[-1, token] = score
        return found

    def close(self) -> None:
        pass


class Scaled(OpenVINO):
    """Told the scale of the config."""

    def scale(self, folder: Path) -> Sequence[float]:
        return [float(refpeft.load_adapter(folder, self.base).config.scale)]
