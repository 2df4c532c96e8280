"""Exported folders that the clients are given, and what they have to answer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import refpeft
from refpeft.export.generation import Options, open_writer, write
from refpeft.export.program import export
from tests.export.adapters import made, moved
from tests.export.test_generate_cli import words
from tests.models import tiny

Rows = list[list[int]]
NEW = 8
ENDS = [7, 14, 22]  # tokens that end a text: these models write one of them soon, late or never
WRITERS: Mapping[str, tuple[str, str, str, dict[str, Any]]] = {  # case → form, family, method, options
    "gpt2": ("merged", "gpt2", "lora", {}),
    "llama": ("merged", "llama", "lora", {}),
    "qwen2": ("merged", "qwen2", "lora", {}),
    "external": ("merged", "gpt2", "lora", {"external": True}),
    "last": ("merged", "llama", "lora", {"last_logits": True}),
    "float16": ("merged", "llama", "lora", {"dtype": "float16"}),
    "fast": ("unmerged", "llama", "lora", {"graph": "fast"}),
    "int4": ("merged", "gpt2", "lora", {"dtype": "int4"}),
    "unmerged": ("unmerged", "qwen2", "dora", {}),
    "inputs": ("inputs", "gpt2", "rslora", {}),
    "prompt": ("prompt", "llama", "prompt_tuning", {}),
    "prefix": ("prefix", "llama", "prefix_tuning", {}),
    "multi": ("multi", "llama", "lora", {}),
    "training": ("training", "gpt2", "lora", {}),
}
READERS: Mapping[str, tuple[str, str, str]] = {  # case → form, family, architecture
    "bert": ("merged", "bert", "Model"),
    "bert-fills-in": ("merged", "bert", "ForMaskedLM"),
    "bert-tags": ("merged", "bert", "ForTokenClassification"),
    "bert-classifies": ("merged", "bert", "ForSequenceClassification"),
    "roberta-classifies": ("merged", "roberta", "ForSequenceClassification"),
    "gpt2-classifies": ("merged", "gpt2", "ForSequenceClassification"),
    "llama-classifies": ("merged", "llama", "ForSequenceClassification"),
    "unmerged": ("unmerged", "bert", "ForSequenceClassification"),
    "inputs": ("inputs", "bert", "ForSequenceClassification"),
}
IDS, MASK = [[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]], [[1] * 5, [1, 1, 0, 0, 0]]  # of a reader
ADAPTER_IDS = [1, 0]


def make(root: Path) -> None:
    (root / "writers").mkdir()
    (root / "readers").mkdir()
    for case, (form, family, method, options) in WRITERS.items():
        model, adapter = made(method, family)
        adapters = [adapter, moved(adapter, 7)] if form == "multi" else adapter
        source = checkpoint(root / f"{case} base", model)
        how = {"decode": form != "training", **options}
        export(model, adapters, root / "writers" / case, form, verify=False, source=source, **how)
    for case, (form, family, architecture) in READERS.items():
        export(*reader(family, architecture), root / "readers" / case, form, verify=False)


def checkpoint(at: Path, model: Any) -> Path:
    """With a tokenizer."""
    refpeft.save(model, at)
    words().save(str(at / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "a"}
    (at / "tokenizer_config.json").write_text(json.dumps(about))
    (at / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS, "pad_token_id": 0}))
    return at


def reader(family: str, architecture: str) -> Any:
    model = tiny(family, architecture, dtype=np.float32)
    return model, moved(refpeft.init("lora", {"r": 2}, model, seed=1))


def generated(root: Path, case: str, prompts: Rows, bare: bool = False) -> Rows:
    """As `refpeft generate` does."""
    ids = ADAPTER_IDS if WRITERS[case][0] == "multi" else None
    steps = write(open_writer(root / "writers" / case, None, bare, "cpu", ids), prompts, Options(max_new_tokens=NEW))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


def specified(case: str, bare: bool) -> Any:
    """In float64."""
    _, family, architecture = READERS[case]
    model, adapter = reader(family, architecture)
    out, _ = model.astype("float64")(np.array(IDS), None if bare else adapter, attention_mask=np.array(MASK))
    return out
