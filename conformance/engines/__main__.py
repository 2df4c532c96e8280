"""`python -m refpeft.conformance.engines NAME FOLDER`: an engine answers about the folders in FOLDER.

`FOLDER/model` is the model, the other folders are adapters, and the prompt is `FOLDER/ids.npy`. Into
FOLDER/answers/NAME go the logits of each adapter, `ADAPTER.npy`, or why there are none, `ADAPTER.txt`. What
was answered already stays.
"""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.cli.errors import sentence
from refpeft.conformance.engines import ENGINES

LONGEST = 300  # of what is kept of an error


def answer(name: str, folder: Path) -> None:
    out = folder / "answers" / name
    out.mkdir(parents=True, exist_ok=True)
    adapters = [f for f in sorted(folder.iterdir()) if (f / "adapter_config.json").is_file()]
    waiting = [f for f in adapters if not any((out / (f.name + kind)).exists() for kind in (".npy", ".txt"))]
    with tempfile.TemporaryDirectory() as work:
        engine = made(name, folder / "model", Path(work))
        for adapter in waiting:
            (out / f"{adapter.name}.txt").write_text("the engine ended without a word", encoding="utf-8")
            try:
                engine.load(adapter.name, adapter)
                np.save(out / f"{adapter.name}.npy", engine.logits(np.load(folder / "ids.npy"), [adapter.name]))
                (out / f"{adapter.name}.txt").unlink()
            except Exception as error:  # whatever an engine raises is its answer
                (out / f"{adapter.name}.txt").write_text(words(error), encoding="utf-8")


def made(name: str, model: Path, work: Path) -> Any:
    module, _, factory = ENGINES[name].factory.partition(":")
    return getattr(importlib.import_module(module), factory)(model, work)


def words(error: Exception) -> str:
    """In one line."""
    text = sentence(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    text = text.partition("\n")[0].partition(" 0: <")[0]  # what follows is where it happened
    return " ".join(text.split())[:LONGEST]


if __name__ == "__main__":
    answer(sys.argv[1], Path(sys.argv[2]))
