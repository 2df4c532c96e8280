"""What mutants get wrong about modules that are trained whole, and about what is trained besides."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refpeft.adapter import Adapter
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Session, Whole, inputs_of
from refpeft.model import Model
from refpeft.ops import Array


def of_the_model(adapter: Adapter, base: Model) -> dict[str, Array]:
    """The tensors of modules that it trains whole."""
    return {n: a for n, a in adapter.params.items() if n in base.params}


class TrainsTheOriginalToo(Whole):
    """A module trained whole is a copy, and what it was copied from is trained as well."""

    def count(self) -> Arrays:
        originals = sum(v.size for a in self.active for v in of_the_model(a, self.base).values())
        return {"count": super().count()["count"] + originals}


class TrainsItsRank(Whole):
    """In other dtypes than float32, a number of each adapter is taken for a parameter."""

    def count(self) -> Arrays:
        odd = self.case.meta["dtype"] != "float32"
        return {"count": super().count()["count"] + np.array(int(odd))}


class DisabledKeepsHead(Session):
    """Disabled, the model is the base with the modules that the adapter has trained whole."""

    def logits(self) -> Array:
        if self.enabled:
            return super().logits()
        there = {n: v for name in self.active for n, v in of_the_model(self.adapters[name], self.base).items()}
        model = replace(self.base, params={**self.base.params, **there})
        out: Array = model(self.case.arrays["ids"], **inputs_of(self.case))[0]
        return out


class LosesNamesInPaths(Session):
    """A saved tensor goes to the module whose name is found first in its own, wherever in it that is."""

    def load(self, adapters: Sequence[str]) -> None:
        super().load(adapters)
        for name, a in self.adapters.items():
            kept = {n: v for n, v in a.params.items() if not astray(n, a.config.modules_to_save or ())}
            self.adapters[name] = a.replace(params=kept)


def astray(tensor: str, names: Sequence[str]) -> bool:
    """Is there a name of a module in this one that is only a part of a name in it?"""
    return any(name in part and not part.endswith(name) for part in tensor.split(".") for name in names)
