"""llama.cpp, by the library that node-llama-cpp brings: LoRA of whole LLaMA and Qwen2 models, in float32.

Two ways for an adapter to get there are the setting `adapter`: `written`, with `gguf_files`, as the format can hold it;
and `converted` from HF peft's folder by llama.cpp's own `convert_lora_to_gguf.py`, which is in the same npm package.
How rows and scales are stored is said in `gguf_files`.
"""

import io
import json
import logging
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import refpeft
from refpeft.conformance.case import Case
from refpeft.conformance.engines.base import Inference
from refpeft.conformance.engines.gguf_files import ARCHITECTURES, write_adapter, write_model
from refpeft.conformance.engines.libllama import PACKAGE, Llama, library, scripts
from refpeft.ops import Array

CONVERTER = "convert_lora_to_gguf.py"


class LlamaCpp:
    def __init__(self, model: Path, work: Path, converted: bool = True) -> None:
        self.folder, self.work, self.converted = model, work, converted
        self.model = refpeft.load(model)
        self.vocab = self.model.source["vocab_size"]
        write_model(work / "model.gguf", self.model.source, self.model.params)
        self.llama = Llama(work / "model.gguf", max(256, self.model.source["max_position_embeddings"]))

    def load(self, name: str, folder: Path) -> None:
        file = self.work / f"{name}.gguf"
        if self.converted:
            convert(self.folder, folder, file)
        else:
            write_adapter(file, self.model.source, refpeft.load_adapter(folder, self.model))
        self.llama.load(name, file)

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        self.llama.activate(adapters)
        return self.llama.logits(ids, self.vocab, steps)

    def close(self) -> None:
        self.llama.close()


def convert(model: Path, adapter: Path, file: Path) -> None:
    """In this process: a start of its own takes seconds, most of them for torch."""
    script, said, errors = scripts() / CONVERTER, io.StringIO(), Errors()
    words = [str(script), "--base", str(model), "--outfile", str(file), "--outtype", "f32", str(adapter)]
    logging.getLogger().addHandler(errors)
    with patch.object(sys, "argv", words), redirect_stdout(said), redirect_stderr(said):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise ValueError(errors.said[0] if errors.said else f"{CONVERTER} ended with {end.code}") from None
        finally:
            logging.getLogger().removeHandler(errors)


class Errors(logging.Handler):
    """What is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def made(case: Case, model: Path, work: Path) -> LlamaCpp:
    return LlamaCpp(model, work, case.meta["settings"]["adapter"] == "converted")


def loaded() -> Inference:
    library()
    tag = json.loads((PACKAGE / "llama" / "llama.cpp.info.json").read_text())["tag"]
    npm = json.loads((PACKAGE / "package.json").read_text())["version"]
    return Inference(
        made, name="llamacpp", version=tag.removeprefix("v"), methods=["lora", "rslora"],
        families=list(ARCHITECTURES), features=["forward", "cache", "disable", "several", "together"],
        configs=False, settings={"adapter": ["written", "converted"]},
        versions={"node-llama-cpp": npm, "gguf": version("gguf")},
    )  # fmt: skip
