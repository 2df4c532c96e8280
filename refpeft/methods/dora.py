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
    D5  Several adapters compose in order, each rescaling what the earlier ones made of W, with the norm that its own V
        has over the base:   W″ = diag(g₂) (W′ + s₂ B₂ A₂),   g₂ = m₂/‖W + s₂ B₂ A₂‖.   The order matters.
    D6  Embeddings: W = Eᵀ, so the norm runs over the vocabulary, one magnitude per column of E.

Where implementations differ:
    * The paper has one adapter; D5 is HF peft's reading (from 0.21 on merged and running agree on it). With dropout,
      HF peft's correction (g − 1) ⊙ (x̃ Wᵀ) looks at the base alone, whatever came before; so does `mask` here.
    * AdapterHub takes the norm of W + B A without s, differentiates it, and rescales the bias too.
    * LyCORIS differentiates the norm and adds an ε to it.
    * HF peft before 0.11 took the norm along the wrong axis on Conv1D, and before 0.21 unmerged along it.
"""

from dataclasses import dataclass

import numpy as np

from refpeft.method import Base, Merged, Phi, Values, as_dtype, branch, masked
from refpeft.methods import lora
from refpeft.methods.lora import FROZEN, ΔW, dΔW, kept, low_rank
from refpeft.ops import Array, rows
from refpeft.part import Back, Grads, Key, Lazy, Once, Part, Run, Want, join, plus

KEYS = {**lora.KEYS, "m": ("lora_magnitude_vector", "lora_magnitude_vector")}

__all__ = ["FROZEN", "KEYS", "Config", "init", "kept", "merge", "shapes", "wrap"]


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


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """Those of LoRA, and m [o]."""
    return {**lora.shapes(cfg, part), "m": part.W.shape[:1]}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """A and B as LoRA's, m = ‖V‖."""
    φ = lora.init(cfg, part, rng)
    V = part.W + ΔW(cfg, φ)
    m = np.where((V == 0).all(1), 0, norm(cfg, V))
    return {**φ, "m": m.astype(φ["A"].dtype)}


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = diag(m/n) (W + s B A),   b′ = b      (on what earlier adapters made of a base: n and b₀ are the base's)"""
    W0, b0 = base or (W, b)
    Δ = ΔW(cfg, φ)
    V = W + Δ
    n = norm(cfg, V if W0 is W else W0 + Δ)
    g = φ["m"] / n
    b1 = b if b is b0 or b is None else g * b if b0 is None else b0 + g * (b - b0)

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        dg = Once(lambda: (dW1() * V).sum(1))
        dV = Once(lambda: g[:, None] * dW1() + through_norm(cfg, V, g, n, dg))
        return dV, {"m": Once(lambda: dg() / n), **dΔW(cfg, φ, dV)}

    return as_dtype(g[:, None] * V, W), b1, vjp


def through_norm(cfg: Config, V: Array, g: Array, n: Array, dg: Lazy) -> Array | float:
    """∂g/∂V = −m/n³ V, row by row, or nothing where the norm counts as a constant."""
    return 0.0 if cfg.detach_norm else (dg() * -g / n**2)[:, None] * V


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = b + g ⊙ (f(x) + z),   z = s x Aᵀ Bᵀ,   f(x) + b = y₀;      masked:   y = y₀ + (g − 1) ⊙ (x̃ Wᵀ) + g ⊙ z̃"""
    if mask is None:
        return biased(part, rescaled(cfg, φ, part, unbiased(part), 0))
    return branch(part, masked(rescaled(cfg, φ, part, part.bare, 1), mask))


def rescaled(cfg: Config, φ: Phi, part: Part, f: Run, less: int) -> Run:
    """y = (g − less) ⊙ f(x) + g ⊙ z"""

    def run(x: Array) -> tuple[Array, Back]:
        V = part.W + ΔW(cfg, φ)
        n = norm(cfg, V)
        g = φ["m"] / n
        h, back_h = f(x)
        z, back_z = low_rank(cfg, φ, part)(x)
        y = as_dtype((g - less) * h + g * z if less else g * (h + z), h)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx_h, grads_h = back_h(Once(lambda: dy() * (g - less)), want)
            dx_z, grads_z = back_z(Once(lambda: dy() * g), want)
            dg = Once(lambda: rows(dy() * (h + z)).sum(0))
            grads = join(join(grads_h, grads_z), φ.grads(want, {"m": Once(lambda: dg() / n)}))
            if not cfg.detach_norm:
                dV = Once(lambda: through_norm(cfg, V, g, n, dg))
                grads = join(grads, join(part.base_grads(want, dV), φ.grads(want, dΔW(cfg, φ, dV))))
            return plus(dx_h, dx_z), grads

        return y, back

    return run


def unbiased(part: Part) -> Run:
    """f(x) = y₀ − b;   for a part that nobody has wrapped, x Wᵀ."""
    if part.pristine:
        return part.bare
    return part.run if part.b is None else shifted(part.run, -1, part.b, part.b_key)


def biased(part: Part, f: Run) -> Part:
    """y = f(x) + b"""
    return part.wrapped(f if part.b is None else shifted(f, 1, part.b, part.b_key))


def shifted(f: Run, sign: int, b: Array, key: Key) -> Run:
    """y = f(x) ± b"""

    def run(x: Array) -> tuple[Array, Back]:
        y, back_f = f(x)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, grads = back_f(dy, want)
            if key in want:
                grads = join(grads, {key: Once(lambda: rows(dy() if sign > 0 else -dy()).sum(0))})
            return dx, grads

        return y + b if sign > 0 else y - b, back  # sign · b would promote bfloat16 in NumPy 2.0

    return run
