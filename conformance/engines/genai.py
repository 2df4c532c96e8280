"""onnxruntime-genai: its own builder exports model and adapter to a graph of its own, which its engine runs.

Built in float32 for a CPU. The builder loads the adapter with HF peft and writes A and B as layers of the graph.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai  # type: ignore[import-not-found, unused-ignore]

from refpeft.ops import Array

BUILDER = "onnxruntime_genai.models.builder"


class GenAI:
    def __init__(self, model: Path, work: Path) -> None:
        self.model, self.work = model, work

    def load(self, name: str, folder: Path) -> None:
        self.build(name, adapter_path=str(folder))

    def build(self, name: str, **more: str) -> None:
        options = [f"{key}={value}" for key, value in {"hf_remote": "false", **more}.items()]
        made, cache = str(self.work / f"built-{name}"), str(self.work / "cache")
        words = ["-i", str(self.model), "-o", made, "-c", cache, "-p", "fp32", "-e", "cpu", "--extra_options", *options]
        done = subprocess.run([sys.executable, "-m", BUILDER, *words], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().rpartition("\n")[2] or f"{BUILDER} ended with {done.returncode}")

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        if not adapters:
            self.build("")
        made = genai.Model(str(self.work / f"built-{''.join(adapters)}"))
        params = genai.GeneratorParams(made)
        params.set_search_options(max_length=len(ids) + 1)
        generator = genai.Generator(made, params)
        generator.append_tokens(np.array([ids], np.int32))
        return np.array(generator.get_output("logits"))[0]

    def close(self) -> None:
        pass
