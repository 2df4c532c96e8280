"""Our export as an engine: the graph with the adapter merged into it, run by onnxruntime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import refpeft
from refpeft.export import export
from refpeft.export.runtime import session
from refpeft.ops import Array


class OnnxRuntime:
    def __init__(self, model: Path, work: Path) -> None:
        self.model, self.work = refpeft.load(model), work
        self.graphs = {"": self.graph("", [])}

    def graph(self, name: str, adapters: Sequence[refpeft.Adapter]) -> Any:
        folder = self.work / f"graph-{name}"
        export(self.model, adapters, folder, verify=False)
        return session(folder / "model.onnx", "cpu")

    def load(self, name: str, folder: Path) -> None:
        self.graphs[name] = self.graph(name, [refpeft.load_adapter(folder, self.model)])

    def logits(self, ids: Array, adapters: Sequence[str], steps: int = 1) -> Array:
        graph = self.graphs["".join(adapters)]
        given = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
        (y,) = graph.run(None, {x.name: given[x.name] for x in graph.get_inputs()})
        return np.asarray(y)[0]

    def close(self) -> None:
        pass
