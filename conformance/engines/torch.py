"""HF peft and transformers as engines: each loads a model and an adapter from their folders, by its own words."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from refpeft.ops import Array


class Transformers:
    """`model.load_adapter(folder)`, with peft's layers put in by transformers."""

    def __init__(self, model: Path, work: Path) -> None:
        logging: Any = transformers.logging
        logging.set_verbosity_error()
        self.folder, self.loaded = model, ""
        self.model: Any = None

    def base(self) -> Any:
        made: Any = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return made.eval()

    def load(self, name: str, folder: Path) -> None:
        self.model, self.loaded = self.base(), name
        self.model.load_adapter(str(folder), adapter_name=name)
        self.model.eval()

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        model = self.model if list(adapters) == [self.loaded] else self.base()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y: Array = model(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
        return y

    def close(self) -> None:
        pass


class Peft(Transformers):
    """`PeftModel.from_pretrained(model, folder)`"""

    def load(self, name: str, folder: Path) -> None:
        import peft

        self.model, self.loaded = peft.PeftModel.from_pretrained(self.base(), str(folder), adapter_name=name), name
        self.model.eval()
