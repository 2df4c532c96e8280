"""Encoder-decoders that write, and adapters for them: tiny, as transformers and optimum take them too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import refpeft
from refpeft.adapter import Adapter
from refpeft.export.generation import Options, open_writer, write
from refpeft.model import Model
from tests.export.adapters import SMALL, moved
from tests.models import ENCODER_DECODERS, tiny

Rows = list[list[int]]
NAMES = {"T5": 3, "T5 v1.1": 5, "BART": 11}  # and seeds with which they write more than one word
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]


def base(name: str, **config: Any) -> Model:
    """T5's decoder here has as many layers as its encoder: transformers 5.24 cannot write with one that has more."""
    family, architecture, own = ENCODER_DECODERS[name]
    depth = {"num_decoder_layers": 2} if family == "t5" else {"decoder_start_token_id": 2}
    full = {"is_encoder_decoder": True, **depth, **own, **config}
    return tiny(family, architecture, dtype=np.float32, **{"seed": NAMES[name], **full})


def made(method: str, name: str, **config: Any) -> tuple[Model, Adapter]:
    model = base(name)
    return model, moved(refpeft.init(method, {**SMALL.get(method, {}), **config}, model, seed=1))


def written(folder: Path, prompts: Rows, adapter: Any = None, bare: bool = False, **options: Any) -> Rows:
    ids = options.pop("adapter_ids", None)
    writer = open_writer(folder, adapter, bare, adapter_ids=ids)
    steps = write(writer, prompts, Options(**{"max_new_tokens": 8, **options}))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


def specified(model: Model, adapters: Sequence[Adapter | None], prompts: Rows, new: int = 8) -> Rows:
    """Each row by itself, with its adapter, without a cache: the likeliest token behind all that is there."""
    found = []
    for prompt, adapter in zip(prompts, adapters, strict=True):
        ids = [model.config.decoder_start_token_id]
        for _ in range(new):
            out, _ = model(np.array([prompt]), adapter, decoder_input_ids=np.array([ids]))
            ids.append(int(out[0, -1].argmax()))
        found.append(ids[1:])
    return found
