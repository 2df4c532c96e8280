"""What an engine is: something that runs a whole model from HF's folder, with adapters from HF peft's folders."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import refpeft
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays, Info, Skip
from refpeft.conformance.targets.spec import adapter_of, answers, mask_of, model_of
from refpeft.ops import Array


class Engine(Protocol):
    """Made from a model folder and a folder to work in. What it cannot do it raises, in a sentence."""

    def load(self, name: str, folder: Path) -> None:
        """An adapter, under a name."""

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        """[s] → [s, v] with these adapters, in several steps if asked; nan for what the engine does not say."""

    def close(self) -> None: ...


class Inference:
    """The target of an engine: models and lives of them, without gradients and without merged weights."""

    def __init__(self, make: Any, **declared: Any) -> None:
        """make(case, model folder, work folder) → Engine"""
        self.make, self.declared = make, {"levels": ["model", "lifecycle"], "dtypes": ["float32"], **declared}

    def info(self) -> Info:
        return self.declared

    def run(self, case: Case) -> Arrays:
        if not case.meta["model"]["architectures"][0].endswith("ForCausalLM"):
            raise Skip("a language model only")
        with tempfile.TemporaryDirectory() as folder:
            session = Session(case, Path(folder), self.make)
            try:
                return session.run(case.meta["steps"]) if "steps" in case.meta else session.whole()
            finally:
                session.engine.close()

    def close(self) -> None:
        pass


class Session:
    def __init__(self, case: Case, folder: Path, make: Any) -> None:
        self.case, self.folder, self.model = case, folder, model_of(case)
        refpeft.save(self.model, folder / "model")
        (folder / "work").mkdir()
        self.engine: Engine = make(case, folder / "model", folder / "work")
        self.active: list[str] = []
        self.enabled = True

    # a model

    def whole(self) -> Arrays:
        for name in self.case.meta["active"]:
            self.add(name)
        self.active = list(self.case.meta["active"])
        return answers(self, self.case.meta["want"])

    def said(self, ids: Array, steps: int = 1) -> Array:
        """Each row by itself, without the padding behind it, whose places are zero."""
        mask, active = mask_of(self.case), self.active if self.enabled else []
        rows = []
        for n, row in enumerate(ids):
            length = len(row) if mask is None else int(mask[n].sum())
            y = self.engine.logits(row[:length], active, min(steps, length))
            rows.append(np.pad(y, ((0, len(row) - length), (0, 0))))
        return np.stack(rows).astype(np.float32)

    def logits(self) -> Arrays:
        return {"logits": self.said(self.case.arrays["ids"])}

    def other_logits(self) -> Arrays:
        return {"other_logits": self.said(self.case.arrays["other_ids"])}

    def decoded(self) -> Arrays:
        ids = self.case.arrays["ids"]
        return {"decoded": self.said(ids, ids.shape[1])}

    # a life

    def run(self, steps: Sequence[Any]) -> Arrays:
        found: Arrays = {}
        for k, step in enumerate(steps):
            getattr(self, step["do"])(**{n: v for n, v in step.items() if n != "do"})
            found[f"{k}/logits"] = self.said(self.case.arrays["ids"])
        return found

    def add(self, adapter: str) -> None:
        refpeft.save_adapter(adapter_of(self.case, adapter, self.model), self.folder / adapter)
        self.engine.load(adapter, self.folder / adapter)
        self.active = self.active or [adapter]

    def activate(self, adapters: Sequence[str]) -> None:
        self.active = list(adapters)

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True
