"""What methods share that add a ΔW of their own form to a matrix: two forms, from ΔW and the way back from it.

    W′ = W + ΔW,   b′ = b          y = y₀ + x ΔWᵀ          with G = ∂L/∂W′ = Σ dyᵀ x:   dW = G,   d(ΔW) = G

A method says what ΔW is: `delta(φ) → ΔW, back`, and `back(G)` are the gradients of its parameters by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from refpeft.method import Merged, Phi, Targets, Values, as_dtype, at, branch
from refpeft.ops import Array, is_half
from refpeft.part import Back, Grads, Lazy, Part, Want, link

Named = dict[str, Lazy]
BackΔ = Callable[[Lazy], Named]
Delta = Callable[[Values | Phi], tuple[Array, BackΔ]]
INITS = (True, False)


@dataclass(frozen=True)
class Config(Targets):
    """The fields that HF peft's configs of such methods share. `at(path)` is the same with the patterns applied."""

    r: int = 8
    alpha: float = 8
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, r in ranks.items():
            if not (isinstance(r, int) and not isinstance(r, bool) and r > 0):
                raise ValueError(f"{name} must be a positive integer, found {r!r}")
        if self.init_weights not in self.inits():
            raise ValueError(f"init_weights must be one of {self.inits()}, found {self.init_weights!r}")

    def inits(self) -> tuple[bool | str, ...]:
        return INITS

    def at(self, path: str) -> Self:
        r, α = at(self.rank_pattern, path, self.r), at(self.alpha_pattern, path, self.alpha)
        return replace(self, r=r, alpha=α, rank_pattern={}, alpha_pattern={})


def typed(φ: Mapping[str, Array], part: Part) -> dict[str, Array]:
    """In the dtype of the layer; float32 for a layer of 16 bits."""
    dtype: Any = np.float32 if is_half(part.W.dtype) else part.W.dtype
    return {name: np.ascontiguousarray(v, dtype=dtype) for name, v in φ.items()}


def merged(W: Array, b: Array | None, φ: Values, delta: Delta) -> Merged:
    """W′ = W + ΔW,   b′ = b"""
    Δ, back = delta(φ)

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, Named]:
        return dW1, back(dW1)

    return as_dtype(W + Δ, W), b, vjp


def beside(part: Part, φ: Phi, delta: Delta) -> Part:
    """y = y₀ + x ΔWᵀ"""

    def run(x: Array) -> tuple[Array, Back]:
        Δ, back_Δ = delta(φ)
        z, vjp = part.matmul(x, Δ)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, dΔ = link(vjp, dz, 2)
            return dx, φ.grads(want, back_Δ(dΔ))

        return z, back

    return branch(part, run)
