"""Selection: methods that train some of the model's own tensors whole, and nothing else.

    θ′_S = φ,   θ′ elsewhere = θ            S: names of tensors; φ starts as a copy of θ_S

A method of this kind is a `Config` and `select(cfg, model) → S`; what follows from it is the same for all, and here.

Claims, of every such method:
    S1  At init the model is unchanged, to the bit.
    S2  A tensor is trained wherever it is used: tied layers stay tied, and their gradients add up.
    S3  Merging puts φ in the place of θ_S, exactly; putting θ_S back restores the base.
    S4  What is not selected has no gradient, and costs none.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.hooks import Hooks
from refpeft.ops import Array
from refpeft.part import BASE, Key, Part, make, stored

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.model import Model

Select = Callable[[Any, "Model"], Collection[str]]
Init = Callable[..., tuple[dict[str, Array], dict[str, Array]]]


def copies(select: Select) -> Init:
    """`init_model` of the method that selects these tensors: φ = θ_S, in the model's order."""

    def init_model(cfg: Any, model: "Model", chosen: Sequence[str], rng: np.random.Generator) -> Any:
        params, frozen = originals(select)(cfg, model, chosen)
        return {name: a.copy() for name, a in params.items()}, frozen

    return init_model


def originals(select: Select) -> Init:
    """`outline_model` likewise: θ_S itself."""

    def outline_model(cfg: Any, model: "Model", chosen: Sequence[str]) -> Any:
        names = set(select(cfg, model)) - set(model.config.buffers)
        if not names:
            raise ValueError(f"the model has none of the tensors that {cfg} selects")
        return {name: a for name, a in model.params.items() if name in names}, {}

    return outline_model


def hooks(adapter: "Adapter", k: int, model: "Model") -> Hooks:
    """Each part takes its W and b from φ, where φ has them."""
    for name, a in adapter.params.items():
        if name not in model.params or model.params[name].shape != a.shape:
            found = model.params[name].shape if name in model.params else "no such tensor"
            raise ValueError(f"the adapter has {name!r} of shape {a.shape}, the model {found}")
    return Hooks(part=lambda part: replaced(adapter, k, part))


def replaced(adapter: "Adapter", k: int, part: Part) -> Part:
    φ = adapter.params
    W, b, W_key, b_key = part.W, part.b, part.W_key, part.b_key
    if selected(φ, W_key):
        W, W_key = stored(part.kind, φ[W_key[1]]), (k, W_key[1])
    if selected(φ, b_key):
        b, b_key = φ[b_key[1]], (k, b_key[1])
    if (W_key, b_key) == (part.W_key, part.b_key):
        return part
    return make(part.path, part.kind, W, b, W_key, b_key, part.eps, frozen=part.frozen and W_key[0] == BASE)


def selected(φ: Any, key: Key) -> bool:
    return key[0] == BASE and key[1] in φ


def merge_model(adapter: "Adapter", model: "Model") -> "Model":
    """θ′ = φ where there is one."""
    return replace(model, params={**model.params, **adapter.params})


# ── which tensors ────────────────────────────────────────────────────────────────────────────────────────────────────


def tensors(model: "Model", roles: Iterable[str], leaves: Sequence[str] = ("weight", "bias")) -> list[str]:
    """The tensors of these sites, as far as they have them; a tied one once."""
    names = [getattr(model.sites[role], leaf) for role in roles for leaf in leaves]
    return [name for name in dict.fromkeys(names) if name in model.params]


def inside(model: "Model", modules: Sequence[str] | None) -> list[str]:
    """The sites at or in the modules whose path ends in one of these names (from a dot on); each must be there."""
    for name in modules or ():
        if not any(within(site.path, name) for site in model.sites.values()):
            raise ValueError(f"modules_to_save names {name!r}, a module that the model does not have")
    return [role for role, site in model.sites.items() if any(within(site.path, name) for name in modules or ())]


def within(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."
