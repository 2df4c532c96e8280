"""LoKr: low-rank Kronecker product.      Yeh et al. 2023, arXiv 2309.14859, §3, LoKr

    W′ = W + s C ⊗ D,   s = α/r         C [l, m], D [k, n], l k = o, m n = i;   (C ⊗ D)[a k + b, c n + d] = C_ac D_bd
    y  = y₀ + x (s C ⊗ D)ᵀ              D = B A, B [k, r], A [r, n], where r < max(k, n)/2;   else D itself
                                        C = C_b C_a, with `decompose_both` where r < max(l, m)/2;   else C itself

With G = ∂L/∂W′ as [l, k, m, n]:   dC = s Σ_kn G D,   dD = s Σ_lm G C,   and of a product as in LoRA:
dB = dD Aᵀ,   dA = Bᵀ dD,   likewise dC_b and dC_a;   dW = G.

l ≤ k are the divisors of o nearest to each other, m ≤ n those of i, with l and m at most `decompose_factor` unless
that is −1; where it divides, it is taken for l or m as it is.

Claims:
    LK1  C = 0 at init (C_b, if C is a product), hence W′ = W exactly; with `init_weights='lycoris'` it is D (or A) = 0.
    LK2  wrap ≡ merge: both forms give the same outputs and gradients.
    LK3  The rank of ΔW is that of C times that of D: r · min(l, m) where D is a product, up to full rank.
    LK4  ΔW is linear in α; α/r is the scale where C and D are both full too, unless `scale_full` is off.
    LK5  Several adapters add up: W′ = W + Σ ΔWₖ, in any order.
    LK6  Where o and i are primes, l = m = 1, and C is a number: ΔW = s C D.

Where implementations differ:
    * Where C and D are both full, r is no rank of anything. HF peft keeps s = α/r, so here; LyCORIS sets s = 1,
      which is `scale_full=False`.
    * HF peft starts with C = 0, LyCORIS with D = 0 (`init_weights='lycoris'`).
    * `decompose_factor` above √o that divides o: HF peft then has l > k, LyCORIS swaps them; so HF peft here.
    * LyCORIS 4.1.3 merges W + s² C ⊗ D. HF peft has it for linear layers (and convolutions) only, see `loha`.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import delta
from refpeft.method import Base, Merged, Phi, Values
from refpeft.methods.loha import factors
from refpeft.methods.lora import kaiming
from refpeft.ops import Array
from refpeft.part import Lazy, Once, Part

KEYS = {
    "C": ("lokr_w1", "lokr_w1"),
    "Cb": ("lokr_w1_a", "lokr_w1_a"),
    "Ca": ("lokr_w1_b", "lokr_w1_b"),
    "D": ("lokr_w2", "lokr_w2"),
    "B": ("lokr_w2_a", "lokr_w2_a"),
    "A": ("lokr_w2_b", "lokr_w2_b"),
}
FROZEN = ()


@dataclass(frozen=True)
class Config(delta.Config):
    """HF peft's LoKrConfig, without what is for convolutions, and without dropout; `scale_full` is this
    specification's own."""

    decompose_both: bool = False
    decompose_factor: int = -1
    scale_full: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ValueError(f"decompose_factor must be −1 or a positive integer, found {self.decompose_factor!r}")

    def inits(self) -> tuple[bool | str, ...]:
        return (*delta.INITS, "lycoris")

    def scale(self, φ: Values | Phi) -> float:
        """s = α/r;   without `scale_full` 1, where neither C nor D is a product"""
        full = φ.get("C") is not None and φ.get("D") is not None
        return 1.0 if full and not self.scale_full else self.alpha / self.r


def divisors(n: int, factor: int) -> tuple[int, int]:
    """a b = n: `factor` and the rest if it divides; else a ≤ b as near to each other as can be with a ≤ factor."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    top = n if factor < 0 else factor
    a = max(a for a in range(1, int(n**0.5) + 1) if n % a == 0 and a <= top)
    return a, n // a


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """C [l, m] or C_b [l, r], C_a [r, m];   D [k, n] or B [k, r], A [r, n]."""
    (o, i), r = part.W.shape, cfg.r
    (l, k), (m, n) = divisors(o, cfg.decompose_factor), divisors(i, cfg.decompose_factor)  # noqa: E741
    small: dict[str, tuple[int, ...]] = {"C": (l, m)}
    if cfg.decompose_both and r < max(l, m) / 2:
        small = {"Cb": (l, r), "Ca": (r, m)}
    return small | ({"B": (k, r), "A": (r, n)} if r < max(k, n) / 2 else {"D": (k, n)})


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """Such that W′ = W, by a factor that is zero; only `init_weights=False` starts elsewhere."""
    φ = {name: kaiming(rng, (n, m)) for name, (n, m) in shapes(cfg, part).items()}
    zero = {True: ("C", "Cb"), "lycoris": ("D", "A")}.get(cfg.init_weights, ())
    return delta.typed({name: v * (name not in zero) for name, v in φ.items()}, part)


def ΔW(cfg: Config, φ: Values | Phi) -> tuple[Array, delta.BackΔ]:
    """ΔW = s C ⊗ D"""
    s = cfg.scale(φ)
    C, back_C = factor(φ, "C", "Cb", "Ca")
    D, back_D = factor(φ, "D", "B", "A")
    (l, m), (k, n) = C.shape, D.shape  # noqa: E741

    def back(G: Lazy) -> dict[str, Lazy]:
        # [lm, kn]: as a matrix, ΔW is an outer product, C of the rows and D of the columns
        turned = Once(lambda: G().reshape(l, k, m, n).transpose(0, 2, 1, 3).reshape(l * m, k * n))
        dC = Once(lambda: s * (turned() @ D.reshape(-1, 1)).reshape(l, m))
        dD = Once(lambda: s * (C.reshape(1, -1) @ turned()).reshape(k, n))
        return back_C(dC) | back_D(dD)

    return s * (C[:, None, :, None] * D[None, :, None, :]).reshape(l * k, m * n), back


def factor(φ: Values | Phi, full: str, b: str, a: str) -> tuple[Array, delta.BackΔ]:
    """One side of ⊗: itself, or a product."""
    whole = φ.get(full)
    if whole is not None:
        return whole, lambda d: {full: d}
    return φ[b] @ φ[a], lambda d: factors(φ, b, a, d)


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + s C ⊗ D,   b′ = b"""
    return delta.merged(W, b, φ, lambda φ: ΔW(cfg, φ))


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + x (s C ⊗ D)ᵀ"""
    return delta.beside(part, φ, lambda φ: ΔW(cfg, φ))
