"""Is tinylora right? One test for each statement of the specification that `info` says it can be asked about."""

from typing import Any

import numpy as np
from tinylora import LoRALinear

from refpeft.conformance import suite


class TinyLoRA:
    """tinylora, in refpeft's words: A [r, i], B [o, r], W [o, i], and the scale from α and r."""

    def info(self) -> dict[str, Any]:
        return {
            "name": "tinylora",
            "version": "0.1",
            "levels": ["layer"],
            "methods": ["lora", "rslora"],
            "dtypes": ["float32", "float64"],
            "features": ["forward", "grads", "merge"],
        }

    def run(self, case: Any) -> dict[str, Any]:
        c, a, want = case.meta["config"], case.arrays, case.meta["want"]
        if unknown := sorted(set(c) - {"r", "lora_alpha", "use_rslora"}):
            raise ValueError(f"no idea what {unknown[0]} is")
        scale = c["lora_alpha"] / (c["r"] ** 0.5 if c.get("use_rslora") else c["r"])
        layer = LoRALinear(a["W"].T, a["A"].T, a["B"].T, scale, a.get("b"))
        answers: dict[str, Any] = {}
        if "output" in want:
            answers["y"] = layer(a["x"])
        if "first_row" in want:
            answers["y_row"] = layer(a["x"][:1])
        if "merged" in want:
            W = layer.merged()
            answers |= {"W_merged": W.T, "y_merged": a["x"] @ W + a.get("b", 0)}
            answers |= {"b_merged": a["b"]} if "b" in a else {}
        if "grads" in want:
            d = layer.gradients(a["x"], a["dy"])
            answers |= {"dx": d["x"], "dA": d["A"].T, "dB": d["B"].T}
        return {name: np.asarray(value) for name, value in answers.items()}


TestTinyLoRA = suite(TinyLoRA())
