"""How many parameters a method trains in a model, from shapes alone: GPT-3 175B is counted in a second.

    adapter = outline(method, config, model)       what `init` would give, hollow: the names, shapes and dtypes
    count(adapter, model)                          how many they are, and where

The model may be hollow too (`refpeft.hollow`). Every method says its shapes itself (`shapes`, `outline_model`), beside
the `init` that makes arrays of them.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refpeft import tune
from refpeft.adapter import Adapter, substitutes
from refpeft.hollow import hollow
from refpeft.method import Method, shared
from refpeft.methods import METHODS
from refpeft.model import Model
from refpeft.ops import Array, is_half
from refpeft.part import Part

Shape = tuple[int, ...]


def outline(method: str, config: Any, model: Model) -> Adapter:
    """The adapter that `init` gives, hollow; tensors of the model that it trains whole are the model's own arrays."""
    m, cfg, chosen = tune.prepared(method, config, model)
    if hasattr(m, "outline_model"):
        params, frozen = m.outline_model(cfg, model, chosen)
    elif hasattr(m, "init_model"):  # it does not say its shapes: they are seen in what it makes
        params, frozen = (
            {name: hollow(a.shape, a.dtype) for name, a in made.items()}
            for made in m.init_model(cfg, model, chosen, np.random.default_rng(0))
        )
    else:
        params, frozen = {}, {}
        for part in map(model.part, chosen):
            dtype = np.float32 if is_half(part.W.dtype) else part.W.dtype
            for name, shape in shapes(m, cfg.at(part.path), part).items():
                key = f"{part.path}.{tune.key(m, part.kind, name)}"
                (frozen if name in m.FROZEN else params)[key] = hollow(shape, dtype)
    params |= {name: model.params[tensor] for name, tensor in tune.beside(m, cfg, model).items()}
    return Adapter(method, cfg, params, frozen)


def shapes(m: Method, cfg: Any, part: Part) -> Mapping[str, Shape]:
    """A method's parameters for one part; of one that does not say their shapes, as it makes them."""
    if hasattr(m, "shapes"):
        return m.shapes(cfg, part)
    return {name: a.shape for name, a in m.init(cfg, part, np.random.default_rng(0)).items()}


@dataclass(frozen=True)
class Kind:
    """The same tensors in the same module of every layer: 'layers.*.self_attn.q_proj', in how many of them."""

    module: str
    tensors: Mapping[str, Shape]
    modules: int

    @property
    def parameters(self) -> int:
        return self.modules * sum(map(math.prod, self.tensors.values()))


@dataclass(frozen=True)
class Count:
    """`model`: the parameters of the base, tied ones once. `trained`: those of the adapter. `added`: those of them that
    are not the base's own, trained in place. `companions`: entries of arrays that the adapter has and never trains."""

    model: int
    trained: int
    added: int
    companions: int
    kinds: tuple[Kind, ...]

    @property
    def share(self) -> float:
        """Trained parameters per parameter of the model."""
        return self.trained / self.model

    @property
    def share_of_both(self) -> float:
        """Per parameter of model and adapter together, as HF peft's print_trainable_parameters has it."""
        return self.trained / (self.model + self.added)


def count(adapter: Adapter, model: Model) -> Count:
    own = {name for site in model.sites.values() for name in (f"{site.path}.weight", f"{site.path}.bias")}
    own |= model.params.keys()
    return Count(
        model=size({n: a for n, a in model.params.items() if n not in model.config.buffers}),
        trained=size(adapter.params),
        added=size({n: a for n, a in adapter.params.items() if n not in own or copied(adapter, n)}),
        companions=size(adapter.frozen),
        kinds=tuple(kinds(adapter)),
    )


def size(arrays: Mapping[str, Array]) -> int:
    return sum(a.size for a in arrays.values())


def copied(adapter: Adapter, name: str) -> bool:
    """Is it in a module of `modules_to_save`? HF peft has it twice then, as it was and as it is trained."""
    saved = tuple(getattr(adapter.config, "modules_to_save", None) or ())
    return not substitutes(adapter) and any(path.endswith(saved) for path in prefixes(name.rpartition(".")[0]))


def prefixes(path: str) -> Iterator[str]:
    """'a.b.c' → 'a', 'a.b', 'a.b.c'"""
    parts = path.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)))


def kinds(adapter: Adapter) -> Iterator[Kind]:
    """The trained parameters by kind of module, in the model's order."""
    modules: dict[str, dict[str, Shape]] = {}
    for name, a in adapter.params.items():
        path, leaf = split(adapter, name)
        modules.setdefault(path, {})[leaf] = a.shape
    found: dict[tuple[str, tuple[tuple[str, Shape], ...]], int] = {}
    for path, tensors in modules.items():
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", path), tuple(tensors.items())
        found[key] = found.get(key, 0) + 1
    for (module, shapes_of), n in found.items():
        yield Kind(module, dict(shapes_of), n)


def split(adapter: Adapter, name: str) -> tuple[str, str]:
    """A parameter's module, '' for one of no module, and its name in there."""
    m = METHODS[adapter.method]
    common = tuple(shared(m).values())
    if name in common or name.startswith(tuple(c for c in common if c.endswith("."))):
        return "", name
    keys = [key for pair in m.KEYS.values() for key in pair if key and name.endswith("." + key)]
    leaf = max(keys, key=len, default=name.rpartition(".")[2])
    return name.removesuffix(leaf).removesuffix("."), leaf
