"""Mistakes in stories: adapters, names, files and combinations mixed up after something else was done."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import refpeft.tune
from refpeft import combine as combinations
from refpeft.adapter import Adapter
from refpeft.conformance.case import DTYPES
from refpeft.conformance.mistakes import with_scale
from refpeft.conformance.targets.spec_stories import Story, Written
from refpeft.ops import Array


def whole(a: Adapter) -> list[str]:
    """The names of the modules that it trains whole."""
    return [name for name in a.params if "lora_" not in name]


class Folds(Written):
    """A story in which what is merged is written into the weights, as libraries do."""

    def logits(self) -> Array:
        model, adapters = (self.into, self.beside()) if self.into else (self.base, self.now())
        out: Array = model(self.case.arrays["ids"], adapters)[0]
        return out

    def beside(self) -> list[Adapter]:
        return []

    def merge(self, safe: bool = False) -> None:
        self.into = self.into or refpeft.tune.merge(self.base, self.now())

    def unmerge(self) -> None:
        self.into = None

    def load(self, adapters: Sequence[str]) -> None:
        self.unmerge()
        super().load(adapters)


class MergesAgain(Folds):
    def merge(self, safe: bool = False) -> None:
        self.into = refpeft.tune.merge(self.into or self.base, self.now())


class DeleteLeavesMerged(Folds):
    """What was merged stays in the weights when its adapter is deleted."""

    def delete(self, adapter: str) -> None:
        if self.into and adapter in self.active:
            self.base = self.into
        super().delete(adapter)


class SwitchKeepsMerged(Folds):
    """Another adapter is activated on top of what is merged."""

    def activate(self, adapters: Sequence[str]) -> None:
        kept = self.into
        super().activate(adapters)
        self.base = kept or self.base


class RestoresOtherDtype(Folds):
    """Unmerged weights are of the adapter's dtype."""

    def unmerge(self) -> None:
        if self.into:
            wide = np.float32 if next(iter(self.base.params.values())).dtype == np.float64 else np.float64
            self.base = self.base.astype(wide)
        super().unmerge()


class DisableForgetsMerged(Folds):
    """Disabled, the merged weights go on."""

    def disable(self) -> None:
        kept = self.into
        super().disable()
        self.into = kept

    def enable(self) -> None:
        super().enable()
        self.into = None


class DisableKeepsHead(Story):
    def now(self) -> list[Adapter]:
        if self.enabled:
            return super().now()
        there = [self.adapters[name] for name in self.active]
        return [a.replace(params={n: a.params[n] for n in whole(a)}) for a in there]


class HeirWithoutHead(Story):
    """The adapter that becomes active when another is deleted has not its own head."""

    def delete(self, adapter: str) -> None:
        last = self.active == [adapter]
        super().delete(adapter)
        for name in self.active if last else ():
            a = self.adapters[name]
            self.adapters[name] = a.replace(params={n: v for n, v in a.params.items() if n not in whole(a)})


class DeleteActivatesNone(Story):
    def delete(self, adapter: str) -> None:
        last = self.active == [adapter]
        super().delete(adapter)
        self.active = [] if last else self.active


class DeletesByPrefix(Story):
    """foo and all whose names begin so."""

    def delete(self, adapter: str) -> None:
        super().delete(adapter)
        zero = {n for n in self.adapters if n.startswith(adapter)}
        self.adapters = {n: with_scale(a, 1e-9) if n in zero else a for n, a in self.adapters.items()}


class TrainsAll(Story):
    """A step of training moves the adapters that are not active, too."""

    def train(self) -> None:
        active = self.active
        for name in [n for n in self.adapters if n not in active]:
            self.active = [name]
            super().train()
        self.active = active
        super().train()


class TrainsHeadNot(Story):
    def train(self) -> None:
        before = {name: self.adapters[name] for name in self.active}
        super().train()
        for name, a in before.items():
            now = self.adapters[name]
            self.adapters[name] = now.replace(params={**now.params, **{n: a.params[n] for n in whole(a)}})


class LoadKeepsOld(Story):
    """What is loaded under another name is the adapter of the model that has the file's name, not the file."""

    def load_as(self, adapter: str, file: str) -> None:
        self.adapters[adapter] = self.adapters.get(file, self.files[file])


class SwapKeepsScale(Story):
    def swap(self, adapter: str, file: str) -> None:
        s = self.adapters[adapter].config.scale
        super().swap(adapter, file)
        self.adapters[adapter] = with_scale(self.adapters[adapter], s)


class SwapClearsNeighbours(Story):
    """Those whose names contain the name of the one that is swapped."""

    def swap(self, adapter: str, file: str) -> None:
        super().swap(adapter, file)
        others = {n for n in self.adapters if adapter in n and n != adapter}
        self.adapters = {n: with_scale(a, 1e-9) if n in others else a for n, a in self.adapters.items()}


class ReplacedKeepsConfig(Story):
    """An adapter loaded under a name that is taken has its own tensors and the other's scale."""

    def load_as(self, adapter: str, file: str) -> None:
        old = self.adapters.get(adapter)
        super().load_as(adapter, file)
        if old:
            self.adapters[adapter] = with_scale(self.adapters[adapter], old.config.scale)


class SaveSavesActive(Story):
    """The file has the numbers that the adapter had when it was first saved or added."""

    def load(self, adapters: Sequence[str]) -> None:
        super().load(adapters)
        for name in adapters:
            if name in self.case.meta["adapters"]:
                self.add(name)


class SecondTakesFirstConfig(Story):
    """What the first adapter's config says of a layer holds for all that come after it."""

    def add(self, adapter: str) -> None:
        super().add(adapter)
        first, a = next(iter(self.adapters.values())), self.adapters[adapter]
        if {n: v.shape for n, v in a.params.items()} == {n: v.shape for n, v in first.params.items()}:
            self.adapters[adapter] = a.replace(config=first.config)


class TakenOutByDivision(Folds):
    """What was multiplied in is divided out, and a little is lost each time."""

    def unmerge(self) -> None:
        if self.into:
            lost = {n: a * a.dtype.type(1 - 1e-5) for n, a in self.base.params.items()}
            self.base = replace(self.base, params=lost)
        super().unmerge()


class LoadsTheFirstFile(Story):
    """Of adapters that are loaded together, all have the numbers of the first where these fit."""

    def load(self, adapters: Sequence[str]) -> None:
        super().load(adapters)
        first = self.adapters[adapters[0]]
        for name in adapters:
            a = self.adapters[name]
            fit = {n: v for n, v in first.params.items() if n in a.params and v.shape == a.params[n].shape}
            self.adapters[name] = a.replace(params={**a.params, **fit})


class StaysInFront(Story):
    """Disabled, the prompt, prefix or bottleneck goes on."""

    def now(self) -> list[Adapter]:
        return [self.adapters[name] for name in self.active]


class LoadsInModelsDtype(Story):
    """An adapter in float32 is rounded to the 16 bits of the model when it is loaded, and widened again."""

    def load(self, adapters: Sequence[str]) -> None:
        super().load(adapters)
        half = DTYPES[self.case.meta["dtype"]]
        for name, a in self.adapters.items():
            self.adapters[name] = a.replace(params={n: v.astype(half).astype(v.dtype) for n, v in a.params.items()})


class MergedStaysWide(Folds):
    """Merged, a model in 16 bits computes in 32, and says so."""

    def logits(self) -> Array:
        out = super().logits()
        return out.astype(np.float32) if self.into else out


class LeavesHalf(Folds):
    """Half of what was merged stays in the weights when it is taken out."""

    def unmerge(self) -> None:
        if self.into:
            there = self.into.params
            lost = {n: 0.5 * (a + there[n].astype(a.dtype)) for n, a in self.base.params.items()}
            self.base = replace(self.base, params={n: a.astype(self.base.params[n].dtype) for n, a in lost.items()})
        super().unmerge()


class AverageIsNormalised(Story):
    """Weights are divided by their sum."""

    def average(self, adapter: str, of: Sequence[str], weights: Sequence[float]) -> None:
        super().average(adapter, of, [w / sum(weights) for w in weights])


class AverageSeesLater(Story):
    """An average is of the adapters as they were added, whatever they have been trained to since."""

    def average(self, adapter: str, of: Sequence[str], weights: Sequence[float]) -> None:
        kept = dict(self.adapters)
        for name in of:
            if name in self.case.meta["adapters"]:
                super().add(name)
        super().average(adapter, of, weights)
        self.adapters = {**kept, adapter: self.adapters[adapter]}


class CombinedSeesLater(Story):
    """A combination is of the adapters as they were added, whatever they have been trained to since."""

    def combine(
        self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str, *options: Any, **more: Any
    ) -> None:
        kept = dict(self.adapters)
        for name in of:
            if name in self.case.meta["adapters"]:
                super().add(name)
        super().combine(adapter, of, weights, how, *options, **more)
        self.adapters = {**kept, adapter: self.adapters[adapter]}


# ── combinations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def smallest(T: Array, density: float) -> Array:
    """Prunes the largest, and keeps the rest."""
    kept = combinations_top(T, density)
    return T - kept


def by_rows(T: Array, density: float) -> Array:
    """The largest of each row, not of the whole."""
    return np.stack([combinations_top(row, density) for row in T])


def against(τ: Sequence[Array], how: str) -> Array:
    return ~combinations_elected(τ, how)


def by_frequency(τ: Sequence[Array], how: str) -> Array:
    return combinations_elected(τ, "frequency" if how == "total" else "total")


def not_rescaled(how: str, density: float, sign: str, mask: Any) -> Any:
    """DARE's survivors are what they were."""
    rescaled = mask and (lambda k, name, T: mask(k, name, T) * density)
    return combinations_summing(how, density, sign, rescaled)


def mean_of_all(how: str, density: float, sign: str, mask: Any) -> Any:
    """TIES divides by the number of adapters, not of those that agree."""
    if not how.endswith("ties"):
        return combinations_summing(how, density, sign, mask)

    def summed(T: Sequence[Array], w: Sequence[float], which: Sequence[int], name: str) -> Array:
        τ = [combinations_top(t, density) if how == "ties" else t for t in T]
        agree = combinations_elected(τ, sign)
        return np.asarray(sum(wₖ * t * m for wₖ, t, m in zip(w, τ, agree, strict=True)) / len(T), T[0].dtype)

    return summed


combinations_top, combinations_elected = combinations.top, combinations.elected
combinations_summing = combinations.summing
