"""Adapters: what a method adds to a model, and how several of them wrap its parts."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from refpeft.hooks import Hooks, compose
from refpeft.method import Phi, shared
from refpeft.methods import METHODS
from refpeft.ops import Array
from refpeft.part import Key, Part, make, stored

if TYPE_CHECKING:
    from refpeft.model import Model


@dataclass(frozen=True)
class Adapter:
    """A method's config and parameters for one model.

    `params` are all that is trained, by name: '<module>.lora_A.weight', …; a parameter with the name of one of the
    model's own tensors ('score.weight', from `modules_to_save` or `bias`) stands in its place. `frozen` are companions
    that are never trained. `masks` are dropout masks by module, as arguments of the function.
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


def each(adapters: Sequence[Adapter], model: "Model") -> Hooks:
    """The hooks of a model: first the tensors that adapters replace whole, then each adapter's method, in order."""
    own = [getattr(METHODS[adapter.method], "hooks", None) for adapter in adapters]
    others = [hooks(a, k, model) for k, (a, hooks) in enumerate(zip(adapters, own, strict=True)) if hooks]
    wraps = Hooks(part=wrapped(adapters))
    return compose([wraps, *others]) if others else wraps


def wrapped(adapters: Sequence[Adapter]) -> Callable[[Part], Part]:
    """The hook of all methods that adapt one layer at a time."""
    touched = {path for adapter in adapters for path in adapter.by_module}

    def wrap(part: Part) -> Part:
        if part.path not in touched:
            return part
        part = replaced(adapters, part)
        for adapter, φ in found(adapters, part.path):
            method = METHODS[adapter.method]
            part = method.wrap(adapter.at(part.path), φ, part, adapter.masks.get(part.path))
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
    """The part with its weight and bias taken from the adapters that carry them; the last one wins."""
    for k, adapter in enumerate(adapters):
        _, whole = adapter.by_module.get(part.path, ({}, {}))
        for name, full in whole.items():
            W, b, W_key, b_key = part.W, part.b, part.W_key, part.b_key
            if name == "weight":
                W, W_key = stored(part.kind, adapter.params[full]), (k, full)
            else:
                b, b_key = adapter.params[full], (k, full)
            part = make(part.path, part.kind, W, b, W_key, b_key, part.eps)  # and no longer frozen
    return part


def found(adapters: Sequence[Adapter], path: str) -> Iterator[tuple[Adapter, Phi]]:
    """The adapters that have parameters for a module, in order, with these parameters and those of all modules."""
    for k, adapter in enumerate(adapters):
        names, _ = adapter.by_module.get(path, ({}, {}))
        if names and hasattr(METHODS[adapter.method], "wrap"):
            names = {**names, **shared(METHODS[adapter.method])}
            values = {name: adapter.value(full) for name, full in names.items()}
            keys: dict[str, Key] = {name: (k, full) for name, full in names.items() if full in adapter.params}
            yield adapter, Phi(values, keys)
