"""What the mutants of soft prompts and prefixes get wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

import refpeft.hooks
import refpeft.inputs
import refpeft.recurrent
from refpeft.conformance.case import Case
from refpeft.conformance.mistakes import Patch
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Session, Whole
from refpeft.hooks import Hooks, Memory, Prompt
from refpeft.methods import prefix_tuning
from refpeft.ops import Array
from refpeft.prompts import table

Patches = Callable[[], Sequence[Patch]]
prefixed, extended = refpeft.inputs.prefixed, refpeft.inputs.extended
direction, step, columns = refpeft.recurrent.direction, refpeft.recurrent.step, refpeft.hooks.columns
memory, hooks = prefix_tuning.memory, prefix_tuning.hooks


def instead(module: Any, **wrong: Any) -> Patches:
    return lambda: [patch.object(module, name, f) for name, f in wrong.items()]


# ── soft prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def after_the_tokens(prompt: Prompt, ids: Array, types: Array | None, places: Array | None) -> Any:
    ids, types, places = prefixed(prompt, ids, types, places)
    n = prompt.length
    return np.concatenate([ids[:, n:], ids[:, :n]], axis=1), types, places


def from_zero_again(prompt: Prompt, ids: Array, types: Array | None, places: Array | None) -> Any:
    """The tokens keep the places that they have without a prompt."""
    ids, types, _ = prefixed(prompt, ids, types, places)
    n = prompt.length
    at = np.concatenate([np.arange(n), np.arange(ids.shape[1] - n)])[None] + np.zeros_like(ids)
    return ids, types, at


def hidden(attention_mask: Array | None, prompt: Prompt) -> Array | None:
    """A mask is extended by zeros, and the prompt is padding."""
    found = extended(attention_mask, prompt)
    return None if found is None else np.where(np.arange(found.shape[1]) < prompt.length, 0, found)


class AveragesOverTheBatch(Whole):
    """The prompt is one for all rows, and gets the mean of their gradients."""

    def grads(self) -> Arrays:
        return {n: d / len(self.case.arrays["ids"]) for n, d in super().grads().items()}


class InsertsAtEveryStep(Whole):
    """Decoding puts the prompt in again before each token."""

    def decoded(self) -> Arrays:
        ids, out, cache = self.case.arrays["ids"], [], None
        n, v = self.active[0].config.num_virtual_tokens, len(table(self.base))
        again = v + np.arange(n) + np.zeros_like(ids[:, :1])
        for t in range(ids.shape[1]):
            now = ids[:, t : t + 1]
            y, cache = self.base.decode(np.concatenate([again, now], axis=1) if t else now, cache, self.active)
            out.append(y[:, -1:] if t else y)
        return {"decoded": np.concatenate(out, axis=1)}


class PredictsFromTheTokensOnly(Whole):
    """The end of the prompt predicts nothing, so that the first token has no loss."""

    def loss(self) -> Arrays:
        labels = self.case.arrays["labels"]
        wrong = np.where(np.arange(labels.shape[1]) == 0, -100, labels)
        self.case = Case(self.case.meta, {**self.case.arrays, "labels": wrong})
        return super().loss()


# ── encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class DropsTooMuch(Whole):
    """The encoder's input is taken for its output."""

    def dropped(self) -> Arrays:
        self.active = [a.replace(params={"prompt_embeddings": a.params["embedding.weight"]}) for a in self.active]
        return super().dropped()


class SavesTheEncoder(Session):
    """The file holds the encoder, which nothing that loads it expects."""

    def save(self, adapter: str) -> Arrays:
        super().save(adapter)
        return {f"file/{name}": a for name, a in self.adapters[adapter].params.items()}


def forwards_only(x: Array, weights: Sequence[Array], backwards: bool = False) -> Any:
    return direction(x, weights)


def gates_in_another_order(a: Array, c: Array, h: Array) -> Any:
    """i, f, o, g"""
    i, f, g, o = np.split(a, 4, axis=-1)
    return step(np.concatenate([i, f, o, g], axis=-1), c, h)


def of(names: Callable[[str], bool], change: Callable[[Array], Array]) -> Callable[[Case], Whole]:
    """The gradients of some parameters are changed."""

    class Changes(Whole):
        def grads(self) -> Arrays:
            return {n: change(d) if names(n) else d for n, d in super().grads().items()}

    return Changes


# ── prefixes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def values_for_keys(*arguments: Any) -> Memory:
    m = memory(*arguments)
    return replace(m, k=m.v, v=m.k)


def first_for_all(φ: Any, hidden: Any, layer: int, *rest: Any) -> Memory:
    return memory(φ, hidden, 0, *rest)


def keys_of_all_layers_first(φ: Any, hidden: Any, layer: int, shape: Any, *rest: Any) -> Memory:
    """P is taken for [P_K of layer 0, P_K of layer 1, …, P_V of layer 0, …]."""
    P = φ["P"]
    n, t = shape[0], shape[1] * shape[2]
    L = P.shape[1] // (2 * t)
    k, v = (P[:, at * t : (at + 1) * t].reshape(1, n, *shape[1:]) for at in (layer, L + layer))
    return replace(memory(φ, hidden, layer, shape, *rest), k=k, v=v)


def unshifted(*arguments: Any) -> Hooks:
    return replace(hooks(*arguments), shift=0)


def behind_the_causal_mask(mask: Array, m: Memory) -> Array:
    """The prefix is thought to stand behind the tokens, so that none of them sees it."""
    return columns(mask, m) & np.zeros(m.k.shape[1], bool)


class FirstTaskForAll(Whole):
    """Every row gets the prefix of the first task, or none."""

    def __init__(self, case: Case) -> None:
        rows = case.arrays.get("rows")
        super().__init__(case if rows is None else Case(case.meta, {**case.arrays, "rows": np.minimum(rows, 0)}))


def frozen(*words: str) -> Callable[[Case], Whole]:
    """Parameters of these names get no gradient."""
    return of(lambda name: any(word in name for word in words), np.zeros_like)


class ForgetsTheHead(Whole):
    def count(self) -> Arrays:
        return {"count": np.array(sum(a.params["prompt_embeddings"].size for a in self.active))}
