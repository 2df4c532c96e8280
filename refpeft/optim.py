"""Optimisers, learning-rate schedules and gradient clipping, as pure functions.

    state = adam_init(params)
    params, state = adam(params, grads, state, lr=1e-3)

`params`, `grads` and `state` map names to arrays and are never written into, so a state can be kept, compared, saved
and gone back to. The step number n is in the state ('step', an integer []); moments are '<letter>.<parameter>'. `lr`
and `weight_decay` are numbers, or map every parameter's name to its own. A parameter without a gradient stays.
SGD, Adam and clipping take arrays of a type of one's own for all of these, as the ops do (`refpeft.ops`): so a step is
exported, learning rate and all.

The formulae are those of torch.optim and transformers.optimization, step for step. p is a parameter, g its gradient,
η the learning rate, λ the weight decay. 16-bit parameters are updated in float32, where their moments are kept too.

Claims:
    O1  Nothing given is written into; the same arguments give the same bits.
    O2  Parameters are independent: updating two at once is updating each alone (Adafactor's RMS is per tensor).
    O3  Adam's first step is −η g/(|g| + ε): of size η, whatever the size of g (without weight decay).
    O4  AdamW with λ = 0 is Adam with λ = 0; sgd with μ = 0 is p − η g.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refpeft.ops import Array, is_half

Named = dict[str, Array]
Params = Mapping[str, Array]
Rate = float | Mapping[str, float]
Updated = tuple[Named, Named]


def of(rate: Rate, name: str) -> float:
    return rate[name] if isinstance(rate, Mapping) else rate


def beside(x: Any, a: Array) -> Any:
    """A number such that it does not widen the array that it is multiplied with."""
    return float(x) if isinstance(x, int | float | np.generic) else x.astype(a.dtype)


def wide(a: Array) -> Array:
    """16 bits are computed in 32."""
    return a.astype(np.float32) if is_half(a.dtype) else a


def zeros(params: Params, *letters: str) -> Named:
    """The state before the first step: moments of nothing."""
    moments = {f"{letter}.{name}": np.zeros_like(wide(p)) for letter in letters for name, p in params.items()}
    return {"step": np.array(0), **moments}


def each(params: Params, grads: Params, state: Params, update: Callable[[str, Array, Array, Any], Updated]) -> Updated:
    """All parameters by one rule: `update(name, p, g, n)` gives the new p and the entries of the state that change; n
    is the number of the step [], from 1 on."""
    if unknown := grads.keys() - params.keys():
        raise ValueError(f"there is a gradient for {min(unknown)!r}, which is not a parameter")
    n = (state["step"].reshape(1) + 1).reshape(())  # an array still
    new, kept = dict(params), {**state, "step": n}
    number = int(n) if isinstance(n, np.ndarray) else n
    for name, g in grads.items():
        if g.shape != params[name].shape:
            raise ValueError(f"the gradient of {name!r} must have shape {params[name].shape}, found {g.shape}")
        one, moments = update(name, wide(params[name]), wide(g), number)
        new[name] = one[name].astype(params[name].dtype, copy=False)
        kept |= moments
    return new, kept


# ── SGD ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sgd_init(params: Params) -> Named:
    return zeros(params, "m")


def sgd(
    params: Params, grads: Params, state: Params, lr: Rate = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
    weight_decay: Rate = 0.0, nesterov: bool = False,
) -> Updated:  # fmt: skip
    """g ← g + λ p;   m ← μ m + (1 − d) g  (m ← g at the first step);   p ← p − η m,  Nesterov: p − η (g + μ m).

    Sutskever et al. 2013 as torch.optim.SGD reads it: η multiplies m and is not part of it. μ: momentum, d: dampening.
    """
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")

    def update(name: str, p: Array, g: Array, n: Any) -> Updated:
        η, λ = of(lr, name), of(weight_decay, name)
        g = g + beside(λ, p) * p
        m = np.where(n == 1, g, momentum * state[f"m.{name}"] + (1 - dampening) * g)
        d = g + momentum * m if nesterov else m if momentum else g
        return {name: p - beside(η, p) * d}, {f"m.{name}": m}

    return each(params, grads, state, update)


# ── Adam ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def adam_init(params: Params) -> Named:
    return zeros(params, "m", "v")


def correction(β: float, n: Any) -> Any:
    """1 − βⁿ = 2t/(1 + t),   t = tanh(−½ n ln β):   without a difference of near numbers, so 32 bits do for it.

    A graph's n has 32 bits here: runtimes for the web have no others.
    """
    if β == 0:
        return 1.0
    t = np.tanh(-0.5 * math.log(β) * (n if isinstance(n, int) else n.astype(np.float32)))
    return 2 * t / (1 + t)


def adam(
    params: Params, grads: Params, state: Params, lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, weight_decay: Rate = 0.0, decoupled: bool = False,
) -> Updated:  # fmt: skip
    """g ← g + λ p;   m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²;   p ← p − η m̂/(√v̂ + ε)

    with m̂ = m/(1 − β₁ⁿ), v̂ = v/(1 − β₂ⁿ).      Kingma & Ba 2015, arXiv 1412.6980, algorithm 1
    `decoupled` is `adamw`. Where implementations differ: the paper's faster form (§2, end) divides by √v + ε̂ before
    the correction, which makes ε another number; torch, and this, add ε to √v̂.
    """
    β1, β2 = betas

    def update(name: str, p: Array, g: Array, n: Any) -> Updated:
        η, λ = of(lr, name), of(weight_decay, name)
        if decoupled:
            p = p * beside(1 - η * λ, p)
        else:
            g = g + beside(λ, p) * p
        m = β1 * state[f"m.{name}"] + (1 - β1) * g
        v = β2 * state[f"v.{name}"] + (1 - β2) * (g * g)
        denominator = np.sqrt(v) / beside(np.sqrt(correction(β2, n)), p) + eps
        return {name: p - beside(η / correction(β1, n), p) * m / denominator}, {f"m.{name}": m, f"v.{name}": v}

    return each(params, grads, state, update)


def adamw(
    params: Params, grads: Params, state: Params, lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, weight_decay: Rate = 1e-2,
) -> Updated:  # fmt: skip
    """p ← p − η λ p, then Adam's step without λ.      Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2

    Where implementations differ: in the paper λ is not multiplied by η (only by the schedule's factor); in torch,
    transformers and this it is.
    """
    return adam(params, grads, state, lr, betas, eps, weight_decay, decoupled=True)


# ── Adafactor ────────────────────────────────────────────────────────────────────────────────────────────────────────


def adafactor_init(params: Params, beta1: float | None = None) -> Named:
    """Of a matrix, the second moments of rows and columns only: R [… a], C [… b] for p [… a, b]."""
    state = zeros(params) if beta1 is None else zeros(params, "m")
    for name, a in params.items():
        p = wide(a)
        if p.ndim >= 2:
            state[f"R.{name}"] = np.zeros_like(p, shape=p.shape[:-1])
            state[f"C.{name}"] = np.zeros_like(p, shape=(*p.shape[:-2], p.shape[-1]))
        else:
            state[f"v.{name}"] = np.zeros_like(p)
    return state


def adafactor(
    params: Params, grads: Params, state: Params, lr: Rate | None = None, eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0, decay_rate: float = -0.8, beta1: float | None = None, weight_decay: Rate = 0.0,
    scale_parameter: bool = True, relative_step: bool = True, warmup_init: bool = False,
) -> Updated:  # fmt: skip
    """u ← g/√v̂;   u ← u/max(1, RMS(u)/d);   p ← p − α u.      Shazeer & Stern 2018, arXiv 1804.04235, alg. 4 and 5

    with β̂₂ = 1 − n^decay_rate, and with s = g² + ε₁ and means over a matrix's rows (R) and columns (C)
        R ← β̂₂ R + (1 − β̂₂) mean_b s,   C ← β̂₂ C + (1 − β̂₂) mean_a s,   v̂ = R Cᵀ/mean R
    or v̂ = v ← β̂₂ v + (1 − β̂₂) s for a vector. The step α = ρ max(ε₂, RMS(p)) (without `scale_parameter`: α = ρ), where
    ρ = η, or with `relative_step` ρ = min(10⁻², 1/√n), with `warmup_init` min(10⁻⁶ n, 1/√n).

    Where implementations differ: as in transformers, β₁ averages α u (the paper's §5 drops momentum), and weight decay
    takes away λ α p, of the old p.
    """
    if relative_step and lr is not None:
        raise ValueError("lr must be None with relative_step, which makes its own")
    if not relative_step and (lr is None or warmup_init):
        raise ValueError("without relative_step, lr must be given and warmup_init be False")

    def second_moment(name: str, g: Array, β2: float) -> tuple[Array, Named]:
        """1/√v̂, and the moments."""
        s = g * g + eps[0]
        if g.ndim < 2:
            v = β2 * state[f"v.{name}"] + (1 - β2) * s
            return 1 / np.sqrt(v), {f"v.{name}": v}
        R = β2 * state[f"R.{name}"] + (1 - β2) * s.mean(-1)
        C = β2 * state[f"C.{name}"] + (1 - β2) * s.mean(-2)
        r = 1 / np.sqrt(R / R.mean(-1, keepdims=True))
        return r[..., :, None] * (1 / np.sqrt(C))[..., None, :], {f"R.{name}": R, f"C.{name}": C}

    def update(name: str, p: Array, g: Array, n: int) -> Updated:
        ρ = min(1e-6 * n if warmup_init else 1e-2, 1 / math.sqrt(n)) if lr is None else of(lr, name)
        α = ρ * max(eps[1], rms(p)) if scale_parameter else ρ
        u, moments = second_moment(name, g, 1 - n**decay_rate)
        u = u * g
        u = α * (u / max(1.0, rms(u) / clip_threshold))
        if beta1 is not None:
            u = moments[f"m.{name}"] = beta1 * state[f"m.{name}"] + (1 - beta1) * u
        return {name: p - of(weight_decay, name) * α * p - u}, moments

    return each(params, grads, state, update)


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x * x)))


# ── schedules: the factor of the learning rate at step n = 0, 1, …, with w steps of warm-up out of N ─────────────────


def constant(n: int, warmup: int = 0, total: int = 0) -> float:
    """n/w while n < w, then 1.      transformers: get_constant_schedule_with_warmup"""
    return n / max(1, warmup) if n < warmup else 1.0


def linear(n: int, warmup: int, total: int) -> float:
    """n/w while n < w, then (N − n)/(N − w), at least 0.      transformers: get_linear_schedule_with_warmup"""
    return n / max(1, warmup) if n < warmup else max(0.0, (total - n) / max(1, total - warmup))


def cosine(n: int, warmup: int, total: int, cycles: float = 0.5) -> float:
    """n/w while n < w, then ½ (1 + cos 2π c (n − w)/(N − w)).      transformers: get_cosine_schedule_with_warmup

    Loshchilov & Hutter 2017, arXiv 1608.03983, eq. (5), of one period; c = ½ goes down once.
    """
    if n < warmup:
        return n / max(1, warmup)
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * cycles * (n - warmup) / max(1, total - warmup))))


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Named, Any]:
    """g ← g min(1, c/(‖g‖ + 10⁻⁶)),   ‖g‖² = Σ over all tensors.      Pascanu et al. 2013, arXiv 1211.5063, algorithm 1

    Returns the gradients and ‖g‖ before. As torch.nn.utils.clip_grad_norm_, whose 10⁻⁶ the paper does not have.
    """
    squares = [np.vdot(wide(g), wide(g)) for g in grads.values()]
    norm = np.sqrt(sum(x.real.astype(np.float64) if isinstance(x, np.generic) else x for x in squares))
    factor = np.minimum(1.0, max_norm / (norm + 1e-6))
    return {n: (wide(g) * beside(factor, wide(g))).astype(g.dtype, copy=False) for n, g in grads.items()}, norm


def accumulate(parts: Sequence[tuple[float, Params]]) -> Named:
    """g = Σₖ wₖ gₖ/Σₖ wₖ:   the gradient of a batch from those of its parts, wₖ the number of terms in each mean.

    This is the gradient of all parts in one batch. Where implementations differ: transformers before 4.46 took every
    wₖ = 1, which weighs a token by how few others its part holds.
    """
    total = sum(w for w, _ in parts) or 1.0
    found: Named = {}
    for w, grads in parts:
        for name, g in grads.items():
            term = (w / total) * g
            found[name] = found[name] + term if name in found else term
    return found


# ── LoRA+ ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def loraplus(
    params: Params, lr: float, ratio: float, weight_decay: float = 0.0, lr_embedding: float = 1e-6,
    norms: Sequence[str] = (),
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """η_B = ratio · η_A.      LoRA+: Hayou et al. 2024, arXiv 2402.12354, §3-4; groups as in HF peft

    Every parameter's own learning rate and weight decay, by name:
        factors of embeddings         lr_embedding     weight_decay
        B, and all vectors            lr · ratio       weight_decay; none for biases and in `norms` (modules' paths)
        all else, so A                lr               weight_decay
    """
    rates: dict[str, float] = {}
    decays: dict[str, float] = {}
    for name, p in params.items():
        fast = "lora_B" in name or p.ndim == 1
        embedding = name.endswith((".lora_embedding_A", ".lora_embedding_B"))
        rates[name] = lr_embedding if embedding else lr * ratio if fast else lr
        bare = fast and not embedding and ("bias" in name or name.rpartition(".")[0] in norms)
        decays[name] = 0.0 if bare else weight_decay
    return rates, decays
