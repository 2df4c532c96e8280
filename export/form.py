"""What a form is, and what all of them share.

A form decides what of a model with its adapters lies in the graph, and what comes in from outside. It is a module of
`refpeft.export.forms` with

    FOLDS                      are the adapters folded into the weights?
    DECODES                    True if its graphs always decode; may be missing
    OPTIONS                    True if it takes options of its own; may be missing
    check(subject)             refuses in one sentence what the form cannot hold
    make(subject, graph, store) → Made      traces the specification, and stores the weights that the trace needs
    checks(subject) → Checks   what is run to prove that the graph is right
    complete(folder, subject, made)      writes what else belongs into the folder; only where there is such a thing
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from onnx import TensorProto

from refpeft.adapter import Adapter, each, substitutes
from refpeft.export.precision import Precision, Tensor, as_stored
from refpeft.export.runtime import Runner
from refpeft.export.symbols import Graph, Symbol
from refpeft.hooks import Hooks
from refpeft.method import shared
from refpeft.methods import METHODS
from refpeft.model import Model
from refpeft.prompts import drop_encoder

Array = np.ndarray[Any, Any]
Outputs = Mapping[str, Symbol]
Answer = Array | Mapping[str, Array]
Spec = Callable[[Model, Sequence[Adapter]], Any]
Store = Callable[[Iterable[Tensor]], dict[str, TensorProto]]


@dataclass(frozen=True)
class Subject:
    """What is exported: a model with adapters, computed in a dtype; `decode`: with keys and values as inputs and
    outputs; `last_logits`: of the last position only; `options`: those of its form; `precision`: of the stored
    weights, if they are not simply in that dtype."""

    model: Model
    adapters: Sequence[Adapter]
    dtype: np.dtype[Any]
    decode: bool = False
    last_logits: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = Precision()  # noqa: RUF009, it is frozen

    @property
    def seen(self) -> Model:
        """The model that the stored weights make."""
        return as_stored(self.precision, self.model)


@dataclass(frozen=True)
class Made:
    """A traced form: inputs by name, outputs, what is stored, and which of that is an input of its own if fed.

    `model` has the config.json that describes what was stored; `card` is what refpeft.json says of the form.
    """

    inputs: Sequence[str]
    outputs: Outputs
    tensors: Mapping[str, TensorProto]
    model: Model
    optional: Sequence[str] = ()
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One comparison: what the specification answers, and how the graph is asked the same; an array, or several by
    name. `amplifies`: it makes much of little, so what rounding explains is seen only by moving all numbers."""

    batch: int
    length: int
    spec: Spec
    ask: Callable[[Runner], Any]
    what: str = ""
    amplifies: bool = False


class Form(Protocol):
    FOLDS: bool

    def check(self, subject: Subject) -> None: ...
    def make(self, subject: Subject, graph: Graph, store: Store) -> Made: ...
    def checks(self, subject: Subject) -> list[Check]: ...


# ── adapters in a graph ──────────────────────────────────────────────────────────────────────────────────────────────


def trained(adapter: Adapter) -> Adapter:
    """The same function without what only training needs: the networks that make prompts and prefixes, and the Cayley
    transform, whose inverse of a matrix ONNX does not have."""
    if adapter.method == "p_tuning":
        return drop_encoder(adapter)
    method = METHODS[adapter.method]
    simpler = getattr(method, "flat", getattr(method, "rotations", None))
    return adapter if simpler is None else cast(Adapter, simpler(adapter))


def prefixes(adapters: Sequence[Adapter]) -> list[str]:
    """What the names of each adapter's parameters begin with in a graph."""
    return ["adapter."] if len(adapters) == 1 else [f"adapter.{k}." for k in range(len(adapters))]


def named(adapters: Sequence[Adapter]) -> dict[str, Array]:
    """All that the adapters hold, by its name in a graph."""
    return {
        at + name: a
        for adapter, at in zip(adapters, prefixes(adapters), strict=True)
        for name, a in (*adapter.params.items(), *adapter.frozen.items())
    }


def with_values(adapters: Sequence[Adapter], values: Mapping[str, Any]) -> list[Adapter]:
    """The adapters with these in place of what they hold."""
    return [
        a.replace(params={n: values[at + n] for n in a.params}, frozen={n: values[at + n] for n in a.frozen})
        for a, at in zip(adapters, prefixes(adapters), strict=True)
    ]


def own(adapter: Adapter, name: str) -> bool:
    """Is it one of the method's own parameters, and does not stand in for a tensor of the model?"""
    if substitutes(adapter):
        return False
    common = shared(METHODS[adapter.method]).values()
    if name in common or name.startswith(tuple(n for n in common if n.endswith("."))):
        return True
    return any(name in φ.values() for φ, _ in adapter.by_module.values())


def dtypes(subject: Subject, adapters: Sequence[Adapter]) -> dict[str, np.dtype[Any]]:
    """Of each adapter's tensors: what stands in for a tensor of the model has the graph's, as it would there; what is
    the method's own is float32, as it is for every model of 16 bits; what is no float stays as it is."""
    found: dict[str, np.dtype[Any]] = {}
    for adapter, at in zip(adapters, prefixes(adapters), strict=True):
        for name, a in (*adapter.params.items(), *adapter.frozen.items()):
            wide = np.dtype(np.float32) if own(adapter, name) else subject.dtype
            found[at + name] = a.dtype if a.dtype.kind in "iub" else wide
    return found


def symbols(graph: Graph, tensors: Mapping[str, Any], types: Mapping[str, np.dtype[Any]]) -> dict[str, Symbol]:
    return {name: graph.input(name, types[name], a.shape) for name, a in tensors.items()}


def symbolic(graph: Graph, model: Model, dtype: np.dtype[Any]) -> Model:
    """The model with symbols in place of its parameters."""
    return Model(model.config, model.sites, {n: graph.input(n, dtype, a.shape) for n, a in model.params.items()})


def needed(graph: Graph, outputs: Outputs, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that the outputs are computed from."""
    live = {x.name for x in graph.live(outputs.values())}
    return [t for t in tensors if t[0] in live]


def base_tensors(subject: Subject) -> list[Tensor]:
    return [(name, a, subject.dtype) for name, a in subject.model.params.items()]


def fingerprint(subject: Subject) -> int:
    """A number above 1 that tells base models apart, by a few numbers of each tensor; and how these are rounded."""
    p = subject.precision
    found = 0 if p.exact else zlib.crc32(repr(p).encode())
    for name, a in sorted(subject.model.params.items()):
        few = a.flat[np.linspace(0, a.size - 1, 64).astype(int)] if a.size else a
        found = zlib.crc32(f"{name} {a.shape}".encode() + np.asarray(few, np.float32).tobytes(), found)
    return 2 + found % (2**31 - 2)


def hooks_of(adapters: Sequence[Adapter], model: Model) -> Hooks:
    """Those of the specification; in a graph that decodes, prompts and prefixes come from outside."""
    return each(model.fitting(adapters), model)
