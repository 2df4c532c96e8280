"""What the tests of bottleneck adapters share."""

from typing import Any

import numpy as np

import refpeft
from refpeft.model import Model

THREE = ("houlsby", "pfeiffer", "parallel")
FAMILIES = ("bert", "roberta", "gpt2", "llama", "qwen2")
IDS = np.random.default_rng(0).integers(2, 29, (2, 5))


def fresh(method: str, model: Model, seed: int = 0, **config: Any) -> refpeft.Adapter:
    return refpeft.init(method, {"reduction_factor": 4, **config}, model, seed)
