"""LoHa: low-rank Hadamard product.      Hyeon-Woo et al. 2021, arXiv 2108.06098, §2.2, proposition 1

    W′ = W + s P ⊙ Q,   P = B₁ A₁,   Q = B₂ A₂,   s = α/r        W [o, i], B₁, B₂ [o, r], A₁, A₂ [r, i]
    y  = y₀ + x (s P ⊙ Q)ᵀ                                       ⊙ entry by entry

With G = ∂L/∂W′:   dP = s G ⊙ Q,   dQ = s G ⊙ P,   dB₁ = dP A₁ᵀ,   dA₁ = B₁ᵀ dP,   likewise dB₂ and dA₂;   dW = G.

Of a convolution's W [o, i, k], as a matrix [o, i k] on patches of its input, there is a form with a core between the
factors (proposition 3): with `taps` k > 1,

    P_oik = Σ_ab T₁_abk B₁_ao A₁_bi,   Q likewise               T₁, T₂ [r, r, k], B₁, B₂ [r, o], A₁, A₂ [r, i]

    dT₁_abk = Σ_oi dP_oik B₁_ao A₁_bi,   dB₁_ao = Σ_bik dP_oik T₁_abk A₁_bi,   dA₁_bi = Σ_aok dP_oik T₁_abk B₁_ao

Two factors of rank r multiply to a matrix of rank up to r², with the parameters of a LoRA of rank 2r.

Claims:
    LH1  A₂ = 0 at init, hence W′ = W exactly; in the first step A₂ alone gets a gradient.
    LH2  wrap ≡ merge: both forms give the same outputs and gradients.
    LH3  ΔW is linear in α; only s = α/r enters, never α or r alone.
    LH4  The rank of ΔW reaches r² (if o and i do), which no sum of two factors of rank r has.
    LH5  Several adapters add up: W′ = W + Σ ΔWₖ, in any order.
    LH6  Where Q is all ones, it is LoRA with B₁, A₁ and the same s.
    LH7  Where all taps of both cores are the identity, each tap of ΔW is that of B₁ᵀ, A₁, B₂ᵀ, A₂ without cores.

Where implementations differ:
    * The paper builds whole layers so, without W; LyCORIS made it an adapter (Yeh et al. 2023, arXiv 2309.14859, §3).
    * Init: HF peft draws B₁, A₁, B₂ from U(−1/√k, 1/√k), k the length of their rows, and sets A₂ = 0; so here. LyCORIS
      draws A₁, A₂ from N(0, 1), B₁ from N(0, 0.1), and sets B₂ = 0.
    * α is 8 if not given in HF peft, 1 in LyCORIS. Merging, LyCORIS 4.1.3 applies s twice: W + s² P ⊙ Q.
    * HF peft has it for linear layers (and convolutions); on a Conv1D or an embedding, here alone, ΔW is that of W.
    * The form with cores is HF peft's `use_effective_conv2d` and LyCORIS's `use_tucker`, for convolutions with k > 1;
      here, where there are no convolutions, of any matrix whose inputs k divides. Both write its gradients by hand;
      in HF peft 0.21.2 and LyCORIS 1.9.0 dB₁ is computed with T₂ A₂ in the place of T₁ A₁, and dB₂ with T₁ A₁.
"""

import math
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
    "T1": ("hada_t1", "hada_t1"),
    "T2": ("hada_t2", "hada_t2"),
}
FROZEN = ()


@dataclass(frozen=True)
class Config(delta.Config):
    """HF peft's LoHaConfig without dropout. `taps` is our own: k for the form with cores, 1 for that without."""

    taps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taps < 1:
            raise ValueError(f"taps must be a positive integer, found {self.taps!r}")

    @property
    def scale(self) -> float:
        """s = α/r"""
        return self.alpha / self.r


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """B₁, B₂ [o, r], A₁, A₂ [r, i];   with cores T₁, T₂ [r, r, k], B₁, B₂ [r, o], A₁, A₂ [r, i/k]."""
    (o, i), r, k = part.W.shape, cfg.r, cfg.taps
    if i % k:
        raise ValueError(f"{part.path}: taps={k} must divide the {i} inputs")
    if k > 1:
        one, two = ({"T" + n: (r, r, k), "B" + n: (r, o), "A" + n: (r, i // k)} for n in "12")
        return one | two
    return {"B1": (o, r), "A1": (r, i), "B2": (o, r), "A2": (r, i)}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """Such that W′ = W, by A₂ = 0; only `init_weights=False` starts elsewhere."""
    φ = {name: kaiming(rng, (n, math.prod(m))).reshape(n, *m) for name, (n, *m) in shapes(cfg, part).items()}
    return delta.typed(φ if cfg.init_weights is False else {**φ, "A2": 0 * φ["A2"]}, part)


def ΔW(cfg: Config, φ: Values | Phi) -> tuple[Array, delta.BackΔ]:
    """ΔW = s P ⊙ Q"""
    s = cfg.scale
    (P, back_P), (Q, back_Q) = product(φ, "1"), product(φ, "2")

    def back(G: Lazy) -> dict[str, Lazy]:
        dP, dQ = Once(lambda: s * (G() * Q)), Once(lambda: s * (G() * P))
        return back_P(dP) | back_Q(dQ)

    return s * (P * Q), back


def product(φ: Values | Phi, n: str) -> tuple[Array, delta.BackΔ]:
    """P = B A, or with a core"""
    B, A, T = "B" + n, "A" + n, "T" + n
    if φ.get(T) is not None:
        return with_core(φ, B, A, T)
    return φ[B] @ φ[A], lambda dP: factors(φ, B, A, dP)


def with_core(φ: Values | Phi, B: str, A: str, T: str) -> tuple[Array, delta.BackΔ]:
    """P_oik = Σ_ab T_abk B_ao A_bi, as a matrix [o, i k]:   P = Bᵀ U,   U_aik = Σ_b T_abk A_bi"""
    (r, _, k), i = φ[T].shape, φ[A].shape[1]
    U = (φ[T].transpose(0, 2, 1) @ φ[A]).transpose(0, 2, 1).reshape(r, i * k)

    def back(dP: Lazy) -> dict[str, Lazy]:
        dU = Once(lambda: (φ[B] @ dP()).reshape(r, i, k))
        by_tap = Once(lambda: dU().transpose(0, 2, 1).reshape(r * k, i))
        return {
            B: Once(lambda: U @ dP().T),
            A: Once(lambda: φ[T].transpose(1, 0, 2).reshape(r, r * k) @ by_tap()),
            T: Once(lambda: φ[A] @ dU()),
        }

    return φ[B].T @ U, back


def factors(φ: Values | Phi, B: str, A: str, dP: Lazy) -> dict[str, Lazy]:
    """P = B A:   dB = dP Aᵀ,   dA = Bᵀ dP"""
    return {B: Once(lambda: dP() @ φ[A].T), A: Once(lambda: φ[B].T @ dP())}


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + s P ⊙ Q,   b′ = b"""
    return delta.merged(W, b, φ, lambda φ: ΔW(cfg, φ))


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + x (s P ⊙ Q)ᵀ"""
    return delta.beside(part, φ, lambda φ: ΔW(cfg, φ))
