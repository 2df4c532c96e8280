"""The complex step: exact derivatives of a formula, from the formula itself, with no tolerance to tune.

For a function f that is holomorphic in form,   Im f(x + i h v)/h = J v   with an error of order h², and h = 1e-100
leaves none. So ⟨dy, J v⟩ = ⟨vjp(dy), v⟩ must hold to rounding (Squire & Trapp 1998). Both functions here take
*your* op or model as well as ours, and return the relative difference of the two sides: 1e-12 is loose.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.model import Model, adapter_list
from refpeft.ops import Array

H = 1e-100


def check_op(op: Callable[..., Any], *args: Any, seed: int = 0, **options: Any) -> float:
    """The largest relative difference, over the arguments with a derivative, between an op's vjp and the complex step.

    `op(*args)` returns `y, vjp`, and `vjp(dy)` one entry per argument: an array, a function that computes it, or None.
    Arguments of a floating dtype are taken in float64.

    >>> from refpeft.ops import linear
    >>> rng = np.random.default_rng(0)
    >>> check_op(linear, rng.normal(size=(2, 3)), rng.normal(size=(4, 3))) < 1e-12
    True
    """
    rng = np.random.default_rng(seed)
    args = tuple(np.asarray(a, np.float64) if is_float(a) else a for a in args)
    y, vjp = op(*args, **options)
    dy = rng.normal(size=np.shape(y))
    cotangents = vjp(dy)
    cotangents = cotangents if isinstance(cotangents, tuple | list) else (cotangents,)
    if len(cotangents) < len(args):
        raise ValueError(f"{len(args)} arguments, but vjp returned only {len(cotangents)} cotangents")
    worst = 0.0
    for k, (a, d) in enumerate(zip(args, cotangents, strict=False)):
        if d is None:
            continue
        d = np.asarray(d() if callable(d) else d)
        if d.shape != a.shape:
            raise ValueError(f"cotangent {k} has shape {list(d.shape)}, its argument {list(a.shape)}")
        v = rng.normal(size=a.shape)
        stepped = [b + 0j if is_float(b) else b for b in args]
        stepped[k] = a + 1j * (H * v)
        Jv = np.imag(op(*stepped, **options)[0]) / H
        worst = max(worst, gap(dy, Jv, d, v))
    return worst


def check_model(
    model: Model,
    ids: Array,
    adapter: Adapter | Sequence[Adapter] | None = None,
    base: bool | Sequence[str] = False,
    seed: int = 0,
    **inputs: Any,
) -> dict[str, float]:
    """The same for a whole model with adapters, along one random direction per parameter: name → relative difference.

    Several adapters' parameters are called '0:name', '1:name', …; `base` adds the model's own, or those named.
    """
    rng = np.random.default_rng(seed)
    adapters = [real(a) for a in adapter_list(adapter)]
    model = model.astype(np.float64)
    out, vjp = model(ids, adapters, **inputs)
    dout = rng.normal(size=out.shape)
    per, of_base = vjp(dout, base=base) if base else (vjp(dout), {})
    complex_model = model.astype(np.complex128)
    worst = {}
    for k, (a, grads) in enumerate(zip(adapters, per, strict=True)):
        for name, d in grads.items():
            v = rng.normal(size=d.shape)
            moved = [complex_(b, {name: v} if j == k else {}) for j, b in enumerate(adapters)]
            Jv = np.imag(complex_model(ids, moved, **inputs)[0]) / H
            worst[f"{k}:{name}" if len(adapters) > 1 else name] = gap(
                dout, Jv, d, v, size(dout, out, a.params[name], v)
            )
    for name, d in of_base.items():
        v = rng.normal(size=d.shape)
        params = {**complex_model.params, name: complex_model.params[name] + 1j * (H * v)}
        Jv = np.imag(replace(complex_model, params=params)(ids, [complex_(a, {}) for a in adapters], **inputs)[0]) / H
        worst[name] = gap(dout, Jv, d, v, size(dout, out, model.params[name], v))
    return worst


def is_float(a: Any) -> bool:
    return isinstance(a, np.ndarray | float) and np.asarray(a).dtype.kind in "fV"


def gap(dy: Array, Jv: Array, d: Array, v: Array, floor: float = 0.0) -> float:
    """|⟨dy, Jv⟩ − ⟨d, v⟩| relative to the size of the two sums' factors, and at least to `floor`.
    A cotangent that is not finite is infinitely wrong (as nan it would pass every comparison)."""
    if not (np.isfinite(d).all() and np.isfinite(Jv).all()):
        return math.inf
    scale = max(norm(dy) * norm(Jv) + norm(d) * norm(v), floor)
    return float(abs((dy * Jv).sum() - (d * v).sum()) / (scale or 1.0))


def size(dout: Array, out: Array, p: Array, v: Array) -> float:
    """What ⟨dout, J v⟩ would be if p had all the say in the output.

    A gradient that is zero in exact arithmetic (the bias of the keys in attention, which softmax cancels) is compared
    on this scale, since it has none of its own.
    """
    return float(norm(dout) * norm(out) * norm(v) / (norm(p) or 1.0))


def norm(x: Array) -> float:
    return math.sqrt((x * x).sum())


def real(a: Adapter) -> Adapter:
    up = {name: v.astype(np.float64) for name, v in a.params.items()}
    frozen = {name: v.astype(np.float64) if is_float(v) else v for name, v in a.frozen.items()}
    return replace(a, params=up, frozen=frozen)


def complex_(a: Adapter, step: dict[str, Array]) -> Adapter:
    params = {name: v + 1j * (H * step[name]) if name in step else v + 0j for name, v in a.params.items()}
    return replace(a, params=params)
