"""Adapters: what a method adds to a model, and how several of them wrap its parts."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.hooks import Hooks, compose, only
from refpeft.method import Phi, shared
from refpeft.methods import METHODS
from refpeft.ops import Array
from refpeft.part import Key, Part, choose, make, stored

if TYPE_CHECKING:
    from refpeft.model import Model


@dataclass(frozen=True)
class Adapter:
    """A method's config and parameters for one model.

    `params` are all that is trained, by name: '<module>.lora_A.weight', …; a parameter with the name of one of the
    model's own tensors ('score.weight', from `modules_to_save` or `bias`) stands in its place. `frozen` are companions
    that are never trained. `masks` are dropout masks by module, as arguments of the function. `rows` [b] of bool says
    which rows of the batch the adapter is for (None: all); of an ensemble of prompts, `rows` of integers say which of
    them each row has.
    """

    method: str
    config: Any
    params: Mapping[str, Array]
    frozen: Mapping[str, Array] = field(default_factory=dict)
    masks: Mapping[str, Array] = field(default_factory=dict)
    rows: Array | None = None

    def replace(self, **changes: Any) -> "Adapter":
        return replace(self, **changes)

    def at(self, path: str) -> Any:
        """The config with its patterns applied to one module."""
        if path not in self._at:
            self._at[path] = self.config.at(path)
        return self._at[path]

    @cached_property
    def _at(self) -> dict[str, Any]:
        return {}

    @cached_property
    def by_module(self) -> Mapping[str, tuple[dict[str, str], dict[str, str]]]:
        """Module → (formula name → parameter name, 'weight' or 'bias' → parameter name)."""
        suffixes = {key: name for name, keys in METHODS[self.method].KEYS.items() for key in keys if key}
        table: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        common = set(shared(METHODS[self.method]).values())
        if substitutes(self):
            return table
        inside = tuple(name for name in common if name.endswith("."))  # all that begins so
        for name in [*self.params, *self.frozen]:
            if name in common or name.startswith(inside):
                continue
            own = next((s for s in suffixes if name.endswith("." + s)), None)
            path = name[: -len(own) - 1] if own else name.rpartition(".")[0]
            φ, whole = table.setdefault(path, ({}, {}))
            if own:
                φ[suffixes[own]] = name
            else:
                whole[name.rpartition(".")[2]] = name
        return table

    def value(self, name: str) -> Array:
        return self.params[name] if name in self.params else self.frozen[name]


def substitutes(adapter: Adapter) -> bool:
    """Does the method put tensors in the place of the model's own, wherever these are used, before all others act?"""
    return hasattr(METHODS[adapter.method], "merge_model")


def each(adapters: Sequence[Adapter], model: "Model") -> Hooks:
    """The hooks of a model: first the tensors that adapters replace whole, then each adapter's method, in order."""
    first: list[Hooks] = []
    then = [Hooks(part=wrapped(adapters))]
    for k, adapter in enumerate(adapters):
        if make_hooks := getattr(METHODS[adapter.method], "hooks", None):
            own = make_hooks(adapter, k, model)
            own = own if adapter.rows is None or numbered(adapter) else only(adapter.rows, own)
            (first if substitutes(adapter) else then).append(own)
    return compose([*first, *then]) if first or len(then) > 1 else then[0]


def wrapped(adapters: Sequence[Adapter]) -> Callable[[Part], Part]:
    """The hook of all methods that adapt one layer at a time."""
    touched = {path for adapter in adapters for path in adapter.by_module}

    def wrap(part: Part) -> Part:
        if part.path not in touched:
            return part
        part = replaced(adapters, part)
        for adapter, φ in found(adapters, part.path):
            alone(adapters, part.path)
            method = METHODS[adapter.method]
            new = method.wrap(adapter.at(part.path), φ, part, adapter.masks.get(part.path))
            part = new if adapter.rows is None else new._replace(run=choose(adapter.rows, new.run, part.run))
        return part

    return wrap


def fits(adapters: Sequence[Adapter], paths: Collection[str]) -> None:
    """An adapter for a module that the model lacks is refused, and a mask for one that the adapter does not adapt."""
    for adapter in adapters:
        elsewhere = hasattr(METHODS[adapter.method], "hooks")  # then the method itself knows its places
        for path, (own, _) in adapter.by_module.items():
            if path not in paths and not (own and elsewhere):
                raise ValueError(f"the adapter has parameters for {path}, a module that the model does not have")
        for path in adapter.masks:
            if path not in adapter.by_module and not elsewhere:
                raise ValueError(f"there is a dropout mask for {path}, a module that the adapter does not adapt")


def replaced(adapters: Sequence[Adapter], part: Part) -> Part:
    """The part with its weight and bias taken from the adapters that carry them; the last one wins. Those of an adapter
    that is for some rows of the batch only are used there, and the part keeps its own W and b."""
    for k, adapter in enumerate(adapters):
        _, whole = adapter.by_module.get(part.path, ({}, {}))
        if not whole:
            continue
        W, b, W_key, b_key = part.W, part.b, part.W_key, part.b_key
        if full := whole.get("weight"):
            W, W_key = stored(part.kind, adapter.params[full]), (k, full)
        if full := whole.get("bias"):
            b, b_key = adapter.params[full], (k, full)
        new = make(part.path, part.kind, W, b, W_key, b_key, part.eps)  # and no longer frozen
        part = new if adapter.rows is None else part._replace(run=choose(adapter.rows, new.run, part.run))
    return part


def alone(adapters: Sequence[Adapter], path: str) -> None:
    if any(a.rows is not None and a.by_module.get(path, ({}, {}))[1] for a in adapters):
        raise ValueError(f"{path} is replaced in some rows of the batch, and cannot be adapted besides")


def check_rows(adapters: Sequence[Adapter], b: int) -> None:
    """`rows` must say of each of the b rows of a batch whether the adapter is for it."""
    for rows in (a.rows for a in adapters if not numbered(a)):
        given = isinstance(rows, list | tuple | np.ndarray)
        if given and not (isinstance(rows, np.ndarray) and rows.dtype == bool and rows.shape == (b,)):
            raise ValueError(f"rows must be an array of booleans, one for each of the {b} rows of ids, found {rows!r}")


def numbered(adapter: Adapter) -> bool:
    """Do its rows say which of several prompts each row of the batch has? Then the method itself checks them."""
    return hasattr(METHODS[adapter.method], "ENSEMBLES") and np.asarray(adapter.rows).dtype.kind in "iu"


def stepwise(adapters: Sequence[Adapter]) -> None:
    """Refuses adapters that read the whole sequence before they act, which decoding step by step does not have."""
    for adapter in adapters:
        reads_all = getattr(METHODS[adapter.method], "reads_all", None)
        if reads_all is not None and (field := reads_all(adapter.config)):
            raise ValueError(f"{adapter.method} with {field} reads the whole sequence and cannot decode step by step")


def by_row(adapters: Sequence[Adapter], which: Array) -> list[Adapter]:
    """The adapters such that row i of the batch gets the one of number which[i], and none where that is negative."""
    return [a.replace(rows=which == k) for k, a in enumerate(adapters)]


def found(adapters: Sequence[Adapter], path: str) -> Iterator[tuple[Adapter, Phi]]:
    """The adapters that have parameters for a module, in order, with these parameters and those of all modules."""
    for k, adapter in enumerate(adapters):
        names, _ = adapter.by_module.get(path, ({}, {}))
        if names and hasattr(METHODS[adapter.method], "wrap"):
            names = {**names, **shared(METHODS[adapter.method])}
            values = {name: adapter.value(full) for name, full in names.items()}
            keys: dict[str, Key] = {name: (k, full) for name, full in names.items() if full in adapter.params}
            yield adapter, Phi(values, keys)
