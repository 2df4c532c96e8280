"""AdaLoRA: Adaptive budget allocation.      Zhang et al. 2023, arXiv 2303.10512, §3.1, eq. (3)-(4), and §3.2

    W′ = W + s P diag(Λ) Q,   b′ = b,   s = α/(r₀ + 10⁻⁵)         P [o, r], Λ [r, 1], Q [r, i];   r₀ = `init_r`
    y  = y₀ + s (Λ ⊙ (x̃ Qᵀ)) Pᵀ                                  y₀ = x Wᵀ + b;   x̃ = x ⊙ mask: dropout

like a singular value decomposition, of which P and Q are kept near to orthogonal by a term of the loss, `penalty`,

    R = λ · mean over all P and Q of ‖Pᵀ P − I‖ or ‖Q Qᵀ − I‖,    d‖Q Qᵀ − I‖ = 2 (Q Qᵀ − I) Q/‖Q Qᵀ − I‖

and whose singular values are set to zero where they matter least, over all K matrices of the model together:

    I(w) = |w ∂L/∂w|,   Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|            `importance`, (8)-(9)
    s(w) = Ī(w) Ū(w),   S_n = s(Λ_n) + mean_j s(P_jn) + mean_j s(Q_nj)                 `scores`, (7), (10)
    Λ_n ← Λ_n if S_n is among the b(t) largest of all, else 0                          `allocate`, (5)-(6)
    b(t) = K (r_T + (r₀ − r_T) (1 − (t − tᵢ)/(T − tᵢ − t_f))³) for tᵢ < t ≤ T − t_f    `budget`, (12)

r_T = `target_r`, tᵢ = `tinit`, t_f = `tfinal`, T = `total_step`. Before, b = K r₀; after, the choice is kept as it is.
Between, Λ is cut every `deltaT` steps only. P and Q are never cut, so that a singular value can come back.

With G = ∂L/∂W′:   dP = s G (diag(Λ) Q)ᵀ,   dΛ = s diag(Pᵀ G Qᵀ),   dQ = s diag(Λ) Pᵀ G,   dW = G.

Claims:
    AL1  Λ = 0 at init, hence W′ = W exactly; and dP = dQ = 0 there, they begin to move only after Λ.
    AL2  wrap ≡ merge: both forms give the same outputs and gradients (without dropout).
    AL3  Several adapters add up, in any order.
    AL4  It is a LoRA with α = s r whose factors are diag(Λ) Q and P.
    AL5  Triplets whose Λ is zero can be left out (`pruned`): s stays what it was, and so does the function.
    AL6  R = 0, and its gradient, where P and Q are orthogonal.
    AL7  b(t) falls from K r₀ to K r_T, and of the triplets as many stay as it says, if no two scores are equal.

`rank_pattern` says of each matrix which of its r₀ triplets are there; the others are in no file.

Where implementations differ:
    * The paper squares the norms in R and adds them up; its authors' code takes the mean of the norms, as HF peft does.
    * HF peft adds R to the loss only of a model that has a `task_type`, or is called through its tuner.
    * HF peft takes w after the step for I, and the gradient from before; so does `follow`. It has no answer where
      r₀ = r_T (kthvalue of k = 0); here nothing is cut.
    * There is no α/r: HF peft's α stands alone over r₀, or is r₀ if it is not above zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from refpeft.method import Base, Merged, Phi, Targets, Values, as_dtype, branch, masked
from refpeft.ops import Array, Vjp, is_half, linear, rows
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, link

if TYPE_CHECKING:
    from refpeft.adapter import Adapter

KEYS: Mapping[str, tuple[str | None, str | None]] = {
    "P": ("lora_B", None),
    "Λ": ("lora_E", None),
    "Q": ("lora_A", None),
}
FROZEN = ()
LEAVES = {n: f".{keys[0]}" for n, keys in KEYS.items()}
Named = Mapping[str, Array]


@dataclass(frozen=True)
class Config(Targets):
    """HF peft's AdaLoraConfig, as far as it has a meaning. `at(path)` is the same config with the rank of a module."""

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool = True
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - HF peft's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, Sequence[bool]] | None = None

    def __post_init__(self) -> None:
        for name in ("init_r", "target_r", "deltaT", "total_step"):
            v = getattr(self, name)
            if not (isinstance(v, int) and not isinstance(v, bool) and v > 0):
                raise ValueError(f"{name} must be a positive integer, found {v!r}")
        if self.target_r > self.init_r:
            raise ValueError(f"target_r must be at most init_r, {self.init_r}, found {self.target_r}")
        if not 0 <= self.tinit < self.steps - self.tfinal <= self.steps:
            raise ValueError(
                f"tinit and tfinal must leave some of {self.steps} steps, found {self.tinit}, {self.tfinal}"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be above 0 and below 1, found {getattr(self, name)!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', found {self.bias!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), found {self.lora_dropout!r}")
        if not self.orth_reg_weight >= 0:
            raise ValueError(f"orth_reg_weight must be 0 or more, found {self.orth_reg_weight!r}")
        for name, kept in (self.rank_pattern or {}).items():
            if not name.endswith(LEAVES["Λ"]) or len(kept) != self.init_r:
                wanted = f"be of a lora_E, and say of each of {self.init_r} triplets whether it is there"
                raise ValueError(f"rank_pattern[{name!r}] must {wanted}")

    def at(self, path: str) -> "Place":
        kept = (self.rank_pattern or {}).get(path + LEAVES["Λ"])
        return Place(self.init_r if kept is None else sum(kept), self.scale, self.init_lora_weights)

    @property
    def scale(self) -> float:
        """s = α/(r₀ + 10⁻⁵)"""
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    @property
    def steps(self) -> int:
        return self.total_step or 0


@dataclass(frozen=True)
class Place:
    """The config at one module: how many triplets there are, and s."""

    r: int
    scale: float
    init_lora_weights: bool = True


def shapes(cfg: Place, part: Part) -> dict[str, tuple[int, ...]]:
    """P [o, r], Λ [r, 1], Q [r, i]."""
    if part.kind == "embedding":
        raise ValueError(f"{part.path}: AdaLoRA is defined for linear layers, not for embeddings")
    o, i = part.W.shape
    return {"P": (o, cfg.r), "Λ": (cfg.r, 1), "Q": (cfg.r, i)}


def init(cfg: Place, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """P and Q from N(0, 0.02²), Λ = 0; with init_lora_weights=False all from N(0, 1)."""
    dtype = np.float32 if is_half(part.W.dtype) else part.W.dtype
    φ = {n: rng.normal(size=shape) for n, shape in shapes(cfg, part).items()}
    if cfg.init_lora_weights:
        φ = {"P": 0.02 * φ["P"], "Λ": 0 * φ["Λ"], "Q": 0.02 * φ["Q"]}
    return {n: v.astype(dtype) for n, v in φ.items()}


def merge(cfg: Place, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + s P diag(Λ) Q,   b′ = b."""
    s, P, Λ, Q = cfg.scale, φ["P"], φ["Λ"], φ["Q"]

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        PG = Once(lambda: s * (P.T @ dW1()))
        return dW1, {
            "P": Once(lambda: s * (dW1() @ (Λ * Q).T)),
            "Λ": Once(lambda: (PG() * Q).sum(1)[:, None]),
            "Q": Once(lambda: Λ * PG()),
        }

    return as_dtype(W + s * (P @ (Λ * Q)), W), b, vjp


def wrap(cfg: Place, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + s (Λ ⊙ (x̃ Qᵀ)) Pᵀ;      y₀ where no triplet is left"""
    return part if not cfg.r else branch(part, masked(triplets(cfg, φ), mask))


def triplets(cfg: Place, φ: Phi) -> Run:
    """z = s (Λ ⊙ u) Pᵀ,   u = x Qᵀ"""
    s, P, Λ, Q = cfg.scale, φ["P"], φ["Λ"][:, 0], φ["Q"]

    def run(x: Array) -> tuple[Array, Back]:
        u, vjp_u = linear(x, Q)
        z, vjp_z = linear(s * Λ * u, P)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dv, dP = link(vjp_z, dz, 2)
            dsu = Once(lambda: s * dv())
            dx, dQ = link(vjp_u, Once(lambda: Λ * dsu()), 2)
            dΛ = Once(lambda: rows(dsu() * u).sum(0)[:, None])
            return dx, φ.grads(want, {"P": dP, "Λ": dΛ, "Q": dQ})

        return z, back

    return run


# ── orthogonality ────────────────────────────────────────────────────────────────────────────────────────────────────


def orthogonality(Q: Array) -> tuple[Array, Vjp]:
    """y = ‖Q Qᵀ − I‖,   dQ = dy 2 (Q Qᵀ − I) Q/y, and 0 where y = 0.      Q [r, i]"""
    M = Q @ Q.T - np.eye(Q.shape[0], dtype=Q.dtype)
    y = np.sqrt((M * M).sum())
    return y, lambda dy: (lambda: dy * 2 * (M @ Q) / (y + (y.real == 0)),)


def penalty(cfg: Config, params: Named) -> tuple[Array, dict[str, Array]]:
    """R, and its gradients by name."""
    sides = {
        n: v.T if n.endswith(LEAVES["P"]) else v for n, v in params.items() if n.endswith((LEAVES["P"], LEAVES["Q"]))
    }
    λ = cfg.orth_reg_weight / max(len(sides), 1)
    total, grads = np.zeros(()), {}
    for n, v in sides.items():
        y, vjp = orthogonality(v)
        (dv,) = vjp(np.asarray(λ, v.dtype))
        assert dv is not None
        total = total + λ * y
        grads[n] = dv().T if n.endswith(LEAVES["P"]) else dv()
    return total, grads


# ── the budget ───────────────────────────────────────────────────────────────────────────────────────────────────────


def budget(cfg: Config, t: int, K: int) -> int:
    """b(t): how many of the K r₀ triplets of K matrices stay after step t, counted from 1."""
    first, last = cfg.init_r * K, cfg.target_r * K
    if t <= cfg.tinit:
        return first
    if t > cfg.steps - cfg.tfinal:
        return last
    left = 1 - (t - cfg.tinit) / (cfg.steps - cfg.tfinal - cfg.tinit)
    return int((first - last) * left**3 + last)


def importance(cfg: Config, params: Named, grads: Named, memory: Named) -> dict[str, Array]:
    """Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   I = |w ∂L/∂w|: 'ipt.<name>' and 'unc.<name>'."""
    found = {}
    for n in names(params):
        I = np.abs(params[n] * grads[n])  # noqa: E741
        ipt = cfg.beta1 * memory["ipt." + n] + (1 - cfg.beta1) * I
        found["ipt." + n] = ipt
        found["unc." + n] = cfg.beta2 * memory["unc." + n] + (1 - cfg.beta2) * np.abs(I - ipt)
    return found


def scores(memory: Named) -> dict[str, Array]:
    """S [r] of every matrix, by its path:   S_n = s(Λ_n) + mean_j s(P_jn) + mean_j s(Q_nj),   s = Ī Ū"""

    def s(name: str) -> Array:
        return memory["ipt." + name] * memory["unc." + name]

    paths = [n[4 : -len(LEAVES["Λ"])] for n in memory if n.startswith("ipt.") and n.endswith(LEAVES["Λ"])]
    return {p: s(p + LEAVES["Λ"])[:, 0] + s(p + LEAVES["P"]).mean(0) + s(p + LEAVES["Q"]).mean(1) for p in paths}


def allocate(S: Named, b: int) -> dict[str, Array]:
    """Which triplets stay, by the path of their matrix: those with at least as many below them as are too many. Of
    equals at the border none stays, as in HF peft."""
    every = np.concatenate([*S.values()])
    return {path: (every < v[:, None]).sum(1) >= every.shape[0] - b for path, v in S.items()}


def names(params: Named) -> list[str]:
    return [n for n in params if n.endswith(tuple(LEAVES.values()))]


# ── in training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def remembered(cfg: Config, params: Named) -> dict[str, Array]:
    """What goes from step to step: Ī = Ū = 0, and all triplets are there."""
    zeros = {f"{of}.{n}": np.zeros_like(params[n]) for of in ("ipt", "unc") for n in names(params)}
    return zeros | {"keep." + n: np.ones_like(params[n]) for n in params if n.endswith(LEAVES["Λ"])}


def follow(
    cfg: Config, t: int, params: Named, grads: Named, memory: Named
) -> tuple[dict[str, Array], dict[str, Array]]:
    """After step t of the optimiser, counted from 1: the parameters, Λ cut to the budget, and what is remembered. In a
    graph that is made for all steps t is known only when it runs."""
    last, memory = cfg.steps - cfg.tfinal, dict(memory)
    memory |= {n: np.where(t < last, v, memory[n]) for n, v in importance(cfg, params, grads, memory).items()}
    S = scores(memory)
    b = due(cfg, t, len(S))
    found = dict(params)
    for path, stays in allocate(S, b).items():
        n = path + LEAVES["Λ"]
        keep = np.where(b >= 0, stays[:, None].astype(params[n].dtype), memory["keep." + n])
        memory["keep." + n] = keep
        found[n] = np.where((b >= 0) | (t > last), params[n] * keep, params[n])
    return found, memory


def due(cfg: Config, t: int, K: int) -> int:
    """b(t) if step t cuts, else −1: one of a table, where t is not known."""
    if not isinstance(t, int | np.integer):
        table = [due(cfg, n, K) for n in range(cfg.steps + 2)]  # after the last step nothing is cut
        found: int = (np.zeros_like(t) + np.array(table))[np.minimum(t, cfg.steps + 1)]
        return found
    last = cfg.steps - cfg.tfinal
    cuts = t == last or (cfg.tinit < t < last and t % cfg.deltaT == 0)
    return budget(cfg, t, K) if cuts else -1


def finished(adapter: "Adapter", memory: Named) -> "Adapter":
    """What is saved after training: without the triplets that were cut."""
    kept = {n[len("keep.") :]: v[:, 0] != 0 for n, v in memory.items() if n.startswith("keep.")}
    return pruned(adapter, kept) if any(not v.all() for v in kept.values()) else adapter


def pruned(adapter: "Adapter", kept: Named) -> "Adapter":
    """The adapter with these triplets alone, by the names of Λ."""
    params = dict(adapter.params)
    for n, stays in kept.items():
        path = n.removesuffix(LEAVES["Λ"])
        for leaf, axis in (("P", 1), ("Λ", 0), ("Q", 0)):
            name = path + LEAVES[leaf]
            params[name] = np.compress(stays, params[name], axis)
    pattern = {n: [bool(k) for k in stays] for n, stays in kept.items()}
    return adapter.replace(params=params, config=replace(adapter.config, rank_pattern=pattern))
