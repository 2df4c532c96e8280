"""What the tests of bottleneck adapters share."""

from typing import Any

import numpy as np

import refpeft
from refpeft.model import Model

Array = np.ndarray[Any, Any]
EXACT = 1e-12
THREE = ("houlsby", "pfeiffer", "parallel")
FAMILIES = ("bert", "roberta", "gpt2", "llama", "qwen2")
IDS = np.random.default_rng(0).integers(2, 29, (2, 5))


def fresh(method: str, model: Model, seed: int = 0, **config: Any) -> refpeft.Adapter:
    return refpeft.init(method, {"reduction_factor": 4, **config}, model, seed)


def moved(adapter: refpeft.Adapter, seed: int = 1) -> refpeft.Adapter:
    """Away from where it begins."""
    r = np.random.default_rng(seed)
    return adapter.replace(
        params={n: (p + 0.3 * r.normal(size=p.shape)).astype(p.dtype) for n, p in adapter.params.items()}
    )


def same(a: Array, b: Array, tolerance: float = EXACT) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1))
