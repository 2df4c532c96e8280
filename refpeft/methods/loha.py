"""LoHa: low-rank Hadamard product.      Hyeon-Woo et al. 2021, arXiv 2108.06098, §2.2, proposition 1

    W′ = W + s P ⊙ Q,   P = B₁ A₁,   Q = B₂ A₂,   s = α/r        W [o, i], B₁, B₂ [o, r], A₁, A₂ [r, i]
    y  = y₀ + x (s P ⊙ Q)ᵀ                                       ⊙ entry by entry

With G = ∂L/∂W′:   dP = s G ⊙ Q,   dQ = s G ⊙ P,   dB₁ = dP A₁ᵀ,   dA₁ = B₁ᵀ dP,   likewise dB₂ and dA₂;   dW = G.

Two factors of rank r multiply to a matrix of rank up to r², with the parameters of a LoRA of rank 2r.

Claims:
    LH1  A₂ = 0 at init, hence W′ = W exactly; in the first step A₂ alone gets a gradient.
    LH2  wrap ≡ merge: both forms give the same outputs and gradients.
    LH3  ΔW is linear in α; only s = α/r enters, never α or r alone.
    LH4  The rank of ΔW reaches r² (if o and i do), which no sum of two factors of rank r has.
    LH5  Several adapters add up: W′ = W + Σ ΔWₖ, in any order.
    LH6  Where Q is all ones, it is LoRA with B₁, A₁ and the same s.

Where implementations differ:
    * The paper builds whole layers so, without W; LyCORIS made it an adapter (Yeh et al. 2023, arXiv 2309.14859, §3).
    * Init: HF peft draws B₁, A₁, B₂ from U(−1/√k, 1/√k), k the length of their rows, and sets A₂ = 0; so here. LyCORIS
      draws A₁, A₂ from N(0, 1), B₁ from N(0, 0.1), and sets B₂ = 0.
    * α is 8 if not given in HF peft, 1 in LyCORIS. Merging, LyCORIS 4.1.3 applies s twice: W + s² P ⊙ Q.
    * HF peft has it for linear layers (and convolutions); on a Conv1D or an embedding, here alone, ΔW is that of W.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import delta
from refpeft.method import Base, Merged, Phi, Values
from refpeft.methods.lora import kaiming
from refpeft.ops import Array
from refpeft.part import Lazy, Once, Part

KEYS = {
    "B1": ("hada_w1_a", "hada_w1_a"),
    "A1": ("hada_w1_b", "hada_w1_b"),
    "B2": ("hada_w2_a", "hada_w2_a"),
    "A2": ("hada_w2_b", "hada_w2_b"),
}
FROZEN = ()


@dataclass(frozen=True)
class Config(delta.Config):
    """HF peft's LoHaConfig, without what is for convolutions, and without dropout."""

    @property
    def scale(self) -> float:
        """s = α/r"""
        return self.alpha / self.r


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """B₁, B₂ [o, r], A₁, A₂ [r, i]."""
    (o, i), r = part.W.shape, cfg.r
    return {"B1": (o, r), "A1": (r, i), "B2": (o, r), "A2": (r, i)}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """Such that W′ = W, by A₂ = 0; only `init_weights=False` starts elsewhere."""
    φ = {name: kaiming(rng, (n, m)) for name, (n, m) in shapes(cfg, part).items()}
    return delta.typed(φ if cfg.init_weights is False else {**φ, "A2": 0 * φ["A2"]}, part)


def ΔW(cfg: Config, φ: Values | Phi) -> tuple[Array, delta.BackΔ]:
    """ΔW = s P ⊙ Q"""
    s = cfg.scale
    P, Q = φ["B1"] @ φ["A1"], φ["B2"] @ φ["A2"]

    def back(G: Lazy) -> dict[str, Lazy]:
        dP, dQ = Once(lambda: s * (G() * Q)), Once(lambda: s * (G() * P))
        return factors(φ, "B1", "A1", dP) | factors(φ, "B2", "A2", dQ)

    return s * (P * Q), back


def factors(φ: Values | Phi, B: str, A: str, dP: Lazy) -> dict[str, Lazy]:
    """P = B A:   dB = dP Aᵀ,   dA = Bᵀ dP"""
    return {B: Once(lambda: dP() @ φ[A].T), A: Once(lambda: φ[B].T @ dP())}


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + s P ⊙ Q,   b′ = b"""
    return delta.merged(W, b, φ, lambda φ: ΔW(cfg, φ))


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + x (s P ⊙ Q)ᵀ"""
    return delta.beside(part, φ, lambda φ: ΔW(cfg, φ))
