"""What the mutants of methods that train the model's own tensors get wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import refpeft
from refpeft import selection
from refpeft.adapter import Adapter
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Session, Whole
from refpeft.hooks import Hooks
from refpeft.methods import trainable_tokens
from refpeft.model import Model
from refpeft.ops import Array
from refpeft.part import BASE, Part, make

replaced, hooks = selection.replaced, trainable_tokens.hooks
multiplied, looked_up = trainable_tokens.multiplied, trainable_tokens.looked_up


def start(adapter: Adapter, base: Model) -> dict[str, Array]:
    """What the adapter's parameters are before training: the base's own."""
    return dict(refpeft.init(adapter.method, adapter.config, base).params)


class AddsToTheBase(Whole):
    """What was trained is taken for a change, and added."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.active = [
            a.replace(params={n: v + start(a, self.base)[n] for n, v in a.params.items()}) for a in self.active
        ]


class ForgetsOneInMerging(Whole):
    """The last of the tensors stays what it was."""

    def forget(self) -> None:
        self.active = [a.replace(params={**a.params, **last(start(a, self.base))}) for a in self.active]

    def merged(self) -> Arrays:
        self.forget()
        return super().merged()

    def merged_logits(self) -> Arrays:
        self.forget()
        return super().merged_logits()


def last(params: dict[str, Array]) -> dict[str, Array]:
    return dict([list(params.items())[-1]])


def leaves_out(names: Callable[[str], bool]) -> Callable[[Case], Whole]:
    """Some of the tensors are not put in their places."""

    class LeavesOut(Whole):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            kept = [{n: v for n, v in start(a, self.base).items() if names(n)} for a in self.active]
            self.active = [a.replace(params={**a.params, **k}) for a, k in zip(self.active, kept, strict=True)]

    return LeavesOut


class StaysEnabled(Session):
    def disable(self) -> None:
        pass


class LosesTheAdapter(Session):
    """After unmerging the base runs alone."""

    def unmerge(self) -> None:
        self.merged, self.enabled = None, False


def one_use_only(adapter: Adapter, k: int, part: Part) -> Part:
    """A tensor that two layers share gets the gradient of one of them."""
    new = replaced(adapter, k, part)
    if part.kind != "embedding" or new is part:
        return new
    return make(part.path, part.kind, new.W, new.b, (BASE, ""), (BASE, ""), part.eps)


def embedding_only(adapter: Adapter, k: int, model: Model) -> Hooks:
    """A head that is tied to the embedding keeps the old rows."""
    found = hooks(adapter, k, model)
    return replace(found, part=lambda p: found.part(p) if p.kind == "embedding" else p)


def without_bias(p: Part, R: Array, t: Array, key: Any) -> Any:
    """The tied head loses its bias while the adapter runs, as in HF peft 0.21."""
    run = multiplied(p, R, t, key)

    def wrong(x: Array) -> Any:
        y, back = run(x)
        return (y if p.b is None else y - p.b), back

    return wrong


def next_tokens_too(p: Part, R: Array, t: Array, key: Any) -> Any:
    """The tokens that follow the new ones are taken for them."""
    return looked_up(p, R, (t + 1) % p.W.shape[1], key)


def norm(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name


def bias(name: str) -> bool:
    return name.endswith(".bias")


def in_mlp(name: str) -> bool:
    return ".mlp." in name or ".intermediate." in name
