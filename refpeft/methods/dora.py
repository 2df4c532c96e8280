"""DoRA: weight-decomposed low-rank adaptation.      Liu et al. 2024, arXiv 2402.09353, §4.1, eq. (5)

    V = W + s B A,   n_o = ‖V_o‖ (row by row),   g = m/n,   W′ = diag(g) V,   b′ = b        m [o], the magnitude
    y = b + g ⊙ (x Vᵀ)                                                                       init: m = n, hence g = 1

The paper normalises columns of a weight [i, o]; with W [o, i] these are rows: one magnitude per output. The bias is
not rescaled. With a dropout mask, x̃ = x ⊙ mask:   y = y₀ + (g − 1) ⊙ (x̃ Wᵀ) + g ⊙ (s x̃ Aᵀ Bᵀ).

With G = ∂L/∂W′:   dm = Σ_i G ⊙ V / n,   dV = g G,   dA = s Bᵀ dV,   dB = s dV Aᵀ,   dW = dV.
The norm is held constant in the gradient (§4.3, eq. (11)): `detach_norm=True`, the default, which HF peft follows.
With `detach_norm=False` it is differentiated too (LyCORIS, AdapterHub):   dV −= (m (G · V)/n³) V, row by row.

Claims:
    D1  m = ‖V‖ at init, hence g = 1 and W′ = W. A row of zeros has no direction: it stays a row of zeros (g = m/1 = 0).
    D2  wrap ≡ merge: both forms give the same outputs and gradients (without dropout).
    D3  The rows of W′ have the norms |m|, whatever A and B are.
    D4  Doubling m doubles W′ (and not the bias).
    D5  Several adapters add up what each changes in the base: W′ = W + Σ (W′ₖ − W), each with the norm of its own V.
    D6  Embeddings: W = Eᵀ, so the norm runs over the vocabulary, one magnitude per column of E.

Where implementations differ:
    * AdapterHub takes the norm of W + B A without s, differentiates it, and rescales the bias too.
    * LyCORIS differentiates the norm and adds an ε to it.
    * HF peft before 0.11 took the norm along the wrong axis on Conv1D, and before 0.21 unmerged along it.
"""

from dataclasses import dataclass

import numpy as np

from refpeft.method import Merged, Phi, Values, as_dtype, branch, masked
from refpeft.methods import lora
from refpeft.methods.lora import FROZEN, dΔW, low_rank, ΔW
from refpeft.ops import Array, rows
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, join, plus

KEYS = {**lora.KEYS, "m": ("lora_magnitude_vector", "lora_magnitude_vector")}

__all__ = ["FROZEN", "KEYS", "Config", "init", "merge", "wrap"]


@dataclass(frozen=True)
class Config(lora.Config):
    """LoRA's, with HF peft's flag for DoRA; `detach_norm` is this specification's own."""

    use_dora: bool = True
    detach_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ValueError("lora_bias is not defined for DoRA, which leaves the bias alone: set lora_bias=False")


def norm(cfg: Config, V: Array) -> Array:
    """n_o = ‖V_o‖, of real values where it counts as a constant; 1 for a row of zeros, which stays a row of zeros."""
    V = V.real if cfg.detach_norm else V
    n = np.sqrt((V * V).sum(1))
    return n + (n.real == 0)


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """A and B as LoRA's, m = ‖V‖."""
    φ = lora.init(cfg, part, rng)
    V = part.W + ΔW(cfg, φ)
    m = np.where((V == 0).all(1), 0, norm(cfg, V))
    return {**φ, "m": m.astype(φ["A"].dtype)}


def merge(cfg: Config, W: Array, b: Array | None, φ: Values) -> Merged:
    """W′ = diag(m/n) (W + s B A),   b′ = b"""
    V = W + ΔW(cfg, φ)
    n = norm(cfg, V)
    g = φ["m"] / n

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        dg = Once(lambda: (dW1() * V).sum(1))
        dV = Once(lambda: g[:, None] * dW1() + through_norm(cfg, V, g, n, dg))
        return dV, {"m": Once(lambda: dg() / n), **dΔW(cfg, φ, dV)}

    return as_dtype(g[:, None] * V, W), b, vjp


def through_norm(cfg: Config, V: Array, g: Array, n: Array, dg: Lazy) -> Array | float:
    """∂g/∂V = −m/n³ V, row by row, or nothing where the norm counts as a constant."""
    return 0.0 if cfg.detach_norm else (dg() * -g / n**2)[:, None] * V


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + (g − 1) ⊙ h + g ⊙ z,   h = x̃ Wᵀ,   z = s x̃ Aᵀ Bᵀ;   with no mask and y₀ = h + b:   y = b + g ⊙ (h + z)."""
    alone = part.pristine and mask is None

    def δ(x: Array) -> tuple[Array, Back]:
        V = part.W + ΔW(cfg, φ)
        n = norm(cfg, V)
        g = φ["m"] / n
        h, back_h = part.bare(x)
        z, back_z = low_rank(cfg, φ, part)(x)
        f = g if alone else g - 1
        y = as_dtype(f * h + g * z, h)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx_h, grads_h = back_h(Once(lambda: dy() * f), want)
            dx_z, grads_z = back_z(Once(lambda: dy() * g), want)
            dg = Once(lambda: rows(dy() * (h + z)).sum(0))
            grads = join(join(grads_h, grads_z), φ.grads(want, {"m": Once(lambda: dg() / n)}))
            if not cfg.detach_norm:
                dV = Once(lambda: through_norm(cfg, V, g, n, dg))
                grads = join(grads, join(part.base_grads(want, dV), φ.grads(want, dΔW(cfg, φ, dV))))
            return plus(dx_h, dx_z), grads

        return y, back

    return biased(part, δ) if alone else branch(part, masked(δ, mask))


def biased(part: Part, f: Run) -> Part:
    """y = f(x) + b"""

    def run(x: Array) -> tuple[Array, Back]:
        y, back_f = f(x)
        b = part.b
        if b is None:
            return y, back_f

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, grads = back_f(dy, want)
            if part.b_key in want:
                grads = join(grads, {part.b_key: Once(lambda: rows(dy()).sum(0))})
            return dx, grads

        return y + b, back

    return part.wrapped(run)
