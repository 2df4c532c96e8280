"""OFT: orthogonal fine-tuning.      Qiu et al. 2023, arXiv 2306.07280, §3.1-3.3, eq. (2)-(3)

    W′ = W diag(R₁, …, R_n)ᵀ,   b′ = b        R_k [p, p], p n = i;   Q_k = skew(v_k), v [n, p (p − 1)/2]
    y  = f(x diag(R₁, …, R_n))                f: the layer; R = (I + Q)(I − Q)⁻¹, Cayley's transform
    R ≈ I + 2 Q + … + 2 Q^(t−2) + Q^(t−1)     with `use_cayley_neumann`, t terms (arXiv 2506.19847, §4.2)

With G = ∂L/∂W′ in blocks of columns:   dR_k = G_kᵀ W_k,   dQ = (I − Q)⁻ᵀ dR (I + R)ᵀ,   dv_ij = dQ_ij − dQ_ji,
dW_k = G_k R_k.

The paper writes z = (R W)ᵀ x with W [i, o]: what is turned are the neurons, by a rotation of the inputs. With
`block_share` there is one R for all blocks. A p that does not divide i becomes the nearest divisor.
With `side="output"`, and on an embedding, outputs are turned:   W′ = diag(R)ᵀ W,   y = b + (f(x) − b) diag(R).

Claims:
    OF1  v = 0 at init, hence R = I and W′ = W exactly.
    OF2  wrap ≡ merge: both forms give the same outputs and gradients.
    OF3  The exact R is orthogonal and det R = 1: norms of and angles between neurons (rows of W) stay as they are.
    OF4  −v turns back: R(−v) = R(v)⁻¹. So −v on top of v restores W, to rounding.
    OF5  The exact R less the series is R Q^(t−1): of the order of ‖Q‖^(t−1).
    OF6  Several adapters compose in order, W′ = W R₁ᵀ R₂ᵀ: each turns the inputs of what is there. The order matters.
    OF7  With one block for all, its gradient is the sum of what each block would have.

Where implementations differ:
    * HF peft's series is that of (I + Q)(I − Q)⁻¹, the paper's; its exact form (`use_cayley_neumann=False`) is
      (I − Q)(I + Q)⁻¹, which turns the other way: one checkpoint, two models. Here both are the paper's; in a folder of
      HF peft's, v is −v where the exact form is meant, so that its function is the same.
    * HF peft takes 3 terms as 4, and has I + 2 Q for 2. Here there are 4 at least.
    * Running, HF peft applies the first adapter first, x R₁ R₂, hence W R₂ᵀ R₁ᵀ; merged it has W R₁ᵀ R₂ᵀ.
    * HF peft's `coft` clips Q in every forward pass, in place, and its gradient is that of no clipping; it is refused.
    * LyCORIS turns outputs (`side="output"`), with Q = B − Bᵀ of full matrices B, in float32; in its bypass mode the
      bias is turned too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refpeft import delta
from refpeft.method import Base, Merged, Phi, Targets, Values, as_dtype, narrows
from refpeft.methods.dora import biased, unbiased
from refpeft.ops import Array
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, join, link
from refpeft.rotations import cayley, cayley_series, rotate, skew

if TYPE_CHECKING:
    from refpeft.adapter import Adapter

# v of the inputs, u of the outputs; R and S: these rotations themselves, in a graph that needs no more
KEYS = {
    "v": ("oft_R.weight", None),
    "u": ("oft_out_R.weight", "oft_embedding_R.weight"),
    "R": ("oft_R.rotation", None),
    "S": ("oft_out_R.rotation", "oft_embedding_R.rotation"),
}
FROZEN = ()
SIDES = ("input", "output")


@dataclass(frozen=True)
class Config(Targets):
    """HF peft's OFTConfig, without `coft` and dropout; `side` is this specification's own. One of `r`, the number of
    blocks, and `oft_block_size` is given, the other is 0."""

    r: int = 0
    oft_block_size: int = 32
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    block_share: bool = False
    init_weights: bool = True
    fan_in_fan_out: bool = False
    bias: str = "none"
    side: str = "input"

    def __post_init__(self) -> None:
        if (self.r > 0) == (self.oft_block_size > 0) or min(self.r, self.oft_block_size) < 0:
            found = f"r={self.r!r}, oft_block_size={self.oft_block_size!r}"
            raise ValueError(f"one of r and oft_block_size must be a positive integer and the other 0, found {found}")
        if self.num_cayley_neumann_terms < 4:
            raise ValueError(f"num_cayley_neumann_terms must be at least 4, found {self.num_cayley_neumann_terms!r}")
        if self.bias not in ("none", "all", "oft_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'oft_only', found {self.bias!r}")
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {SIDES}, found {self.side!r}")

    def at(self, path: str) -> "Config":
        return self


def turned_side(cfg: Config, part: Part) -> str:
    return "output" if part.kind == "embedding" else cfg.side


def nearest_divisor(n: int, size: int) -> int:
    """The divisor of n nearest to a size; of two, the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - size), d))


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """v or u [n, p (p − 1)/2]"""
    output = turned_side(cfg, part) == "output"
    d = part.W.shape[0 if output else 1]
    p = nearest_divisor(d, cfg.oft_block_size) if cfg.oft_block_size else d // nearest_divisor(d, cfg.r)
    return {"u" if output else "v": (1 if cfg.block_share else d // p, p * (p - 1) // 2)}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """v = 0, hence R = I; with `init_weights=False` from N(0, 0.1)."""
    φ = {n: rng.normal(0, 0.1, shape) for n, shape in shapes(cfg, part).items()}
    return delta.typed({n: v * (not cfg.init_weights) for n, v in φ.items()}, part)


def rotation(cfg: Config, φ: Values | Phi) -> tuple[Array, delta.BackΔ]:
    """R = cayley(skew(v)), and from dR to dv; or the rotation that is given."""
    given = next((n for n in ("R", "S") if φ.get(n) is not None), None)
    if given:
        return φ[given], lambda dR: {given: dR}
    name = "u" if φ.get("u") is not None else "v"
    Q, vjp_Q = skew(φ[name])
    R, vjp_R = cayley_series(Q, terms=cfg.num_cayley_neumann_terms) if cfg.use_cayley_neumann else cayley(Q)
    return R, lambda dR: {name: link(vjp_Q, link(vjp_R, dR, 1)[0], 1)[0]}


def rotations(adapter: "Adapter") -> "Adapter":
    """The same function, with the rotations themselves in place of what they are made from, one for each block."""
    params = dict(adapter.params)
    for path, (names, _) in adapter.by_module.items():
        for name in names.keys() & {"u", "v"}:
            wide = params.pop(names[name]).astype(np.float64)
            R, _ = rotation(adapter.at(path), {name: wide})
            key = KEYS["R" if name == "v" else "S"]
            turned = next(k for k in key if k and k.partition(".")[0] in names[name])
            params[f"{path}.{turned}"] = R.astype(adapter.params[names[name]].dtype)
    return adapter.replace(params=params)


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W diag(R)ᵀ,   b′ = b;      of outputs   W′ = diag(R)ᵀ W,   b′ = b₀ + (b − b₀) diag(R), b₀ of the base"""
    R, back_R = rotation(cfg, φ)
    output = any(n in φ for n in ("u", "S"))
    V, vjp_V = rotate(W.T, R) if output else rotate(W, R.swapaxes(1, 2))
    _, b0 = base or (W, b)

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        dW, dR = link(vjp_V, Once(lambda: dW1().T) if output else dW1, 2)
        if output:
            return Once(lambda: dW().T), back_R(dR)
        return dW, back_R(Once(lambda: dR().swapaxes(1, 2)))

    b1 = b if b is b0 or b is None or not output else moved(b, b0, R)
    return as_dtype(V.T if output else V, W), b1, vjp


def moved(b: Array, b0: Array | None, R: Array) -> Array:
    """What earlier adapters have added to the bias is turned, the base's own is not."""
    own = 0 * b if b0 is None else b0
    return as_dtype(own + rotate(b - own, R)[0], b)


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = f(x diag(R));      of outputs   y = b + (f(x) − b) diag(R)"""
    if turned_side(cfg, part) == "output":
        return biased(part, after(cfg, φ, unbiased(part)))
    return part.wrapped(before(cfg, φ, part.run))


def before(cfg: Config, φ: Phi, f: Run) -> Run:
    """y = f(x diag(R))"""

    def run(x: Array) -> tuple[Array, Back]:
        R, back_R = rotation(cfg, φ)
        u, vjp = rotate(x, R)
        y, back_f = f(as_dtype(u, x))

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            du, grads = back_f(dy, want)
            dx, dR = link(vjp, Once(lambda: du().astype(u.dtype)) if narrows(u, x) else du, 2)
            return dx, join(grads, φ.grads(want, back_R(dR)))

        return y, back

    return run


def after(cfg: Config, φ: Phi, f: Run) -> Run:
    """y = f(x) diag(R)"""

    def run(x: Array) -> tuple[Array, Back]:
        R, back_R = rotation(cfg, φ)
        h, back_f = f(x)
        y, vjp = rotate(h, R)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dh, dR = link(vjp, Once(lambda: dy().astype(y.dtype)) if narrows(y, h) else dy, 2)
            dx, grads = back_f(dh, want)
            return dx, join(grads, φ.grads(want, back_R(dR)))

        return as_dtype(y, h), back

    return run
