"""The intrinsic dimension of a task: the smallest d whose random subspace reaches nearly what full training reaches.

    d₉₀ = min {d : score(d) ≥ 0.9 · score of full fine-tuning}      Li et al. 2018, arXiv 1804.08838, §2, "d_int90"

score(d) is what training by `did` or `said` in d dimensions ends with: an accuracy, or anything else of which more is
better. How to train is the caller's business.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from refpeft.model import Model
from refpeft.tune import init


@dataclass(frozen=True)
class Intrinsic:
    """`dimension`: the smallest that reached the threshold, None if none did; `scores`: of all that were tried."""

    dimension: int | None
    threshold: float
    scores: Mapping[int, float] = field(default_factory=dict)


def intrinsic_dimension(
    train: Callable[[Any], float],
    full: float,
    dimensions: Sequence[int],
    model: Model | None = None,
    method: str = "did",
    config: Mapping[str, Any] | None = None,
    share: float = 0.9,
    seed: int = 0,
) -> Intrinsic:
    """The smallest of `dimensions`, which increase, with train(d) ≥ share · full, found by bisection.

    With a `model`, `train` gets a fresh adapter of the method instead of d, of that dimension, drawn from `seed`.
    `full` is the score of full fine-tuning. Of n dimensions about log₂ n are trained. Bisection takes it that scores
    grow with d; where they are noisy let `train` return the mean of several runs.

    >>> intrinsic_dimension(lambda d: 1 - 1 / d, full=1.0, dimensions=range(1, 100)).dimension
    10
    """
    if not dimensions or dimensions[0] < 1 or any(a >= b for a, b in pairwise(dimensions)):
        raise ValueError(f"dimensions must be positive and increase, found {list(dimensions)!r}")
    if not (full > 0 and 0 < share <= 1):
        raise ValueError(f"full must be positive and share in (0, 1], found {full!r} and {share!r}")
    scores: dict[int, float] = {}

    def reaches(d: int) -> bool:
        given = d if model is None else init(method, {**(config or {}), "d": d}, model, seed)
        scores[d] = float(train(given))
        return scores[d] >= share * full

    low, high = 0, len(dimensions)  # all before low fall short; that at high reaches, or is behind the last
    while low < high:
        middle = (low + high) // 2
        if reaches(dimensions[middle]):
            high = middle
        else:
            low = middle + 1
    return Intrinsic(dimensions[high] if high < len(dimensions) else None, share * full, dict(sorted(scores.items())))
