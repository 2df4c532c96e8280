"""What targets share that have one adapted layer, and no models: a driver says how its library does each thing.

For those in torch there is more in `torch_layers`. What cannot be asked is a `Skip`, or not declared.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays, Info, Skip
from refpeft.conformance.targets.spec import answers
from refpeft.ops import Array

HONOURED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "detach_norm",
)  # which drivers read, or their methods stand for
NEEDS = {"lora_bias": "bias", "alpha_pattern": "patterns", "rank_pattern": "patterns"}  # field → feature
Reshape = Callable[[Array], Array]


def same(a: Array) -> Array:
    return a


def transposed(a: Array) -> Array:
    return a.T


class Layers:
    """The target: what it declares, and a class of `Layer` that is made for each case. `fields`: of the configs of its
    methods, what its driver reads beside those that are `HONOURED` everywhere, or answers for."""

    def __init__(self, layer: Callable[[Case], "Layer"], fields: Collection[str] = (), **declared: Any) -> None:
        self.layer, self.fields = layer, {*HONOURED, *fields}
        self.declared = {"levels": ["layer"], "dtypes": ["float32", "float64"], **declared}

    def info(self) -> Info:
        return self.declared

    def run(self, case: Case) -> Arrays:
        self.honour(case.meta["config"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return answers(self.layer(case), case.meta["want"])

    def honour(self, config: Mapping[str, Any]) -> None:
        """A library is given what it is declared to have; of the rest it is better to say that it has not."""
        for name in config:
            if name not in self.fields and NEEDS.get(name) not in self.declared["features"]:
                raise Skip(f"there is no field {name!r} here")

    def close(self) -> None:
        pass


class Layer:
    """One layer with one adapter, made from a case. A driver has the methods that raise here, as far as it declares."""

    def __init__(self, case: Case) -> None:
        self.case, self.x, self.dy = case, case.arrays["x"], case.arrays.get("dy")
        self.kind, self.config = case.meta["layer"]["kind"], case.meta["config"]

    def y(self, x: Array) -> Array:
        raise NotImplementedError

    def gradients(self, x: Array, dy: Array) -> Arrays:
        """dx (not of an embedding), dA, dB, …"""
        raise NotImplementedError

    def write(self, values: Mapping[str, Array]) -> None:
        """A, B, … into the parameters, in place."""
        raise NotImplementedError

    def weights(self) -> Arrays:
        """W, as the case stores it, and b where there is one."""
        raise NotImplementedError

    def trains(self) -> Mapping[str, bool]:
        """W, b, A, B, … → is it trained?"""
        raise NotImplementedError

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of A, B, …"""
        raise NotImplementedError

    def merge(self) -> None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def disable(self) -> None:
        raise NotImplementedError

    def enable(self) -> None:
        raise NotImplementedError

    # what a case can want

    def output(self) -> Arrays:
        return {"y": self.y(self.x)}

    def first_row(self) -> Arrays:
        return {"y_row": self.y(self.x[:1])}

    def grads(self) -> Arrays:
        assert self.dy is not None
        return self.gradients(self.x, self.dy)

    def trained(self) -> Arrays:
        return {f"trained/{n}": np.array(yes) for n, yes in self.trains().items()}

    def fresh(self) -> Arrays:
        return {"y_fresh": self.y(self.x), **{f"shape/{n}": np.array(shape) for n, shape in self.shapes().items()}}

    def changed(self) -> Arrays:
        y = self.y(self.x)
        self.write({n: self.case.arrays[f"new/{n}"] for n in self.case.meta["params"]})
        return {"y": y, "y_changed": self.y(self.x)}

    def state(self, name: str) -> Arrays:
        return {f"{n}_{name}": a for n, a in {**self.weights(), "y": self.y(self.x)}.items()}

    def merged(self) -> Arrays:
        self.merge()
        return self.state("merged")

    def unmerged(self) -> Arrays:
        self.merge()
        self.unmerge()
        return self.state("unmerged")

    def disabled(self) -> Arrays:
        self.disable()
        y = self.y(self.x)
        self.enable()
        return {"y_disabled": y, "y_enabled": self.y(self.x)}

    @property
    def asked(self) -> Arrays:
        """The values of A, B, … in the case."""
        return {n: self.case.arrays[n] for n in self.case.meta["params"]}

    @property
    def is_fresh(self) -> bool:
        """Does the case want an adapter as the library itself starts it?"""
        return "fresh" in self.case.meta["want"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the case lies in the library: its parameter, and how to get there and back; `less` is what the
    library's values are less than those of the case, which is no matter to gradients; `read` is how its value comes
    back, where that is not how a gradient does."""

    param: Any
    there: Reshape = same
    back: Reshape = same
    less: Any = 0.0
    read: Reshape | None = None
