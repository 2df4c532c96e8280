"""GLoRA: generalised LoRA, as LyCORIS has it.      Chavan et al. 2023, arXiv 2306.07967: f(x) = (W + W A + B) x + b

    W′ = W + s (W A + B),   A = A_u A_d,   B = B_u B_d,   s = α/r,   b′ = b
    y  = y₀ + s (x A_dᵀ Vᵀ + x B_dᵀ B_uᵀ),   V = W A_u            W [o, i], A_u [i, r], A_d, B_d [r, i], B_u [o, r]

With G = ∂L/∂W′:   dV = s G A_dᵀ,   dA_d = s Vᵀ G,   dA_u = Wᵀ dV,   dB_u = s G B_dᵀ,   dB_d = s B_uᵀ G,
dW = G + dV A_uᵀ.

W A is what a layer makes of inputs that A has changed: B adds, A moves along what W does already.

Claims:
    GL1  A_d = B_d = 0 at init, hence W′ = W exactly; in the first step A_d and B_d alone get gradients.
    GL2  wrap ≡ merge: both forms give the same outputs and gradients.
    GL3  ΔW is linear in α; only s enters, never α or r alone.
    GL4  Without A (A_u = 0) it is LoRA with B_u, B_d and the same s.
    GL5  Without B (B_u = 0) it is the layer of other inputs: y = f(x + s x Aᵀ).
    GL6  Several adapters add up, each with the W of the base: W′ = W + Σ sₖ (W Aₖ + Bₖ), in any order. Of one that is
         merged into a base, the next one has the W′.

On an embedding, x is a one-hot row and W = Eᵀ: A_u is [v, r], A mixes rows of the table.

Where implementations differ:
    * The paper has terms for the bias too, b′ = b + D b + E + W C, and each of A to E may be a matrix, its factors, a
      vector, a number or nothing, chosen by a search. LyCORIS has A and B as factors, and no others; we follow.
    * The authors' code and HF peft read W A entry by entry, W ⊙ A with A [o, i]: another method, without a scale, and
      with the terms for the bias. One checkpoint cannot be the other's.
    * Two adapters of LyCORIS add up as here where ΔW is rebuilt. In bypass mode the second one's A moves the inputs of
      the first, and merged one after the other, the second finds the W′ of the first for W.
"""

import math
from dataclasses import dataclass

import numpy as np

from refpeft import delta
from refpeft.method import Base, Merged, Phi, Values, as_dtype, branch, together
from refpeft.methods import lora
from refpeft.methods.lora import kaiming, low_rank, times
from refpeft.ops import Array, Cotangent, Vjp, linear
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, join, link

# as LyCORIS has them
KEYS = {
    "Au": ("a1.weight", "a1.weight"),
    "Ad": ("a2.weight", "a2.weight"),
    "Bu": ("b1.weight", "b1.weight"),
    "Bd": ("b2.weight", "b2.weight"),
}
FROZEN = ()


@dataclass(frozen=True)
class Config(delta.Config):
    """r and α, named as in HF peft's configs of such methods; `use_rslora` is LyCORIS's `rs_lora`."""

    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """s = α/r;   rank-stabilised: α/√r"""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """A_u [i, r], A_d [r, i], B_u [o, r], B_d [r, i]."""
    (o, i), r = part.W.shape, cfg.r
    return {"Au": (i, r), "Ad": (r, i), "Bu": (o, r), "Bd": (r, i)}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """Such that W′ = W, by A_d = B_d = 0; only `init_weights=False` starts elsewhere."""
    φ = {name: kaiming(rng, (n, m)) for name, (n, m) in shapes(cfg, part).items()}
    return delta.typed(φ if cfg.init_weights is False else {**φ, "Ad": 0 * φ["Ad"], "Bd": 0 * φ["Bd"]}, part)


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + s (W₀ A + B),   b′ = b      (W₀: the base's, where earlier adapters have made W of it)"""
    s, Au, Ad, Bu, Bd = cfg.scale, *(φ[n] for n in ("Au", "Ad", "Bu", "Bd"))
    W0, _ = base or (W, b)
    V, vjp_V = moved(W0, Au)
    W1 = as_dtype(W + s * (V @ Ad + Bu @ Bd), W)

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        dW, dAu = link(vjp_V, Once(lambda: s * (dW1() @ Ad.T)), 2)
        dA: dict[str, Lazy] = {"Au": dAu, "Ad": Once(lambda: s * (V.T @ dW1()))}
        dB = {"Bu": Once(lambda: s * (dW1() @ Bd.T)), "Bd": Once(lambda: s * (Bu.T @ dW1()))}
        return Once(lambda: dW1() + dW()) if W0 is W else dW1, dA | dB

    return W1, b, vjp


def moved(W: Array, Au: Array, frozen: bool = False) -> tuple[Array, Vjp]:
    """V = W A_u [o, r], in the dtype of A_u;   dW = dV A_uᵀ,   dA_u = Wᵀ dV"""
    Vt, vjp = linear(Au.T, W, frozen=frozen)

    def back(dV: Array) -> tuple[Cotangent, ...]:
        dAut, dW, _ = vjp(dV.T)
        assert dAut is not None
        return dW, lambda: dAut().T

    return Vt.T, back


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + s (x A_dᵀ Vᵀ + x B_dᵀ B_uᵀ)"""
    names = {"A": "Bd", "B": "Bu"}  # as LoRA calls them
    keys = {n: φ.keys[name] for n, name in names.items() if name in φ.keys}
    B = Phi({n: φ[name] for n, name in names.items()}, keys)
    return branch(part, together(through(cfg, φ, part), low_rank(lora.Config(r=1, lora_alpha=cfg.scale), B, part)))


def through(cfg: Config, φ: Phi, part: Part) -> Run:
    """z = s x A_dᵀ Vᵀ"""

    def run(x: Array) -> tuple[Array, Back]:
        s = cfg.scale
        V, vjp_V = moved(part.W, φ["Au"], part.frozen)
        u, vjp_u = part.matmul(x, φ["Ad"])
        z, vjp_z = linear(s * u, V)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dsu, dV = link(vjp_z, dz, 2)
            dx, dAd = link(vjp_u, Once(times, s, dsu), 2)
            dW, dAu = link(vjp_V, dV, 2)
            return dx, join(part.base_grads(want, dW), φ.grads(want, {"Au": dAu, "Ad": dAd}))

        return z, back

    return run
