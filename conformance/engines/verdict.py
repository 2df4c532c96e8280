"""What an engine's answer was: right, refused, silently wrong, or none.

Answers are laws of the next token, log-probabilities [s, v], nan for what an engine does not say. An answer is held
against that of the specification in float64:

    off = max |got − ref| / max |ref − base|        over what the engine says

so that 1 is the whole effect of the adapter. Engines that compute in float32 are below 10⁻⁵, those that have 16 bits
somewhere below 10⁻²: that is right. What is not right is held against each mistake that is known, in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refpeft.adapter import Adapter
from refpeft.conformance.engines.variants import mistakes
from refpeft.model import Model
from refpeft.ops import Array

RIGHT = 1e-2
VERDICTS = ("right", "refused", "silently wrong", "no answer", "not installed")


@dataclass(frozen=True)
class Verdict:
    """off: of an answer that there is; detail: what a wrong one is, or the sentence in which it was refused."""

    verdict: str
    off: float | None = None
    detail: str = ""


class Judge:
    """What the specification says to one prompt, in float64."""

    def __init__(self, base: Model, ids: Array) -> None:
        self.model, self.ids = base.astype(np.float64), ids
        self.base = self.law(None)

    def law(self, adapter: Adapter | None) -> Array:
        given: Sequence[Adapter] = [] if adapter is None else [in_float64(adapter)]
        return law(self.model(self.ids[None], given)[0][0])

    def verdict(self, name: str, adapter: Adapter, got: Array) -> Verdict:
        ref = self.law(adapter)
        if got.shape != ref.shape:
            return Verdict("silently wrong", None, f"an answer of shape {list(got.shape)}, not {list(ref.shape)}")
        said = ~np.isnan(got)
        if not said.any():
            return Verdict("no answer", None, "not a number in it")
        scale = np.abs(ref - self.base)[said].max()
        off = float(np.abs(got - ref)[said].max() / scale)
        if off <= RIGHT:
            return Verdict("right", off)
        others = {what: self.law(other) for what, other in mistakes(name, adapter, self.model).items()}
        near = {what: float(np.abs(got - other)[said].max() / scale) for what, other in others.items()}
        nearest = min(near, key=lambda what: near[what])
        known = near[nearest] <= RIGHT
        return Verdict("silently wrong", off, nearest if known else "something else, which is not recognised")


def law(y: Array) -> Array:
    """log softmax of logits [s, v]; what has gaps is a law already."""
    if np.isnan(y).any():
        return y
    z = y.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    found: Array = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return found


def in_float64(adapter: Adapter) -> Adapter:
    return adapter.replace(params={n: a.astype(np.float64) for n, a in adapter.params.items()})
