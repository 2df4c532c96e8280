"""Our own ONNX export, run by onnxruntime: the graph is ours, so this checks the exporter and onnxruntime's kernels."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Whole, answers
from refpeft.conformance.traits import known
from refpeft.export import export
from refpeft.export.runtime import require, session


class OnnxRuntime:
    def __init__(self) -> None:
        self.version = str(require().__version__)

    def info(self) -> Mapping[str, Any]:
        return {
            "name": "onnxruntime", "version": self.version, "levels": ["export"], "methods": known(),
            "dtypes": ["float32"], "features": ["forward", "merge", "conv1d", "embedding", "together", "tied"],
        }  # fmt: skip

    def run(self, case: Case) -> Arrays:
        return answers(Exported(case), case.meta["want"])

    def close(self) -> None:
        pass


class Exported(Whole):
    """The same questions as to a model of the specification, with the merged one replaced by its exported graph."""

    def merged_logits(self) -> Arrays:
        ids = self.case.arrays["ids"]
        with tempfile.TemporaryDirectory() as folder:
            export(self.base, self.active, Path(folder) / "out", verify=False)
            graph = session(Path(folder) / "out" / "model.onnx", "cpu")
            given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            given |= self.inputs  # which are a decoder's too
            (y,) = graph.run(None, {x.name: given[x.name] for x in graph.get_inputs()})
        return {"merged_logits": self.real(np.asarray(y))}
