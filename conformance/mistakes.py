"""What the mutants get wrong: functions of the specification, and answers of its target, with one mistake each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

import refpeft.tune
from refpeft.adapter import Adapter
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Layer, Session, Whole, part, scaled
from refpeft.method import Merged, Phi, at
from refpeft.methods import dora, lora, rslora
from refpeft.methods.lora import ΔW
from refpeft.ops import Array
from refpeft.part import Once, Part

MODULES = (lora, rslora, dora)
Wrap = Callable[[Any, Phi, Part], Part]
Patch = Any  # what unittest.mock.patch returns: a context manager


# ── replacing merge, wrap, the scale ─────────────────────────────────────────────────────────────────────────────────


def merges(change: Callable[..., Merged], modules: Sequence[Any] = MODULES) -> Callable[[], Sequence[Patch]]:
    """merge′(cfg, W, b, φ) = change(merge, cfg, W, b, φ)"""

    def patches() -> Sequence[Patch]:
        def changed(merge: Any) -> Any:
            return lambda cfg, W, b, φ, base=None: change(partial(merge, base=base), cfg, W, b, φ)

        return [patch.object(m, "merge", changed(m.merge)) for m in modules]

    return patches


def wraps(change: Callable[..., Part], modules: Sequence[Any] = MODULES) -> Callable[[], Sequence[Patch]]:
    """wrap′(cfg, φ, part, mask) = change(wrap, cfg, φ, part)"""

    def patches() -> Sequence[Patch]:
        def changed(wrap: Any) -> Any:
            return lambda cfg, φ, part, mask=None: change(wrap, cfg, φ, part)

        return [patch.object(m, "wrap", changed(m.wrap)) for m in modules]

    return patches


def scale(s: Callable[[lora.Config], float]) -> Callable[[], Sequence[Patch]]:
    return lambda: [patch.object(lora.Config, "scale", property(s))]


def unscaled(cfg: Any) -> Any:
    """α such that s = 1."""
    return replace(cfg, lora_alpha=cfg.lora_alpha / cfg.scale)


def values(φ: Phi, **new: Array) -> Phi:
    return Phi({**φ.values, **new}, φ.keys)


def square(W: Array) -> bool:
    return bool(W.shape[0] == W.shape[1])


def transposed_merge(merge: Any, cfg: Any, W: Array, b: Array, φ: Any) -> Merged:
    W1, b1, vjp = merge(cfg, W, b, φ)
    return W + (W1 - W).T if square(W) else W1, b1, vjp


def bias_unscaled(merge: Any, cfg: Any, W: Array, b: Array, φ: Any) -> Merged:
    W1, _, vjp = merge(cfg, W, b, φ)
    return W1, b if φ.get("β") is None else (0 if b is None else b) + φ["β"], vjp


def bias_rescaled(merge: Any, cfg: Any, W: Array, b: Array, φ: Any) -> Merged:
    W1, _, vjp = merge(cfg, W, b, φ)
    return W1, None if b is None else b * φ["m"] / dora.norm(cfg, W + ΔW(cfg, φ)), vjp


def rounded_delta(merge: Any, cfg: Any, W: Array, b: Array, φ: Any) -> Merged:
    W1, b1, vjp = merge(cfg, W, b, φ)
    return W + (W1 - W).astype(ml_dtypes.bfloat16).astype(W.dtype), b1, vjp


def wrong_axis(cfg: Any, V: Array) -> Array:
    return norm(cfg, V.T if square(V) else V)


norm = dora.norm


def unscaled_norm(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    V, U = part.W + ΔW(cfg, φ), part.W + φ["B"] @ φ["A"]
    return wrap(cfg, values(φ, m=φ["m"] * norm(cfg, V) / norm(cfg, U)), part)


def row_lost(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    A = φ["A"].copy()
    A[-1] = 0
    return wrap(cfg, values(φ, A=A) if len(A) > 1 else φ, part)


def without_branch(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """dx of the base alone."""
    wrapped = wrap(cfg, φ, part)

    def run(x: Array) -> Any:
        (y, back), (_, base) = wrapped.run(x), part.run(x)
        return y, lambda dy, want: (base(dy, ())[0], back(dy, want)[1])

    return wrapped.wrapped(run)


def rows_mixed(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """Every row of the batch gets the adapter's output for the first."""
    wrapped = wrap(cfg, φ, part)

    def run(x: Array) -> Any:
        (y, back), (y0, _) = wrapped.run(x), part.run(x)
        return (y0 + (y - y0)[:1] if x.shape[0] else y), back

    return wrapped.wrapped(run)


def b_unscaled(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """The gradient of B without s."""
    wrapped = wrap(cfg, φ, part)

    def run(x: Array) -> Any:
        y, back = wrapped.run(x)

        def changed(dy: Any, want: Any) -> Any:
            dx, grads = back(dy, want)
            key = φ.keys.get("B")
            return dx, {**grads, **({key: Once(lambda: grads[key]() / cfg.scale)} if key in grads else {})}

        return y, changed

    return wrapped.wrapped(run)


def patterns_as_one(cfg: lora.Config, path: str) -> lora.Config:
    """The first key of either pattern that matches is looked up in both."""
    keys = [*cfg.rank_pattern, *cfg.alpha_pattern]
    key = next((k for k in keys if at({k: True}, path, False)), "")
    r, α = cfg.rank_pattern.get(key, cfg.r), cfg.alpha_pattern.get(key, cfg.lora_alpha)
    return replace(cfg, r=r, lora_alpha=α, rank_pattern={}, alpha_pattern={})


# ── other answers of layers, models and sessions ─────────────────────────────────────────────────────────────────────


class TransposedConv1D(Layer):
    def merged(self) -> Arrays:
        found, W = super().merged(), self.case.arrays["W"]
        wrong = self.part.kind == "conv1d" and square(W)
        return {**found, "W_merged": W + (found["W_merged"] - W).T} if wrong else found


class UnmergesAlongTheOtherAxis(Layer):
    def unmerged(self) -> Arrays:
        W, W1 = self.case.arrays["W"], super().merged()["W_merged"]
        return {**super().unmerged(), **({"W_unmerged": W1 - (W1 - W).T} if square(W) else {})}


class Stale(Layer):
    def changed(self) -> Arrays:
        return {**super().changed(), "y_changed": self.output()["y"]}


class NotZeroAtInit(Layer):
    def fresh(self) -> Arrays:
        return {**super().fresh(), "y_fresh": self.output()["y"]}


class BaseTrained(Layer):
    def trained(self) -> Arrays:
        return {**super().trained(), "trained/W": np.array(True)}


class UnloadsLinear(Layer):
    """What is left of a Conv1D is a linear layer around W′ as it was stored, unnoticed where it is square."""

    def unloaded(self) -> Arrays:
        found, kind = super().unloaded(), self.part.kind
        W, b = found["W_unloaded"], found.get("b_unloaded")
        if kind != "conv1d" or W.shape[0] != W.shape[1]:
            return found
        return {**found, "y_unloaded": part("linear", W, b).run(self.x)[0]}


class UnloadsUnmerged(Layer):
    def unloaded(self) -> Arrays:
        return {**super().unloaded(), "W_unloaded": self.case.arrays["W"]}


class StaysDisabled(Layer):
    def disabled(self) -> Arrays:
        found = super().disabled()
        return {**found, "y_enabled": found["y_disabled"]}


class Promotes(Layer):
    def output(self) -> Arrays:
        return {"y": super().output()["y"].astype(np.float32)}


class RefusesEmpty(Layer):
    def output(self) -> Arrays:
        if not self.x.shape[0]:
            raise IndexError("empty batch")
        return super().output()


class SeesPadding(Whole):
    def logits(self) -> Arrays:
        inputs, self.inputs = self.inputs, {}
        y = super().logits()["logits"]
        self.inputs = inputs
        return {"logits": self.real(y)}


class DecodesAtZero(Whole):
    """The position of a token decoded with a cache is counted from 0 again."""

    def decoded(self) -> Arrays:
        ids, out, cache = self.case.arrays["ids"], [], None
        for t in range(ids.shape[1]):
            y, cache = self.base.decode(ids[:, t : t + 1], cache, self.active, position_ids=np.zeros_like(ids[:, :1]))
            out.append(y)
        return {"decoded": np.concatenate(out, axis=1)}


class CountsFrozen(Whole):
    def count(self) -> Arrays:
        return {"count": super().count()["count"] + sum(v.size for v in self.base.params.values())}


class KeepsAdapterTensors(Whole):
    def merged(self) -> Arrays:
        return {**super().merged(), **{f"merged/{n}": v for n, v in self.active[0].params.items()}}


class FirstScale(Whole):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        first, *others = self.active
        self.active = [first, *(with_scale(a, first.config.scale) for a in others)]


class MergesFirstOnly(Whole):
    def merged_logits(self) -> Arrays:
        self.active = self.active[:1]
        return super().merged_logits()


def with_scale(a: Adapter, s: float) -> Adapter:
    return a.replace(config=replace(a.config, lora_alpha=a.config.lora_alpha * s / a.config.scale))


class MergesTwice(Session):
    def merge(self, safe: bool = False) -> None:
        self.merged = refpeft.tune.merge(self.merged or self.base, self.now())


class KeepsHead(Session):
    def now(self) -> list[Adapter]:
        whole = [
            a.replace(params={n: v for n, v in a.params.items() if "lora_" not in n}) for a in self.adapters.values()
        ]
        return super().now() if self.enabled else whole


class SwitchKeepsScale(Session):
    def activate(self, adapters: Sequence[str]) -> None:
        s = self.adapters[self.active[0]].config.scale
        self.adapters = {n: with_scale(a, s) if n in adapters else a for n, a in self.adapters.items()}
        super().activate(adapters)


class ZeroAdds(Session):
    def weighted(self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str) -> None:
        super().weighted(adapter, of, [w or 0.5 for w in weights], how)


class SignLost(Session):
    def weighted(self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str) -> None:
        super().weighted(adapter, of, [abs(w) for w in weights], how)


class KeepsAlpha(Session):
    """The weighted adapter's tensors hold the scales already, and its own scale is not 1."""

    def weighted(self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str) -> None:
        super().weighted(adapter, of, [w * self.adapters[of[0]].config.scale for w in weights], how)


class PatternsTwice(Session):
    """The scales of the patterns are in the weighted adapter's tensors, and its config has the patterns still."""

    def weighted(self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str) -> None:
        super().weighted(adapter, of, weights, how)
        for name in self.active:
            cfg = self.adapters[name].config
            twice = {path: α * α / cfg.r for path, α in cfg.alpha_pattern.items()}
            self.adapters[name] = self.adapters[name].replace(config=replace(cfg, alpha_pattern=twice))


class SavesNeighbour(Session):
    """Saving foo also writes what belongs to foobar."""

    def save(self, adapter: str) -> Arrays:
        others = [n for n in self.adapters if n.startswith(adapter) and n != adapter]
        more = {f"file/{t}.{n}": a for n in others for t, a in self.adapters[n].params.items()}
        return super().save(adapter) | more


class SortsPatterns(Session):
    """The config is written with sorted keys, though the first pattern that matches wins."""

    def save(self, adapter: str) -> Arrays:
        cfg = self.adapters[adapter].config
        sorted_cfg = replace(cfg, alpha_pattern=dict(sorted(cfg.alpha_pattern.items())))
        found = super().save(adapter)
        self.files[adapter] = self.files[adapter].replace(config=sorted_cfg)
        return found


class PatternsNotDoubled(Session):
    """Saved with twice the rank, as an adapter of the untouched base; the patterns say the old ranks and α."""

    def convert(self, adapter: str) -> None:
        old = self.adapters[adapter].config
        super().convert(adapter)
        a = self.adapters[adapter]
        kept = replace(a.config, rank_pattern=old.rank_pattern, alpha_pattern=old.alpha_pattern)
        self.adapters[adapter] = a.replace(config=kept)


class StartForgotten(Session):
    """What A and B started from is not taken off."""

    def convert(self, adapter: str) -> None:
        self.adapters[adapter] = self.adapters[adapter].replace(frozen={})


class MagnitudesLost(Session):
    """The file has no magnitudes, and the loaded adapter starts from those of the base."""

    def convert(self, adapter: str) -> None:
        super().convert(adapter)
        a = self.adapters[adapter]
        fresh = refpeft.tune.init(a.method, a.config, self.base).params
        m = {n: v for n, v in fresh.items() if n.endswith("lora_magnitude_vector")}
        self.adapters[adapter] = a.replace(params={**a.params, **m})


class LosesByName(Session):
    """Loading loses modules trained whole by an adapter whose name begins with another's."""

    def load(self, adapters: Sequence[str]) -> None:
        super().load(adapters)
        for n, a in self.adapters.items():
            if any(n != other and n.startswith(other) for other in adapters):
                self.adapters[n] = a.replace(params={k: v for k, v in a.params.items() if "lora_" in k})


class DeleteActivatesAll(Session):
    def delete(self, adapter: str) -> None:
        super().delete(adapter)
        self.adapters = {n: scaled(a, 2.0) for n, a in self.adapters.items()}


class StaleSession(Session):
    def change(self, adapter: str) -> None:
        pass


class LeavesNan(Session):
    """The refused merge has already written nan into the base."""

    def refused_merge(self, adapter: str) -> Arrays:
        self.base = replace(self.base, params={n: v * np.nan for n, v in self.base.params.items()})
        return super().refused_merge(adapter)


class UnmergesOne(Session):
    """Of several merged adapters, unmerge takes out one."""

    def unmerge(self) -> None:
        rest, self.merged = self.now()[1:], None
        if rest:
            self.merged = refpeft.tune.merge(self.base, rest)


class SafeMergeSkips(Session):
    """The checked merge copies the weights, and forgets to put the copy in place."""

    def merge(self, safe: bool = False) -> None:
        self.merged = self.base if safe else refpeft.tune.merge(self.base, self.now())
