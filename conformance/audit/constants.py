"""What it means that a merge holds k times the change that it should: the usual mistakes with s = α/r, by their k."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

Constants = Mapping[str, float]  # words → k

RIGHT = "as it should be"
LEFT_OUT = "left out"
UNKNOWN = "no known mistake"


def constants(whole: Any, cfg: Any) -> Constants:
    """Mistake → the k that it makes, for one module. `cfg`: the config with its patterns applied; `whole`: without.

    Where s has a value for which a mistake does nothing (k = 1), it is no mistake."""
    known = {LEFT_OUT: 0.0, "applied twice": 2.0, "subtracted": -1.0}
    if not all(getattr(cfg, name, 0) for name in ("lora_alpha", "r", "scale")) or not hasattr(cfg, "use_rslora"):
        return known
    s, r, α = cfg.scale, cfg.r, cfg.lora_alpha
    root = math.sqrt(r)
    rule, other = ("α/√r", "α/r") if cfg.use_rslora else ("α/r", "α/√r")
    known |= {
        f"{other} in place of {rule}": 1 / root if cfg.use_rslora else root,
        f"s = {rule} = {s:g} applied twice (s²)": s,
        f"s = {rule} = {s:g} left out": 1 / s,
        f"α = {α:g} left out of s": 1 / α,
        f"r = {r} left out of s": α / s,
    }
    for field, changed in {"alpha_pattern": {"lora_alpha": whole.lora_alpha}, "rank_pattern": {"r": whole.r}}.items():
        known |= {f"{field} ignored in s": scale(cfg, **changed) / s}
    known |= {"alpha_pattern and rank_pattern ignored in s": scale(cfg, lora_alpha=whole.lora_alpha, r=whole.r) / s}
    return {words: k for words, k in known.items() if abs(k - 1) > 1e-6}


def scale(cfg: Any, **changed: Any) -> float:
    return float(replace(cfg, **changed).scale)


def meanings(k: float, known: Constants) -> tuple[str, ...]:
    """Every mistake that makes this k; several where they cannot be told apart."""
    return tuple(words for words, value in known.items() if abs(value - k) <= 1e-3 * max(1.0, abs(k)))


def nearest(k: float, known: Constants) -> list[float]:
    """The values that a mistake, or none, would give, the nearest first."""
    return sorted({1.0, *known.values()}, key=lambda value: (abs(value - k), value))
