"""From a method to an adapter, and from a model with adapters to a model without: `init` and `merge`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, found, replaced
from refpeft.method import DEFAULT_TARGETS, Method, Targets, as_dtype, matches, targeted
from refpeft.methods import METHODS
from refpeft.model import Model, Site, adapter_list
from refpeft.ops import Array
from refpeft.part import Part, stored

LINEAR = ("linear", "conv1d")
MATRIX = (*LINEAR, "embedding")


def init(method: str, config: Any, model: Model, seed: int = 0) -> Adapter:
    """A fresh adapter. `config`: the method's Config, or its fields as a dict; drawn from `seed` alone."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: there are {', '.join(METHODS)}")
    m = METHODS[method]
    cfg = configured(m, method, config, model)
    rng = np.random.default_rng(seed)
    params: dict[str, Array] = {}
    frozen: dict[str, Array] = {}
    for role in targets(cfg, model):
        part = model.part(role)
        for name, value in m.init(cfg.at(part.path), part, rng).items():
            (frozen if name in m.FROZEN else params)[f"{part.path}.{key(m, part.kind, name)}"] = value
    params |= {name: model.params[tensor].copy() for name, tensor in saved_whole(cfg, model).items()}
    return Adapter(method, cfg, params, frozen)


def configured(m: Method, method: str, config: Any, model: Model) -> Any:
    """The method's Config, with HF peft's default targets for the family where none are named."""
    if isinstance(config, Mapping):
        unknown = config.keys() - m.Config.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(
                f"{method} has no config field {sorted(unknown)[0]!r}: {', '.join(m.Config.__dataclass_fields__)}"
            )
        config = m.Config(**config)
    if config.target_modules is None:
        config = replace(config, target_modules=DEFAULT_TARGETS[model.config.family])
    return config


def key(m: Method, kind: str, name: str) -> str:
    """A parameter's name in checkpoints."""
    found = m.KEYS[name][kind == "embedding"]
    assert found is not None, f"{name} has no name for a layer of kind {kind}"
    return found


def targets(cfg: Targets, model: Model) -> list[str]:
    """The sites that a config targets. Nothing matched, or something that cannot be adapted, is an error."""
    if cfg.target_modules == "all-linear":
        found = [r for r, s in model.sites.items() if s.kind in LINEAR and r != "head.out"]
        return [r for r in found if not matches(cfg.exclude_modules, model.sites[r].path)]
    found = [role for role, site in model.sites.items() if targeted(cfg, site.path)]
    for role in found:
        if model.sites[role].kind not in MATRIX:
            raise ValueError(
                f"target_modules matches {model.sites[role].path}, a {model.sites[role].kind}, which has no matrix"
            )
    if not found:
        known = sorted({site.path.rpartition(".")[2] for site in model.sites.values() if site.kind in MATRIX})
        raise ValueError(
            f"target_modules {cfg.target_modules!r} matches no module of the model, which has {', '.join(known)}"
        )
    return found


def saved_whole(cfg: Any, model: Model) -> dict[str, str]:
    """Tensors that are trained whole, by the adapter's name for them → the model's: `modules_to_save`, then `bias`."""
    whole: dict[str, str] = {}
    chosen = set(targets(cfg, model))
    for role, site in model.sites.items():
        parents = [site.path.rpartition(".")[0], site.path]
        if any(matches(cfg.modules_to_save, path) for path in parents):
            whole[site.path + ".weight"] = site.weight
            whole[site.path + ".bias"] = site.bias
        elif cfg.bias == "all" or (cfg.bias == "lora_only" and role in chosen):
            whole[site.path + ".bias"] = site.bias
    return {name: tensor for name, tensor in whole.items() if tensor in model.params}


def merge(model: Model, adapter: Adapter | Sequence[Adapter]) -> Model:
    """The model with its adapters folded into its weights; nothing else changes.

    Several adapters add up: W′ = W + Σ (W′ₖ − W), each W′ₖ as its method defines it for the base W (claims L4, D5).
    A tensor that two layers share and only one of them changes is given to each on its own (and no longer tied).
    """
    adapters = adapter_list(adapter)
    params, sites = dict(model.params), dict(model.sites)
    for role in model.sites:
        old = model.part(role)
        W, b = merged_part(adapters, old)
        if W is not old.W:
            sites = untied(sites, params, role)
            params[sites[role].weight] = np.ascontiguousarray(stored(old.kind, W))
        if b is not None and b is not old.b:
            params[sites[role].bias] = b
    used = {s.weight for s in sites.values()} | {s.bias for s in sites.values()}
    source = model.source if sites == dict(model.sites) else {**model.source, "tie_word_embeddings": False}
    return replace(model, params={n: v for n, v in params.items() if n in used}, sites=sites, source=source)


def merged_part(adapters: Sequence[Adapter], part: Part) -> tuple[Array, Array | None]:
    """W′ and b′ of one part; the very arrays of the part where nothing changes them."""
    base = replaced(adapters, part)
    W, b = base.W, base.b
    for n, (adapter, φ) in enumerate(found(adapters, part.path)):
        W1, b1, _ = METHODS[adapter.method].merge(adapter.config.at(part.path), base.W, base.b, φ.values)
        W = W1 if n == 0 else as_dtype(W + (W1 - base.W), W)
        if b1 is not base.b:
            b = b1 if b is base.b or b is None else b + (b1 - base.b if base.b is not None else b1)
    return W, b


def untied(sites: dict[str, Site], params: dict[str, Array], role: str) -> dict[str, Site]:
    """The sites with that one no longer sharing its weight: every layer that did gets the tensor under its own name."""
    tensor = sites[role].weight
    sharing = [r for r, s in sites.items() if s.weight == tensor]
    if len(sharing) == 1:
        return sites
    own = {r: replace(sites[r], weight=sites[r].path + ".weight") for r in sharing}
    params.update({s.weight: params[tensor] for s in own.values()})
    return sites | own
