"""Stories on the specification: whatever was done before, the model says what it says of the adapters active now."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from refpeft import tune
from refpeft.combine import average, combine
from refpeft.conformance.case import DTYPES, Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Session, model_of, tensors
from refpeft.model import Model
from refpeft.ops import Array
from refpeft.part import stored

RATE = 0.25  # of a step of training


class Story(Session):
    """Nothing is ever merged here: a merge changes nothing of what a model says."""

    def logits(self) -> Array:
        out: Array = self.base(self.case.arrays["ids"], self.now())[0]
        return out

    def merge(self, safe: bool = False) -> None:
        pass

    def nothing(self) -> Arrays:
        """What is left of a step that was refused."""
        return {"refused": np.array(True)}

    def train(self) -> None:
        """θ ← θ − η ∂⟨logits, dout⟩/∂θ, for the adapters active now and nothing else."""
        logits, vjp = self.base(self.case.arrays["ids"], self.now())
        for name, grads in zip(self.active, vjp(last(self.case.arrays["dout"], logits.shape)), strict=True):
            a = self.adapters[name]
            self.adapters[name] = a.replace(params={n: v - v.dtype.type(RATE) * grads[n] for n, v in a.params.items()})

    def load_as(self, adapter: str, file: str) -> None:
        """A saved adapter under another name, beside those that are there."""
        self.adapters[adapter] = self.files[file]

    def swap(self, adapter: str, file: str) -> None:
        """A saved adapter in the place of one that is there."""
        self.adapters[adapter] = self.files[file]

    def combine(
        self,
        adapter: str,
        of: Sequence[str],
        weights: Sequence[float],
        how: str,
        density: float = 1.0,
        sign: str = "total",
    ) -> None:
        """A new adapter made of others, as `refpeft.combine` defines it; it is not active yet."""

        def mask(k: int, name: str, T: Array) -> Array:
            kind = self.base.part(name).kind if name in self.base.sites else "linear"
            return stored(kind, self.mask(f"{adapter}/{of[k]}/{name}", stored(kind, T).shape))

        self.adapters[adapter] = combine([self.adapters[n] for n in of], weights, how, density, sign, mask=mask)

    def average(self, adapter: str, of: Sequence[str], weights: Sequence[float]) -> None:
        """A new adapter whose tensors are weighted sums; it is not active yet."""
        self.adapters[adapter] = average([self.adapters[n] for n in of], weights)

    def mask(self, name: str, shape: tuple[int, ...]) -> Array:
        return self.case.arrays["mask/" + name]


def last(dout: Array, shape: tuple[int, ...]) -> Array:
    """As many of its last positions as there are: a prompt's are in front, and not every adapter has as many."""
    return dout[:, dout.shape[1] - shape[1] :]


class Written(Story):
    """A story in which what is merged is written into the weights, and taken out before others are to run."""

    into: Model | None = None

    def activate(self, adapters: Sequence[str]) -> None:
        self.unmerge()
        super().activate(adapters)

    def disable(self) -> None:
        self.unmerge()
        super().disable()

    def delete(self, adapter: str) -> None:
        self.unmerge()
        super().delete(adapter)


class Folding(Written):
    """What is merged is written into the weights, which are rounded to the model's dtype; what that took away or added
    stays there when the adapter is taken out. In float64 otherwise: how far from the formula do merges alone lead?"""

    def __init__(self, case: Case) -> None:
        super().__init__(case.in_float64())
        self.dtype = DTYPES[case.meta["dtype"]]
        self.exact: Model | None = None

    def logits(self) -> Array:
        if self.into and self.enabled:
            out: Array = self.into(self.case.arrays["ids"])[0]
            return out
        return super().logits()

    def merge(self, safe: bool = False) -> None:
        if self.into is None:
            adapters = [self.adapters[name] for name in self.active]
            self.exact = tune.merge(self.base, adapters)
            self.into = self.rounded(self.exact, {})

    def unmerge(self) -> None:
        if self.into and self.exact:
            off = {n: a - self.exact.params[n] for n, a in self.into.params.items() if n in self.base.params}
            self.base = self.rounded(self.base, off)
        self.into = self.exact = None

    def rounded(self, model: Model, off: Mapping[str, Array]) -> Model:
        there = {n: a + off.get(n, 0) for n, a in model.params.items()}
        return replace(model, params={n: a.astype(self.dtype).astype(np.float64) for n, a in there.items()})

    def load(self, adapters: Sequence[str]) -> None:
        self.into, self.exact, self.base = None, None, model_of(self.case)
        super().load(adapters)


def settled(case: Case, got: Arrays) -> Case:
    """The story without the steps that may be refused and were: a refusal changes nothing."""
    steps = [
        {"do": "nothing"} if step.get("may") == "refuse" and f"{k}/refused" in got else step
        for k, step in enumerate(case.meta.get("steps", ()))
    ]
    return Case({**case.meta, "steps": steps}, case.arrays) if steps else case


__all__ = ["RATE", "Folding", "Story", "last", "settled", "tensors"]
