"""What mutants get wrong about bottleneck adapters: functions of `refpeft.bottleneck` with one mistake each.

name: (the property expected to find it, replacements, methods)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

import refpeft.adapter
from refpeft import bottleneck
from refpeft.activations import identity
from refpeft.bottleneck import Config, Place
from refpeft.hooks import Block
from refpeft.method import Phi, together
from refpeft.ops import Array, Vjp, layer_norm
from refpeft.part import Back, Once, Part, Run, op_run

Patches = Callable[[], Sequence[Any]]
ALL = ("houlsby", "pfeiffer", "parallel")


def instead(name: str, change: Callable[..., Any]) -> Patches:
    """f′(…) = change(f, …), f being a function of `refpeft.bottleneck`."""

    def patches() -> Sequence[Any]:
        f = getattr(bottleneck, name)
        return [patch.object(bottleneck, name, lambda *a: change(f, *a))]

    return patches


def configured(**fields: Any) -> Patches:
    """Adapters run as if their config had these fields; a function is of what the config has."""

    def change(adapted: Any, cfg: Config, φ: Phi, b: Block, mask: Array | None = None) -> Block:
        new = {n: v(getattr(cfg, n)) if callable(v) else v for n, v in fields.items()}
        block: Block = adapted(replace(cfg, **new), φ, b, mask)
        return block

    return instead("adapted", change)


def without(symbol: str) -> Patches:
    """One parameter is as if it were 0."""

    def change(f: Any, cfg: Config, φ: Phi, mask: Array | None = None) -> Run:
        return f(cfg, Phi({**φ.values, symbol: φ[symbol] * 0}, φ.keys), mask)  # type: ignore[no-any-return]

    return instead("bottleneck", change)


def residual_lost(seam: Any, cfg: Config, φ: Phi, u: Array, r: Array) -> Any:
    """v = F(z), without r."""
    return seam(cfg, φ, u, r * 0)


def residual_of_input(sequential: Any, cfg: Config, φ: Phi, sub: Run, norm: Run | None, F: Run) -> Run:
    """v = F(z) + r + x: the sublayer's input is added here already, and once more after."""
    run: Run = sequential(cfg, φ, sub, norm, F)
    return together(run, op_run(identity))


def norm_of_sum(sequential: Any, cfg: Config, φ: Phi, sub: Run, norm: Run | None, F: Run) -> Run:
    """z = h: what F reads is not normed, though its residual is as it should be."""
    run: Run = sequential(replace(cfg, original_ln_before=cfg.residual_before_ln is not True), φ, sub, norm, F)
    return run


def only(kind: str) -> Patches:
    """Adapters at one kind of sublayer are forgotten."""

    def change(places: Any, cfg: Config, model: Any) -> list[Place]:
        return [p for p in places(cfg, model) if p.kind == kind]

    return instead("places", change)


def left_out(other: Callable[[int, int], int]) -> Patches:
    """Where n is left out of layers up to `last`, other(n, last) is; what is missing there then is another layer's."""

    def places(f: Any, cfg: Config, model: Any) -> list[Place]:
        last = max(p.layer for p in bottleneck.sublayers(model))
        found: list[Place] = f(replace(cfg, leave_out=[other(n, last) for n in cfg.leave_out]), model)
        return found

    def parameters(f: Any, adapter: Any, k: int, place: Place, model: Any) -> Phi:
        same = [p for p in bottleneck.sublayers(model) if p.kind == place.kind]
        there = [p for p in same if bottleneck.name(p, "D") in adapter.params]
        φ: Phi = f(adapter, k, place if place in there else there[0], model)
        return φ

    return lambda: [*instead("places", places)(), *instead("parameters", parameters)()]


def per_token(over_sequence: Any, x: Array) -> tuple[Array, Vjp]:
    """The gate of a token is its own score."""
    return x, lambda dy: (lambda: np.broadcast_to(dy, x.shape),)


def over_batch(over_sequence: Any, x: Array) -> tuple[Array, Vjp]:
    """One gate for the whole batch, of its mean."""
    y, vjp = over_sequence(x)
    return np.zeros_like(y) + y.sum(0, keepdims=True) / len(y), vjp


def norms_ignored() -> Sequence[Any]:
    """Norms are saved with the adapter, but not used."""
    replaced = refpeft.adapter.replaced

    def change(adapters: Any, part: Part) -> Part:
        return part if part.kind.endswith("norm") else replaced(adapters, part)

    return [patch.object(refpeft.adapter, "replaced", change)]


def branch_without_input(bottleneck: Any, cfg: Config, φ: Phi, mask: Array | None = None) -> Run:
    """dx of what is beside F alone."""
    F = bottleneck(cfg, φ, mask)

    def run(z: Array) -> tuple[Array, Back]:
        y, back = F(z)
        return y, lambda dy, want: (Once(lambda: np.zeros_like(z)), back(dy, want)[1])

    return run


def scale_of_last_token(scale: Any, x: Array, s: Array) -> tuple[Array, Vjp]:
    """ds of the last position only."""
    y, vjp = scale(x, s)

    def change(dy: Array) -> Any:
        masked = dy.copy()
        masked[:, :-1] = 0
        dx, _ = vjp(dy)
        return dx, vjp(masked)[1]

    return y, change


def epsilon_of_bert(normed: Any, φ: Phi) -> Run:
    """LN₂ with another ε, that of BERT."""
    run: Run = bottleneck.parametrised(lambda *a: layer_norm(*a, eps=1e-12), φ, "γ2", "β2")
    return run


def scaled_residual(seam: Any, cfg: Config, φ: Phi, u: Array, r: Array) -> Any:
    """The scale is of F and the residual together."""
    return seam(cfg, φ, u, r * (φ["s"] if isinstance(cfg.scaling, str) else cfg.scaling))


def swapped(name: str) -> str:
    return {"gelu_new": "gelu", "silu": "gelu", "relu": "leaky_relu", "tanh": "sigmoid"}.get(name, name)


def flipped(value: Any) -> bool:
    return not value


SEQUENTIAL = ("houlsby", "pfeiffer")
RUN, GRADS, OPTIONS, LEFT = "logits", "param-grads", "options", "left-out"
BOTTLENECK: Mapping[str, tuple[str, Patches, Sequence[str]]] = {
    "houlsby-reads-after-the-norm": (RUN, configured(original_ln_before=True), ("houlsby",)),
    "houlsby-residual-lost": (RUN, instead("seam", residual_lost), ("houlsby",)),
    "houlsby-mlp-only": (RUN, only("mlp"), ("houlsby",)),
    "houlsby-norms-not-trained": (RUN, norms_ignored, ("houlsby",)),
    "houlsby-input-added-twice": (RUN, instead("sequential", residual_of_input), ("houlsby",)),
    "pfeiffer-reads-before-the-norm": (RUN, instead("sequential", norm_of_sum), ("pfeiffer",)),
    "pfeiffer-residual-after-the-norm": (
        RUN, configured(residual_before_ln=lambda r: r if r == "post_add" else not r), ("pfeiffer",)
    ),
    "pfeiffer-no-norm-after": (RUN, configured(original_ln_after=False), ("pfeiffer",)),
    "pfeiffer-scales-the-residual": (OPTIONS, instead("seam", scaled_residual), ("pfeiffer",)),
    "parallel-reads-the-output": (RUN, configured(is_parallel=False), ("parallel",)),
    "parallel-reads-the-normed-input": (RUN, configured(normed_input=True), ("parallel",)),
    "parallel-scale-forgotten": (
        OPTIONS, configured(scaling=lambda s: s if isinstance(s, str) else 1.0), ("parallel",)
    ),
    "parallel-learned-scale-of-one-token": (OPTIONS, instead("scale", scale_of_last_token), ("parallel",)),
    "bottleneck-activation-swapped": (RUN, configured(non_linearity=swapped), ALL),
    "bottleneck-gate-per-token": (OPTIONS, instead("over_sequence", per_token), ALL),
    "bottleneck-gate-over-the-batch": (OPTIONS, instead("over_sequence", over_batch), ALL),
    "bottleneck-up-without-bias": (RUN, without("b_U"), ALL),
    "bottleneck-down-without-bias": (RUN, without("b_D"), ALL),
    "bottleneck-norm-after-with-another-epsilon": (OPTIONS, instead("normed", epsilon_of_bert), ALL),
    "bottleneck-norm-on-the-other-side": (
        OPTIONS, configured(adapter_residual_before_ln=flipped), SEQUENTIAL
    ),
    "bottleneck-input-grad-misses-branch": (GRADS, instead("bottleneck", branch_without_input), ("houlsby",)),
    "bottleneck-left-out-counted-from-one": (LEFT, left_out(lambda n, last: n - 1), ALL),
    "bottleneck-left-out-from-the-top": (LEFT, left_out(lambda n, last: last - n), ALL),
}  # fmt: skip
