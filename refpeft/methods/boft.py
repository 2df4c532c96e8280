"""BOFT: orthogonal fine-tuning by butterflies.      Liu et al. 2023, arXiv 2311.06243, §4.2-4.3, eq. (3)-(5)

    W′ = diag(s) W Mᵀ,   b′ = b           M = B_m−1 ⋯ B₁ B₀,   B_k = Π_k diag(R_k1, …, R_kn) Π_kᵀ,   s [o]
    y  = b + s ⊙ (f(x M) − b)             R = (I − S)(I + S)⁻¹,   S = (A − Aᵀ)/2,   A [m, n, p, p], p n = i

f is the layer. Π_k puts beside each other the halves of blocks that are 2^k halves apart, so that M mixes 2^(m−1) p
inputs by m n small matrices. Π₀ = I: with m = 1 and s = 1 it is OFT. With `side="output"` outputs are turned, by C
[m, n, p, p], p n = o, in the place of A:   W′ = diag(s) M W,   y = b + s ⊙ ((f(x) − b) Mᵀ).

With G = ∂L/∂W′:   ds = Σ_i G ⊙ (W Mᵀ),   d(W Mᵀ) = diag(s) G,   then back through the B_k, each as in `oft`; with
Q = −S:   dQ = (I − Q)⁻ᵀ dR (I + R)ᵀ,   dA = (dQᵀ − dQ)/2.

Claims:
    BO1  A = 0 and s = 1 at init, hence W′ = W exactly.
    BO2  wrap ≡ merge: both forms give the same outputs and gradients.
    BO3  M is orthogonal: with s = 1 the norms of and angles between rows of W stay as they are.
    BO4  With m = 1 and s = 1 it is OFT with the exact Cayley transform, and v the upper triangle of −S.
    BO5  With m > 1 an output depends on blocks of inputs that one block alone would not mix: 2^(m−1) p of them.
    BO6  Doubling s doubles W′, and not the bias.
    BO7  Several adapters compose in order, W′ = diag(s₂ s₁) W M₁ᵀ M₂ᵀ. The order matters.
    BO8  What turns outputs is what turns inputs on Wᵀ: of A = C and s = 1 the one is the other transposed.

Where implementations differ:
    * The paper has R = (I + Q)(I − Q)⁻¹; the authors' code and HF peft the inverse, which is the same for Q = −S. We
      follow these, so that files mean what they say.
    * The scale s of outputs is the authors' code's and HF peft's; as there, the bias is not scaled.
    * HF peft needs a CUDA extension for m > 1. Without it, m is 1 whatever `boft_n_butterfly_factor` says.
    * LyCORIS turns outputs (`side="output"`) with C = −2 B, B being its blocks, where row and column 2 j + g of B are
      those of entry j of half g here. It has as many factors as there can be, computes in float32, has s only if
      `rescaled`, and in its bypass mode turns and scales the bias too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refpeft import delta
from refpeft.method import Base, Merged, Phi, Targets, Values, as_dtype, narrows
from refpeft.methods.dora import biased, unbiased
from refpeft.ops import Array, Vjp, rows
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, join, link
from refpeft.rotations import cayley, rotate

if TYPE_CHECKING:
    from refpeft.adapter import Adapter

# A of the inputs, C of the outputs; R and S: these rotations themselves, in a graph that needs no more
KEYS = {
    "A": ("boft_R", None),
    "C": ("boft_out_R", None),
    "s": ("boft_s", None),
    "R": ("boft_R.rotation", None),
    "S": ("boft_out_R.rotation", None),
}
FROZEN = ()
SIDES = ("input", "output")


@dataclass(frozen=True)
class Config(Targets):
    """HF peft's BOFTConfig, without dropout; `side` is this specification's own. One of block size and number of
    blocks is given, the other is 0."""

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    init_weights: bool = True
    fan_in_fan_out: bool = False
    bias: str = "none"
    side: str = "input"

    def __post_init__(self) -> None:
        p, n = self.boft_block_size, self.boft_block_num
        if (p > 0) == (n > 0) or min(p, n) < 0:
            found = f"boft_block_size={p!r}, boft_block_num={n!r}"
            raise ValueError(
                f"one of boft_block_size and boft_block_num must be a positive integer and the other 0, found {found}"
            )
        if not 1 <= self.boft_n_butterfly_factor <= 32:
            raise ValueError(f"boft_n_butterfly_factor must be from 1 to 32, found {self.boft_n_butterfly_factor!r}")
        if self.bias not in ("none", "all", "boft_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'boft_only', found {self.bias!r}")
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {SIDES}, found {self.side!r}")

    def at(self, path: str) -> "Config":
        return self


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """A or C [m, n, p, p], s [o, 1]"""
    if part.kind == "embedding":
        raise ValueError(f"{part.path}: BOFT is defined for linear layers, not for embeddings")
    output = cfg.side == "output"
    d = part.W.shape[0 if output else 1]
    given, m = cfg.boft_block_size or cfg.boft_block_num, cfg.boft_n_butterfly_factor
    if d % given:
        name = "boft_block_size" if cfg.boft_block_size else "boft_block_num"
        raise ValueError(f"{part.path}: {name} must divide the {d} {cfg.side}s, found {given}")
    p = cfg.boft_block_size or d // given
    n = d // p
    if m > 1 and (n % 2 ** (m - 1) or p % 2):
        wanted = f"an even block size and a number of blocks that {2 ** (m - 1)} divides"
        raise ValueError(f"{part.path}: {m} butterfly factors need {wanted}, found {n} blocks of {p}")
    return {"C" if output else "A": (m, n, p, p), "s": (part.W.shape[0], 1)}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """A or C = 0 and s = 1; with `init_weights=False` both N(0, 0.1) away from there."""
    φ = {n: rng.normal(0, 0.1, shape) * (not cfg.init_weights) for n, shape in shapes(cfg, part).items()}
    return delta.typed({**φ, "s": 1 + φ["s"]}, part)


def rotation(φ: Values | Phi) -> tuple[Array, delta.BackΔ]:
    """R [m, n, p, p] = (I − S)(I + S)⁻¹, and from dR to dA or dC; or the rotations that are given."""
    given = next((n for n in ("R", "S") if φ.get(n) is not None), None)
    if given:
        return φ[given], lambda dR: {given: dR}
    name = "C" if φ.get("C") is not None else "A"
    A = φ[name]
    blocks = A.reshape(-1, *A.shape[2:])
    R, vjp = cayley((blocks.swapaxes(1, 2) - blocks) / 2)

    def back(dR: Lazy) -> dict[str, Lazy]:
        (dQ,) = link(vjp, Once(lambda: dR().reshape(blocks.shape)), 1)
        return {name: Once(lambda: ((dQ().swapaxes(1, 2) - dQ()) / 2).reshape(A.shape))}

    return R.reshape(A.shape), back


def butterfly(x: Array, R: Array, levels: Sequence[int]) -> tuple[Array, Vjp]:
    """y = x B_k ⋯, the levels k one after the other.      x [… n p], R [m, n, p, p] → y

    Π_k is undone by its transpose, so a cotangent goes the same way back: dx = Π_k(dy) R_kᵀ, and so on.
    """
    p, vjps = R.shape[-1], []
    for k in levels:
        y, vjp = rotate(gathered(x, k, p), R[k])
        vjps.append(vjp)
        x = scattered(y, k, p)

    def pulled(d: Array) -> tuple[Array, Array]:
        found = {}
        for k, vjp in zip(reversed(levels), reversed(vjps), strict=True):
            dx, dR = link(vjp, Once(gathered, d, k, p), 2)
            d, found[k] = scattered(dx(), k, p), dR()
        return d, np.concatenate([found[k][None] for k in range(len(levels))])

    def vjp_all(dy: Array) -> tuple[Lazy, Lazy]:
        both = Once(pulled, dy)
        return lambda: both()[0], lambda: both()[1]

    return x, vjp_all


def gathered(x: Array, k: int, p: int) -> Array:
    """Halves of blocks that lie 2^k halves apart, side by side."""
    n = x.shape[-1] // (p * 2**k)
    return x if k == 0 else x.reshape(*x.shape[:-1], n, 2, 2**k, p // 2).swapaxes(-3, -2).reshape(x.shape)


def scattered(x: Array, k: int, p: int) -> Array:
    """And back to where they were."""
    n = x.shape[-1] // (p * 2**k)
    return x if k == 0 else x.reshape(*x.shape[:-1], n, 2**k, 2, p // 2).swapaxes(-3, -2).reshape(x.shape)


def rotations(adapter: "Adapter") -> "Adapter":
    """The same function, with the rotations themselves in place of what they are made from."""
    params = dict(adapter.params)
    for path, (names, _) in adapter.by_module.items():
        for name in names.keys() & {"A", "C"}:
            A = params.pop(names[name])
            turned = KEYS["R" if name == "A" else "S"][0]
            params[f"{path}.{turned}"] = rotation({"A": A.astype(np.float64)})[0].astype(A.dtype)
    return adapter.replace(params=params)


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = diag(s) W Mᵀ,   b′ = b      (what earlier adapters have added to the bias is scaled; of outputs turned, too)

    W Mᵀ, and of outputs M W = (Wᵀ Mᵀ)ᵀ.
    """
    R, back_R = rotation(φ)
    s, output = φ["s"], cfg.side == "output"
    V, vjp_V = inverse(W.T if output else W, R)
    V = V.T if output else V
    _, b0 = base or (W, b)

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        dV = Once(lambda: (s * dW1()).T if output else s * dW1())
        dW, dR = link(vjp_V, dV, 2)
        ds = Once(lambda: (dW1() * V).sum(1, keepdims=True))
        return Once(lambda: dW().T) if output else dW, {"s": ds, **back_R(dR)}

    own = None if b is None else 0 * b if b0 is None else b0
    b1 = b if b is b0 or b is None else as_dtype(own + s[:, 0] * moved(cfg, b - own, R), b)
    return as_dtype(s * V, W), b1, vjp


def inverse(x: Array, R: Array) -> tuple[Array, Vjp]:
    """y = x Mᵀ = x B₀ᵀ B₁ᵀ ⋯"""
    y, vjp = butterfly(x, R.swapaxes(2, 3), range(R.shape[0]))

    def back(dy: Array) -> tuple[Lazy, Lazy]:
        dx, dR = link(vjp, lambda: dy, 2)
        return dx, lambda: dR().swapaxes(2, 3)

    return y, back


def moved(cfg: Config, b: Array, R: Array) -> Array:
    """What earlier adapters have added to the bias is turned with the outputs."""
    return inverse(b, R)[0] if cfg.side == "output" else b


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = b + s ⊙ (f(x M) − b);      of outputs   y = b + s ⊙ ((f(x) − b) Mᵀ)"""
    return biased(part, after(φ, unbiased(part)) if cfg.side == "output" else turned(φ, unbiased(part)))


def turned(φ: Phi, f: Run) -> Run:
    """y = s ⊙ f(x M)"""

    def run(x: Array) -> tuple[Array, Back]:
        R, back_R = rotation(φ)
        s = φ["s"][:, 0]
        u, vjp = butterfly(x, R, range(R.shape[0])[::-1])
        h, back_f = f(as_dtype(u, x))

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            du, grads = back_f(Once(lambda: as_dtype(s * dy(), h)), want)
            dx, dR = link(vjp, Once(lambda: du().astype(u.dtype)) if narrows(u, x) else du, 2)
            ds = Once(lambda: rows(dy() * h).sum(0)[:, None])
            return dx, join(grads, φ.grads(want, {"s": ds, **back_R(dR)}))

        return as_dtype(s * h, h), back

    return run


def after(φ: Phi, f: Run) -> Run:
    """y = s ⊙ (f(x) Mᵀ)"""

    def run(x: Array) -> tuple[Array, Back]:
        R, back_R = rotation(φ)
        s = φ["s"][:, 0]
        h, back_f = f(x)
        u, vjp = inverse(h, R)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dh, dR = link(vjp, Once(lambda: s * dy().astype(u.dtype) if narrows(u, h) else s * dy()), 2)
            dx, grads = back_f(Once(lambda: as_dtype(dh(), h)), want)
            ds = Once(lambda: rows(dy() * u).sum(0)[:, None])
            return dx, join(grads, φ.grads(want, {"s": ds, **back_R(dR)}))

        return as_dtype(s * u, h), back

    return run
