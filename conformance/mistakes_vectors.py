"""What the mutants of (IA)³ and VeRA get wrong."""

from collections.abc import Callable
from typing import Any

from refpeft.conformance.mistakes import square
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Whole
from refpeft.method import Merged, Phi
from refpeft.ops import Array
from refpeft.part import Part

Merge = Callable[..., Merged]
Wrap = Callable[..., Part]


def bias_left(merge: Merge, cfg: Any, W: Array, b: Array | None, φ: Any) -> Merged:
    """A layer's bias is merged as it was."""
    W1, _, vjp = merge(cfg, W, b, φ)
    return W1, b, vjp


def other_axis(merge: Merge, cfg: Any, W: Array, b: Array | None, φ: Any) -> Merged:
    """Of a square W, columns are scaled for rows."""
    W1, b1, vjp = merge(cfg, W, b, φ)
    return φ["l"].T * W if square(W) else W1, b1, vjp


def from_one(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """What is stored is taken for what l differs from 1."""
    return wrap(cfg, Phi({"l": 1 + φ["l"]}, φ.keys), part)


def bias_unscaled(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """y = l ⊙ (x Wᵀ) + b"""
    wrapped = wrap(cfg, φ, part)
    if part.b is None or cfg.takes:
        return wrapped

    def run(x: Array) -> Any:
        y, back = wrapped.run(x)
        return y + (1 - φ["l"][:, 0]) * part.b, back

    return wrapped.wrapped(run)


def input_gradient_unscaled(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """dx of the layer alone, where what it takes is scaled."""
    wrapped = wrap(cfg, φ, part)

    def run(x: Array) -> Any:
        (y, back), (_, base) = wrapped.run(x), part.run(x)
        return y, lambda dy, want: (base(dy, ())[0] if cfg.takes else back(dy, want)[0], back(dy, want)[1])

    return wrapped.wrapped(run)


# ── VeRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def other_corners(φ: Any, o: int, i: int) -> tuple[Array, Array]:
    """The last columns of A∗ and the last rows of B∗."""
    A, B = φ["A"], φ["B"]
    return A[:, A.shape[1] - i :], B[B.shape[0] - o :]


def merged_without_d(merge: Merge, cfg: Any, W: Array, b: Array | None, φ: Any) -> Merged:
    """W′ = W + diag(λb) B A"""
    return merge(cfg, W, b, {**φ, "λd": φ["λd"] * 0 + 1})


def averaged_over_the_rank(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """A scale of 1/r, as LoRA has."""
    return wrap(cfg, Phi({**φ.values, "λb": φ["λb"] / cfg.r}, φ.keys), part) if cfg.r > 1 else part


class DForgetsB(Whole):
    """dλd without λb."""

    def grads(self) -> Arrays:
        ones = [a.replace(params={n: v * 0 + 1 if n.endswith("_b") else v for n, v in a.params.items()})
                for a in self.active]  # fmt: skip
        right, self.active = super().grads(), ones
        return {n: d if n.endswith("_b") else super(DForgetsB, self).grads()[n] for n, d in right.items()}
