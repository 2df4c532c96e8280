"""Several LoRA adapters made into one.      As HF peft's `add_weighted_adapter` defines it, layer by layer

With cₖ = wₖ sₖ, the weight of an adapter times its scale, and the new adapter's scale 1 (α = r; rsLoRA: α = √r):

    cat      A = [c₁ A₁; c₂ A₂; …],   B = [B₁, B₂, …]                           r = Σ rₖ
    linear   A = Σ sign(cₖ) √|cₖ| Aₖ,   B = Σ √|cₖ| Bₖ                          r = rₖ, the same for all
    svd      U S Vᵀ = Σ wₖ ΔWₖ,   A = Vᵀ[:r],   B = (U S)[:, :r]                r = max rₖ, or `rank`

The others replace the sum Σ wₖ Tₖ by another of the same tensors and weights: of A and B, as in `linear`, or, with
`_svd` at the end of their names, of ΔWₖ, as in `svd`.

    magnitude_prune   Σ wₖ top(Tₖ)                       top: the ⌊d n⌋ of n entries with the largest magnitudes, else 0
    ties              Σ wₖ τₖ ⊙ [sign τₖ = γ] / n        τₖ = top(Tₖ);   γ = sign Σ τₖ, + where that is 0 ('total'), or
                                                         sign Σ sign τₖ ('frequency');   n = how many agree, at least 1
    dare_linear       Σ wₖ Tₖ ⊙ mₖ / d                   mₖ: a mask of zeros and ones, 1 with probability d
    dare_ties         ties of τₖ = Tₖ ⊙ mₖ / d

d is the `density`. The masks are arguments. One adapter alone is `linear`, whatever was asked for. An adapter that does
not adapt a layer is left out there; where `cat` has rows to spare then, they are zero.

`average` is another function: of adapters of any method that have one config, every tensor is θ = Σ wₖ θₖ. That is what
AdapterHub's `average_adapter` calls linear, and HF peft's weighted sum of (IA)³.

TIES: Yadav et al. 2023, arXiv 2306.01708, §4;   DARE: Yu et al. 2023, arXiv 2311.03099, eq. (1)-(4).

Claims:
    CO1  cat is the weighted sum:   ΔW = Σ wₖ ΔWₖ;   so is svd, where the rank suffices.
    CO2  linear is it for one adapter, or where all but one have weight 0. Else it has cross terms Bⱼ Aₖ.
    CO3  Weight 0 takes an adapter out of cat, linear and svd; weight −w subtracts what w adds.
    CO4  d = 1 prunes nothing: magnitude_prune and dare_linear are linear, with `_svd` they are svd.
    CO5  Where DARE keeps an entry, it is the original over d.
    CO6  An average is linear in the tensors: with weights 1 and 0 it is the first. What it does to ΔW = s B A has
         cross terms, (Σ wⱼ Bⱼ)(Σ wₖ Aₖ), so that weight −1 alone changes nothing; of (IA)³ it is the average of l.

Where implementations differ:
    * The papers prune ΔW (task vectors of whole models); on A and B each for itself, signs and magnitudes are of
      factors, which are not unique: B A = (B R)(R⁻¹ A).
    * TIES scales the mean of those that agree; HF peft's weights stand inside the mean, and elect no sign.
    * For rsLoRA, HF peft has α = r, and with it the scale √r instead of 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.ops import Array

PLAIN = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
HOW = ("cat", "svd", *PLAIN, *(f"{name}_svd" for name in PLAIN[1:]))
Mask = Callable[[int, str, Array], Array]  # of which adapter, of which tensor, which is this one
Sum = Callable[[Sequence[Array], Sequence[float], Sequence[int], str], Array]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: str,
    density: float = 1.0,
    sign: str = "total",
    rank: int | None = None,
    mask: Mask | None = None,
) -> Adapter:
    """One adapter for Σ wₖ ΔWₖ, or what `how` makes of it. mask(k, name, T): mₖ for the tensor T of this name, which
    for ΔW is the path of its layer."""
    check(adapters, weights, how, density)
    how = "linear" if len(adapters) == 1 else how
    summed = summing(how.removesuffix("_svd") if how != "svd" else "linear", density, sign, mask)
    ranks = [max([a.config.r, *a.config.rank_pattern.values()]) for a in adapters]
    if how in PLAIN and len(set(ranks)) > 1:
        raise ValueError(f"{how} needs adapters of one rank, found {ranks}")
    r = sum(ranks) if how == "cat" else (rank or max(ranks)) if how.endswith("svd") else ranks[0]
    params: dict[str, Array] = {}
    for path in dict.fromkeys(path for a in adapters for path in a.by_module):
        there = [k for k, a in enumerate(adapters) if path in a.by_module]
        A, B = factors([layer(adapters[k], path) for k in there], [weights[k] for k in there], there, how, r, summed)
        name = adapters[there[0]].by_module[path][0]
        params |= {name["A"]: A, name["B"]: B}
    return adapters[0].replace(config=config(adapters, r), params=params)


def average(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """θ = Σ wₖ θₖ of every tensor that is trained; all else is the first one's."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, found {len(weights)}")
    first = adapters[0]
    for a in adapters:
        if (a.method, a.config) != (first.method, first.config):
            raise ValueError("an average is of adapters of one method with one config, and these differ")
    terms = {n: [w * a.params[n] for w, a in zip(weights, adapters, strict=True)] for n in first.params}
    return first.replace(params={n: np.asarray(sum(t), first.params[n].dtype) for n, t in terms.items()})


def check(adapters: Sequence[Adapter], weights: Sequence[float], how: str, density: float) -> None:
    """What cannot be combined is an error."""
    if how not in HOW:
        raise ValueError(f"unknown combination {how!r}: there are {', '.join(HOW)}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, found {len(weights)}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], found {density!r}")
    for a in adapters:
        if a.method not in ("lora", "rslora"):
            raise ValueError(f"{how} is a sum of ΔW = s B A, which {a.method} is not")
        other = next((n for table in a.by_module.values() for n in (*table[1].values(), *named(table[0]))), None)
        if other:
            raise ValueError(f"{how} is a sum of ΔW = s B A, found {other} besides A and B")


def named(φ: dict[str, str]) -> list[str]:
    return [name for short, name in φ.items() if short not in "AB"]


def config(adapters: Sequence[Adapter], r: int) -> Any:
    """That of the first, with all targets, and the scale 1."""
    first = adapters[0].config
    targets = sorted({name for a in adapters for name in a.config.target_modules})
    α = math.sqrt(r) if first.use_rslora else r
    return replace(first, r=r, lora_alpha=α, target_modules=targets, rank_pattern={}, alpha_pattern={})


Layer = tuple[float, Array, Array, str, str, str]  # s, A, B; the names of A and B; the path


def layer(a: Adapter, path: str) -> Layer:
    name = a.by_module[path][0]
    return a.at(path).scale, a.params[name["A"]], a.params[name["B"]], name["A"], name["B"], path


def factors(
    layers: Sequence[Layer], w: Sequence[float], which: Sequence[int], how: str, r: int, summed: Sum
) -> tuple[Array, Array]:
    """A [r, i] and B [o, r] of one layer."""
    s, A, B, named_A, named_B, paths = zip(*layers, strict=True)
    c = [wₖ * sₖ for wₖ, sₖ in zip(w, s, strict=True)]
    if how == "cat":
        A1 = np.concatenate([cₖ * Aₖ for cₖ, Aₖ in zip(c, A, strict=True)], 0)
        spare = r - len(A1)
        return np.pad(A1, ((0, spare), (0, 0))), np.pad(np.concatenate(B, 1), ((0, 0), (0, spare)))
    if how.endswith("svd"):
        ΔW = summed([sₖ * (Bₖ @ Aₖ) for sₖ, Aₖ, Bₖ in zip(s, A, B, strict=True)], w, which, paths[0])
        U, S, Vt = np.linalg.svd(ΔW, full_matrices=False)
        return np.ascontiguousarray(Vt[:r]), U[:, :r] * S[:r]
    if len({len(Aₖ) for Aₖ in A}) > 1:
        raise ValueError(f"{how} needs adapters of one rank, found {[len(Aₖ) for Aₖ in A]} at {paths[0]}")
    root = [math.sqrt(abs(cₖ)) for cₖ in c]
    signed = [math.copysign(x, cₖ) for x, cₖ in zip(root, c, strict=True)]
    return summed(A, signed, which, named_A[0]), summed(B, root, which, named_B[0])


# ── sums of tensors ──────────────────────────────────────────────────────────────────────────────────────────────────


def summing(how: str, density: float, sign: str, mask: Mask | None) -> Sum:
    """Σ wₖ Tₖ, or what stands in its place."""

    def dropped(k: int, name: str, T: Array) -> Array:
        if density == 1:
            return T
        if mask is None:
            raise ValueError(f"{how} with a density below 1 needs masks")
        return T * mask(k, name, T) / density

    def summed(T: Sequence[Array], w: Sequence[float], which: Sequence[int], name: str) -> Array:
        τ = list(T)
        if how in ("magnitude_prune", "ties"):
            τ = [top(t, density) for t in T]
        elif how.startswith("dare"):
            τ = [dropped(k, name, t) for k, t in zip(which, T, strict=True)]
        agree = elected(τ, sign) if how.endswith("ties") else np.ones((len(τ), *T[0].shape), bool)
        total = sum(wₖ * t * m for wₖ, t, m in zip(w, τ, agree, strict=True))
        mean = total / np.maximum(agree.sum(0), 1) if how.endswith("ties") else total
        return np.asarray(mean, T[0].dtype)

    return summed


def top(T: Array, density: float) -> Array:
    """The ⌊d n⌋ entries with the largest magnitudes, and zeros for the others."""
    kept = np.zeros(T.size, bool)
    kept[np.argsort(-np.abs(T).reshape(-1), kind="stable")[: int(density * T.size)]] = True
    return np.where(kept.reshape(T.shape), T, T.dtype.type(0))


def elected(τ: Sequence[Array], how: str) -> Array:
    """[sign τₖ = γ]"""
    if how not in ("total", "frequency"):
        raise ValueError(f"sign must be 'total' or 'frequency', found {how!r}")
    signs = np.sign(np.stack(τ))
    votes = signs if how == "frequency" else np.stack(τ)
    γ: Array = np.where(votes.sum(0) >= 0, 1, -1)
    return signs == γ
