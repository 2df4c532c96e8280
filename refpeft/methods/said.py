"""SAID: Structure-Aware Intrinsic Dimension.      Aghajanyan et al. 2020, arXiv 2012.13255, §3, eq. (4)

    θᵢ = θ₀ᵢ + λᵢ (P θ_{d−m})ᵢ            for each of m tensors i; λ [m], ones at first; θ_{d−m}, zeros at first

d counts all that is trained: the d − m coordinates of the subspace that all tensors share, and how much of it each of
the m tensors takes. P, `shaped` and the choice of tensors are those of `did`:

    W′ = W + λᵢ shaped(P_W θ),   b′ = b + λⱼ P_b θ            i, j: the places of the two tensors in λ

With gᵢ = ∂L/∂θᵢ, laid out likewise:   dθ = Σᵢ λᵢ Pᵢᵀ gᵢ,   dλᵢ = ⟨Pᵢ θ, gᵢ⟩,   dW = dW′,   db = db′.

Claims:
    SA1  θ = 0 at init, hence θᵢ = θ₀ᵢ exactly; and dλ = 0 there, λ begins to move only after θ.
    SA2  wrap ≡ merge, by definition: the layer is run with the weights that `merge` gives.
    SA3  With λ = 1 it is DID of dimension d − m with the same P; with λᵢ = 0 the tensor i stays what it was.
    SA4  θ and λ together are d numbers, so that the d of DID and of SAID compare.
    SA5  A tensor that two layers share has one λ, whose gradient is that of both uses.

Where implementations differ:
    * The paper has one λ for each layer. The code in circulation, and this one, have one for each tensor, which is what
      its P is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from refpeft.hollow import hollow
from refpeft.method import Base, Merged, Phi, Values, as_dtype
from refpeft.methods import did
from refpeft.ops import Array
from refpeft.part import Lazy, Once, Part

if TYPE_CHECKING:
    from refpeft.model import Model

SHARED = {"θ": "said.theta", "λ": "said.lambda"}
KEYS = {name: tuple(key.replace("did_", "said_") for key in pair) for name, pair in did.KEYS.items()} | {
    "i": ("said_weight_index",) * 2,
    "i_b": ("said_bias_index",) * 2,
}
FROZEN = tuple(KEYS)


@dataclass(frozen=True)
class Config(did.Config):
    """As of `did`; `d` counts θ and λ."""


def init_model(
    cfg: Config, model: "Model", chosen: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """θ = 0, λ = 1, B, Π and G of every tensor, and its place in λ."""
    found = did.tensors(cfg, model)
    d, m, dtype = cfg.d, count(cfg, found), did.wide(found, model)
    frozen = did.projections("said", found, model, d - m, cfg.columns, rng)
    for i, names in enumerate(found.values()):
        frozen |= did.companions("said", names, {"index": np.array(i, np.int32)})
    return {SHARED["θ"]: np.zeros(d - m, dtype), SHARED["λ"]: np.ones(m, dtype)}, frozen


def outline_model(cfg: Config, model: "Model", chosen: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """θ [d − m], λ [m]; B, Π and G [L] of every tensor, and its place in λ."""
    found = did.tensors(cfg, model)
    d, m, dtype = cfg.d, count(cfg, found), did.wide(found, model)
    frozen = did.outlines("said", found, model, d - m)
    for names in found.values():
        frozen |= did.companions("said", names, {"index": hollow((), np.int32)})
    return {SHARED["θ"]: hollow((d - m,), dtype), SHARED["λ"]: hollow((m,), dtype)}, frozen


def count(cfg: Config, found: did.Tensors) -> int:
    """m, which is less than d."""
    m = len(found)
    if cfg.d <= m:
        raise ValueError(
            f"d must be more than {m}, the number of adapted tensors, each of which has a λ; found {cfg.d}"
        )
    return m


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + λᵢ shaped(P_W θ),   b′ = b + λⱼ P_b θ;      dθ = Σ λᵢ Pᵢᵀ gᵢ,   dλᵢ = ⟨Pᵢ θ, gᵢ⟩."""
    λ = φ["λ"]
    W1, b1, moved = W, b, []
    if "G" in φ:
        Δ, back = did.project(φ, "", W)
        W1 = as_dtype(W + λ[φ["i"]] * Δ, W)
        moved.append((0, φ["i"], Δ, back))
    if b is not None and "G_b" in φ:
        Δ, back = did.project(φ, "_b", b)
        b1 = as_dtype(b + λ[φ["i_b"]] * Δ, b)
        moved.append((1, φ["i_b"], Δ, back))

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        g = (dW1, db1)
        dθ = Once(lambda: reduce(add, [λ[i] * back(g[k]()) for k, i, _, back in moved]))
        at = np.arange(λ.shape[0])
        dλ = Once(lambda: reduce(add, [(at == i) * (Δ * g[k]()).sum() for k, i, Δ, _ in moved]).astype(λ.dtype))
        return dW1, {"θ": dθ, "λ": dλ}

    return W1, b1, vjp


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = f(x; W′, b′), f being what the layer computes: x Wᵀ + b, or a norm."""
    return did.lifted(part, φ, partial(merge, cfg))
