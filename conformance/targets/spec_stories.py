"""Stories on the specification: whatever was done before, the model says what it says of the adapters active now."""

from collections.abc import Sequence

import numpy as np

from refpeft.combine import combine
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Session, tensors
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
        _, vjp = self.base(self.case.arrays["ids"], self.now())
        for name, grads in zip(self.active, vjp(self.case.arrays["dout"]), strict=True):
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

    def mask(self, name: str, shape: tuple[int, ...]) -> Array:
        return self.case.arrays["mask/" + name]


def settled(case: Case, got: Arrays) -> Case:
    """The story without the steps that may be refused and were: a refusal changes nothing."""
    steps = [
        {"do": "nothing"} if step.get("may") == "refuse" and f"{k}/refused" in got else step
        for k, step in enumerate(case.meta.get("steps", ()))
    ]
    return Case({**case.meta, "steps": steps}, case.arrays) if steps else case


__all__ = ["RATE", "Story", "settled", "tensors"]
