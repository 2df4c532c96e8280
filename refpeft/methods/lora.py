"""LoRA: Low-Rank Adaptation.      Hu et al. 2021, arXiv 2106.09685, §4.1, eq. (3)

    W′ = W + s B A,   b′ = b + s β,   s = α/r            W [o, i], A [r, i], B [o, r], β [o] (only with `lora_bias`)
    y  = y₀ + s ((x ⊙ mask) Aᵀ Bᵀ + β)                   y₀ = x Wᵀ + b;   mask: dropout, on this branch only

    With G = ∂L/∂W′:   dA = s Bᵀ G,   dB = s G Aᵀ,   dβ = s db′,   dW = G.
    In the run-time form, with u = (x ⊙ mask) Aᵀ and dz = s dy:   dB = Σ dzᵀ u,   du = dz B,   dA = Σ duᵀ (x ⊙ mask).

Claims:
    L1  B = 0 at init, hence W′ = W exactly (also for orthogonal, where B A = 0, and pissa and olora, see below).
    L2  wrap ≡ merge: both forms give the same outputs and gradients (without dropout).
    L3  ΔW is linear in α; only s = α/r enters, never α or r alone.
    L4  Several adapters add up: W′ = W + Σ sₖ Bₖ Aₖ, in any order.
    L5  The layout of storage does not matter: Conv1D and embeddings get the transposed ΔW, A and B keep their shapes.

On an embedding, x is a one-hot row and W = Eᵀ: A is [r, v], B is [d, r], and ΔE = s (B A)ᵀ.

Where implementations differ:
    * The paper draws A from a Gaussian; loralib and HF peft use kaiming-uniform with a = √5, U(−1/√i, 1/√i), which is
      `init_lora_weights=True` here. On embeddings both zero A and draw B from N(0, 1); we follow.
    * β is scaled by s, in the forward as in the merge (HF peft before 0.16 forgot it in the merge).
    * pissa (Meng et al. 2024, arXiv 2404.02948, eq. (2)-(4)) and olora (Büyükakyüz 2024, arXiv 2406.01775) start from
      factors B₀ A₀ of W itself, and HF peft subtracts s B₀ A₀ from the base. Here the base stays what it is and the
      formula says the same thing:  W′ = W + s (B A − B₀ A₀),  with A₀, B₀ kept beside A, B and never trained.
      Saved, such an adapter becomes the plain LoRA of rank 2r that it is: A ← [A; A₀], B ← [B, −B₀], s unchanged.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from refpeft.hollow import hollow
from refpeft.method import Base, Merged, Phi, Targets, Values, as_dtype, at, branch, masked, together
from refpeft.ops import Array, is_half, linear
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, link

if TYPE_CHECKING:
    from refpeft.adapter import Adapter

# name in the formulae → key in checkpoints: of a linear or Conv1D layer, of an embedding
KEYS = {
    "A": ("lora_A.weight", "lora_embedding_A"),
    "B": ("lora_B.weight", "lora_embedding_B"),
    "β": ("lora_B.bias", None),
    "A0": ("lora_A0.weight", None),
    "B0": ("lora_B0.weight", None),
}
FROZEN = ("A0", "B0")
INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
FACTORS = ("pissa", "olora")  # those that start from factors of W


@dataclass(frozen=True)
class Config(Targets):
    """HF peft's LoraConfig, as far as it is LoRA. `at(path)` is the same config with the patterns applied."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    lora_bias: bool = False

    def __post_init__(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, r in ranks.items():
            if not (isinstance(r, int) and not isinstance(r, bool) and r > 0):
                raise ValueError(f"{name} must be a positive integer, found {r!r}")
        if self.init_lora_weights not in INITS:
            raise ValueError(f"init_lora_weights must be one of {INITS}, found {self.init_lora_weights!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', found {self.bias!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), found {self.lora_dropout!r}")

    def at(self, path: str) -> "Config":
        r, α = at(self.rank_pattern, path, self.r), at(self.alpha_pattern, path, self.lora_alpha)
        return replace(self, r=r, lora_alpha=α, rank_pattern={}, alpha_pattern={})

    @property
    def scale(self) -> float:
        """s = α/r;   rsLoRA: α/√r."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """A [r, i], B [o, r], and β [o], A₀ and B₀ where the config wants them."""
    (o, i), r, how = part.W.shape, cfg.r, cfg.init_lora_weights
    if part.kind == "embedding" and cfg.lora_bias:
        raise ValueError(f"{part.path}: lora_bias is not defined for an embedding, which has no bias")
    if part.kind == "embedding" and how in FACTORS:
        raise ValueError(f"{part.path}: init_lora_weights={how!r} is defined for linear layers, not for embeddings")
    if part.kind != "embedding" and how == "orthogonal" and r % 2:
        raise ValueError(f"{part.path}: init_lora_weights='orthogonal' needs an even rank, found {r}")
    if how in FACTORS and r > min(o, i):
        raise ValueError(f"{part.path}: init_lora_weights={how!r} needs r ≤ {min(o, i)}, found {r}")
    start: dict[str, tuple[int, ...]] = {"A0": (r, i), "B0": (o, r)} if how in FACTORS else {}
    return {"A": (r, i), "B": (o, r)} | start | ({"β": (o,)} if cfg.lora_bias else {})


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """A and B (and β = 0, A₀, B₀ where the config wants them) such that W′ = W; only `False` starts elsewhere."""
    shape, how = shapes(cfg, part), cfg.init_lora_weights
    (r, i), (o, _) = shape["A"], shape["B"]
    if part.kind == "embedding":
        φ = {"A": np.zeros((r, i)), "B": rng.normal(size=(o, r))}
        if how is False:
            φ["A"] = rng.normal(size=(r, i))
    elif how in FACTORS:
        A, B = factors(cfg, part.W)
        φ = {"A": A, "B": B, "A0": A.copy(), "B0": B.copy()}
    elif how == "orthogonal":
        Q, _ = np.linalg.qr(rng.normal(size=(r, r)))
        φ = {"A": (rng.normal(size=(i, r // 2)) @ Q[0::2]).T / 10, "B": rng.normal(size=(o, r // 2)) @ Q[1::2] / 10}
    else:
        A = rng.normal(0, 1 / r, (r, i)) if how == "gaussian" else kaiming(rng, (r, i))
        φ = {"A": A, "B": kaiming(rng, (o, r)) if how is False else np.zeros((o, r))}
    if cfg.lora_bias:
        φ["β"] = np.zeros(o)
    dtype = np.float32 if is_half(part.W.dtype) else part.W.dtype
    return {name: np.ascontiguousarray(v, dtype=dtype) for name, v in φ.items()}


def kept(adapter: "Adapter") -> "Adapter":
    """A ← [A; A₀], B ← [B, −B₀]: no more than their shapes."""
    params = dict(adapter.params)
    for name, start in adapter.frozen.items():
        full, axis = name.replace("0.weight", ".weight"), int(name.endswith("B0.weight"))
        a = params[full]
        shape = tuple(n + m if k == axis else n for k, (n, m) in enumerate(zip(a.shape, start.shape, strict=True)))
        params[full] = hollow(shape, a.dtype)
    return adapter.replace(params=params, frozen={})


def kaiming(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """U(−1/√i, 1/√i) for a matrix [o, i]: kaiming-uniform with a = √5."""
    return rng.uniform(-1, 1, shape) / math.sqrt(shape[1])


def factors(cfg: Config, W: Array) -> tuple[Array, Array]:
    """A₀ [r, i] and B₀ [o, r] of pissa, s B₀ A₀ = the best rank-r part of W; or of olora, B₀ A₀ = Q[:, :r] R[:r]."""
    W, r = W.astype(np.float64), cfg.r
    if cfg.init_lora_weights == "olora":
        Q, R = np.linalg.qr(W)
        return R[:r], Q[:, :r]
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:r] / cfg.scale)
    return root[:, None] * Vt[:r], U[:, :r] * root


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + s (B A − B₀ A₀),   b′ = b + s β."""
    s, β = cfg.scale, φ.get("β")
    W1 = as_dtype(W + ΔW(cfg, φ), W)
    b1 = b
    if β is not None:
        b1 = as_dtype(s * β if b is None else b + s * β, W)

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        return dW1, {**dΔW(cfg, φ, dW1), "β": Once(lambda: s * db1())}

    return W1, b1, vjp


def ΔW(cfg: Config, φ: Values | Phi) -> Array:
    """ΔW = s (B A − B₀ A₀)"""
    Δ = cfg.scale * (φ["B"] @ φ["A"])
    return Δ - cfg.scale * (φ["B0"] @ φ["A0"]) if φ.get("A0") is not None else Δ


def dΔW(cfg: Config, φ: Values | Phi, G: Lazy) -> dict[str, Lazy]:
    """dA = s Bᵀ G,   dB = s G Aᵀ"""
    s, A, B = cfg.scale, φ["A"], φ["B"]
    return {"A": Once(lambda: s * (B.T @ G())), "B": Once(lambda: s * (G() @ A.T))}


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + s ((x ⊙ mask) Aᵀ Bᵀ + β)"""
    return branch(part, masked(low_rank(cfg, φ, part), mask))


def low_rank(cfg: Config, φ: Phi, part: Part) -> Run:
    """z = s (x Aᵀ Bᵀ + β) − s x A₀ᵀ B₀ᵀ"""
    s, A, B, β = cfg.scale, φ["A"], φ["B"], φ.get("β")

    def run(x: Array) -> tuple[Array, Back]:
        u, vjp_u = part.matmul(x, A)
        z, vjp_z = linear(s * u, B, None if β is None else s * β)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dsu, dB, *dsβ = link(vjp_z, dz, 2 if β is None else 3)
            dx, dA = link(vjp_u, Once(times, s, dsu), 2)
            dβ = {} if β is None else {"β": Once(times, s, dsβ[0])}
            return dx, φ.grads(want, {"A": dA, "B": dB} | dβ)

        return z, back

    A0, B0 = φ.get("A0"), φ.get("B0")
    return run if A0 is None or B0 is None else together(run, low_rank(cfg, Phi({"A": A0, "B": -B0}, {}), part))


def times(s: float, d: Lazy) -> Array:
    return s * d()
