"""What the tests of methods share: adapters away from where they begin, and equality up to rounding."""

from functools import partial
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import METHODS, Adapter, Model
from refpeft.method import Phi, weight
from refpeft.part import Part

Array = np.ndarray[Any, Any]
EXACT = 1e-12


def moved(adapter: Adapter, seed: int = 1, by: float = 0.3) -> Adapter:
    """Every parameter moved, as by training."""
    rng = np.random.default_rng(seed)
    return adapter.replace(
        params={n: v + np.asarray(by * rng.normal(size=v.shape), v.dtype) for n, v in adapter.params.items()}
    )


def same(a: Any, b: Any, tolerance: float = EXACT) -> None:
    """Equal up to rounding, on the scale of the largest entry (of 1, where all are small)."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1))


def wrap_is_merge(model: Model, adapter: Adapter, ids: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run-time form, the merged model, and the method's merge inside the run: outputs, and the gradients of the
    adapter and of the base."""
    out, vjp = model(ids, adapter)
    same(refpeft.merge(model, adapter)(ids)[0], out)
    method = METHODS[adapter.method]

    def by_definition(cfg: Any, φ: Phi, part: Part, mask: Array | None = None) -> Part:
        return weight(part, φ, partial(method.merge, cfg))

    dout = np.random.default_rng(2).normal(size=out.shape)
    grads, base = vjp(dout, base=True)
    monkeypatch.setattr(method, "wrap", by_definition)
    out2, vjp2 = model(ids, adapter)
    grads2, base2 = vjp2(dout, base=True)
    same(out2, out)
    assert set(grads2) == set(grads) == set(adapter.params)
    for name, d in (grads2 | base2).items():
        same(d, (grads | base)[name])
