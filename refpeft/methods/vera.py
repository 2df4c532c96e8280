"""VeRA: Vector-based Random matrix Adaptation.      Kopiczko et al. 2023, arXiv 2310.11454, §3.1, eq. (2)

    W′ = W + diag(λb) B diag(λd) A,   b′ = b             A [r, i], B [o, r] random, never trained; λd [r], λb [o]
    y  = y₀ + λb ⊙ ((λd ⊙ x̃ Aᵀ) Bᵀ)                      y₀ = x Wᵀ + b;   x̃ = x ⊙ mask: dropout, on this branch only

All layers share one A and one B, as large as the largest of them needs, of which each takes the corner: A = A∗[:, :i],
B = B∗[:o]. Init: λb = 0, λd = `d_initial`. There is no scale.

With G = ∂L/∂W′ and M = B diag(λd) A:   dλb = Σᵢ G ⊙ M,   dλd = Σᵢ A ⊙ (Bᵀ diag(λb) G),   dW = G.
In the run-time form, with u = x̃ Aᵀ and h = (λd ⊙ u) Bᵀ:   dλb = Σ dy ⊙ h,   dv = (λb ⊙ dy) B,   dλd = Σ dv ⊙ u.

Claims:
    VE1  λb = 0 at init, hence W′ = W exactly; and dλd = 0 there, λd begins to move only after λb.
    VE2  wrap ≡ merge: both forms give the same outputs and gradients (without dropout).
    VE3  Several adapters add up, in any order, each with an A∗ and B∗ of its own.
    VE4  It is a LoRA with s = 1 whose factors are diag(λd) A and diag(λb) B.
    VE5  A∗ and B∗ are functions of `projection_prng_key` and of their shapes: what HF peft draws on a CPU, to the bit.

A∗ and B∗ are Kaiming-uniform, U(−√(6/n), √(6/n)) with n the columns of each, and are drawn in this order from one
stream (`refpeft.mersenne`). With `save_projection` they are saved with the adapter, and what is saved counts; without,
they are drawn again.

Where implementations differ:
    * The paper draws them so, and says that λb = 0 and λd is a constant, 0.1; HF peft follows, and so does this.
    * AdapterHub's vera trains full matrices in the place of diag(λd) [r, r] and diag(λb) [o, o], scales by α/r, and
      takes the shapes of A and B from the first layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft import mersenne
from refpeft.hollow import hollow
from refpeft.method import Base, Merged, Phi, Targets, Values, as_dtype, branch, masked
from refpeft.ops import Array, is_half, linear, rows
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, link

if TYPE_CHECKING:
    from refpeft.model import Model

SHARED = {"A": "vera_A", "B": "vera_B"}
KEYS: Mapping[str, tuple[str | None, str | None]] = {
    "λb": ("vera_lambda_b", None),
    "λd": ("vera_lambda_d", None),
}
FROZEN = ("A", "B")


@dataclass(frozen=True)
class Config(Targets):
    """HF peft's VeraConfig."""

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.r, int) and not isinstance(self.r, bool) and self.r > 0):
            raise ValueError(f"r must be a positive integer, found {self.r!r}")
        if not 0 <= self.projection_prng_key < mersenne.SEEDS:
            raise ValueError(f"projection_prng_key must be from 0 to 2³² − 1, found {self.projection_prng_key!r}")
        if self.bias not in ("none", "all", "vera_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'vera_only', found {self.bias!r}")
        if not 0 <= self.vera_dropout < 1:
            raise ValueError(f"vera_dropout must be in [0, 1), found {self.vera_dropout!r}")

    def at(self, path: str) -> "Config":
        return self


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """λb [o], λd [r]."""
    if part.kind == "embedding":
        raise ValueError(f"{part.path}: VeRA is defined for linear layers, not for embeddings")
    return {"λb": part.W.shape[:1], "λd": (cfg.r,)}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """λb = 0, λd = d_initial; with init_weights=False ones, and N(0, 1)."""
    shape = shapes(cfg, part)
    λd = np.full(shape["λd"], cfg.d_initial) if cfg.init_weights else rng.normal(size=shape["λd"])
    λb = np.zeros(shape["λb"]) if cfg.init_weights else np.ones(shape["λb"])
    return {"λb": λb.astype(wide([part])), "λd": λd.astype(wide([part]))}


def init_model(
    cfg: Config, model: "Model", chosen: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """λb and λd of every layer; A∗ and B∗."""
    parts = [model.part(role) for role in chosen]
    own = {p.path: init(cfg, p, rng) for p in parts}
    return {f"{path}.{KEYS[n][0]}": v for path, φ in own.items() for n, v in φ.items()}, projection(cfg, parts)


def outline_model(cfg: Config, model: "Model", chosen: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """λb [o] and λd [r] of every layer; A∗ [r, max i], B∗ [max o, r]."""
    parts = [model.part(role) for role in chosen]
    own = {p.path: (shapes(cfg, p), wide([p])) for p in parts}
    params = {f"{path}.{KEYS[n][0]}": hollow(s, dtype) for path, (φ, dtype) in own.items() for n, s in φ.items()}
    return params, {SHARED[n]: hollow(s, wide(parts)) for n, s in sizes(cfg, parts).items()}


def sizes(cfg: Config, parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """A∗ [r, max i], B∗ [max o, r]."""
    o, i = (max(part.W.shape[k] for part in parts) for k in (0, 1))
    return {"A": (cfg.r, i), "B": (o, cfg.r)}


def projection(cfg: Config, parts: Sequence[Part]) -> dict[str, Array]:
    """A∗ and B∗ from the key:   U(−√(6/n), √(6/n))"""
    words = mersenne.stream(cfg.projection_prng_key)
    drawn = {n: mersenne.uniform(words, math.sqrt(3) * math.sqrt(2) / math.sqrt(s[1]), s)
             for n, s in sizes(cfg, parts).items()}  # fmt: skip
    return {SHARED[n]: v.astype(wide(parts)) for n, v in drawn.items()}


def wide(parts: Sequence[Part]) -> np.dtype[Any]:
    """The dtype of the layers, float32 for 16 bits."""
    return np.result_type(np.float32, *{p.W.dtype for p in parts if not is_half(p.W.dtype)})


def corners(φ: Values | Phi, o: int, i: int) -> tuple[Array, Array]:
    """A = A∗[:, :i],   B = B∗[:o]"""
    return φ["A"][:, :i], φ["B"][:o]


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + diag(λb) M,   M = B diag(λd) A,   b′ = b."""
    A, B = corners(φ, *W.shape)
    λb, λd = φ["λb"], φ["λd"]
    M = (B * λd) @ A

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        return dW1, {
            "λb": Once(lambda: (dW1() * M).sum(1)),
            "λd": Once(lambda: (A * (B.T @ (λb[:, None] * dW1()))).sum(1)),
        }

    return as_dtype(W + λb[:, None] * M, W), b, vjp


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + λb ⊙ ((λd ⊙ x̃ Aᵀ) Bᵀ)"""
    return branch(part, masked(low_rank(φ, part), mask))


def low_rank(φ: Phi, part: Part) -> Run:
    """z = λb ⊙ h,   h = (λd ⊙ u) Bᵀ,   u = x Aᵀ"""
    A, B = corners(φ, *part.W.shape)
    λb, λd = φ["λb"], φ["λd"]

    def run(x: Array) -> tuple[Array, Back]:
        u, vjp_u = linear(x, A, frozen=True)
        h, vjp_h = linear(λd * u, B, frozen=True)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            (dv,) = link(vjp_h, Once(lambda: λb * dz()), 1)
            (dx,) = link(vjp_u, Once(lambda: λd * dv()), 1)
            dλ = {"λb": Once(lambda: rows(dz() * h).sum(0)), "λd": Once(lambda: rows(dv() * u).sum(0))}
            return dx, φ.grads(want, dλ)

        return λb * h, back

    return run
