"""From a method to an adapter, and from a model with adapters to a model without: `init` and `merge`."""

import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import UnionType
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, found, replaced, substitutes
from refpeft.config import POOLS
from refpeft.method import DEFAULT_TARGETS, Method, Targets, excluded, targeted
from refpeft.methods import METHODS
from refpeft.model import Model, Site
from refpeft.ops import Array, is_half
from refpeft.part import Part, stored

LINEAR = ("linear", "conv1d")
MATRIX = (*LINEAR, "embedding")


def init(method: str, config: Any, model: Model, seed: int = 0) -> Adapter:
    """A fresh adapter. `config`: the method's Config, or its fields as a dict; drawn from `seed` alone."""
    m, cfg, chosen = prepared(method, config, model)
    rng = np.random.default_rng(seed)
    params: dict[str, Array] = {}
    frozen: dict[str, Array] = {}
    whole_model = getattr(m, "init_model", None)
    if whole_model is not None:
        params, frozen = whole_model(cfg, model, chosen, rng)
    for role in chosen if whole_model is None else ():
        part = model.part(role)
        for name, value in m.init(cfg.at(part.path), part, rng).items():
            (frozen if name in m.FROZEN else params)[f"{part.path}.{key(m, part.kind, name)}"] = value
    params |= {name: model.params[tensor].copy() for name, tensor in beside(m, cfg, model).items()}
    return Adapter(method, cfg, params, frozen)


def prepared(method: str, config: Any, model: Model) -> tuple[Method, Any, list[str]]:
    """The method, its config with what the model says, and the targeted sites."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: there are {', '.join(METHODS)}")
    m = METHODS[method]
    cfg = configured(m, method, config, model)
    chosen = targets(cfg, model) if isinstance(cfg, Targets) else []
    if hasattr(cfg, "fan_in_fan_out"):  # a fact of the layers, which HF peft wants to be told
        cfg = replace(cfg, fan_in_fan_out=all(model.sites[role].kind == "conv1d" for role in chosen))
    return m, cfg, chosen


def configured(m: Method, method: str, config: Any, model: Model) -> Any:
    """The method's Config, with HF peft's default targets for the family where none are named."""
    if isinstance(config, Mapping):
        unknown = config.keys() - m.Config.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(
                f"{method} has no config field {min(unknown, key=str)!r}: {', '.join(m.Config.__dataclass_fields__)}"
            )
        config = {name: sorted(v, key=str) if isinstance(v, set | frozenset) else v for name, v in config.items()}
        check_types(m, config)
        config = m.Config(**config)
    check_expressions(config)
    complete = getattr(m, "complete", None)
    if complete is not None:
        config = complete(config, model)
    if not isinstance(config, Targets):
        return config
    check_patterns(config)
    if config.target_modules is None:
        config = replace(config, target_modules=DEFAULT_TARGETS[model.config.family])
    return config


def check_types(m: Method, fields: Mapping[str, Any]) -> None:
    hints = typing.get_type_hints(m.Config)
    for name, value in fields.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{name} must be {readable(hints[name])}, found {value!r}")


def fits(value: Any, hint: Any) -> bool:
    """Is this a value of the annotated type? An int is a float too, a bool is neither, a str is no sequence."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (typing.Union, UnionType):
        return any(fits(value, h) for h in inner)
    if kind is Sequence:
        return isinstance(value, list | tuple) and all(fits(v, inner[0]) for v in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def readable(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return name.replace("collections.abc.", "").replace("NoneType", "None")


def check_patterns(cfg: Any) -> None:
    """What HF peft refuses in a config."""
    if isinstance(cfg.target_modules, str) and not (cfg.layers_to_transform is None and cfg.layers_pattern is None):
        raise ValueError("layers_to_transform and layers_pattern need target_modules to be a list, found a string")
    if cfg.layers_pattern and cfg.layers_to_transform is None:
        raise ValueError("layers_pattern needs layers_to_transform, which is not set")


def check_expressions(cfg: Any) -> None:
    """Regular expressions that are none: a string for whole paths, or what names parts of them."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = getattr(cfg, name, None)
        check_expression(name, value if isinstance(value, str) else "")
    for name in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        value = getattr(cfg, name, None) or ()
        for pattern in (value,) if isinstance(value, str) else value:
            check_expression(name, pattern)


def check_expression(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {e}") from None


def key(m: Method, kind: str, name: str) -> str:
    """A parameter's name in checkpoints."""
    found = m.KEYS[name][kind == "embedding"]
    assert found is not None, f"{name} has no name for a layer of kind {kind}"
    return found


def targets(cfg: Targets, model: Model) -> list[str]:
    """The sites that a config targets. Nothing matched, or something that cannot be adapted, is an error."""
    if isinstance(cfg.target_modules, str) and cfg.target_modules.lower() == "all-linear":
        found = [r for r, s in model.sites.items() if s.kind in LINEAR and not (r == "head.out" and language(model))]
        return [r for r in found if not excluded(cfg, model.sites[r].path)]
    for path, kind in modules(model).items():
        if kind not in MATRIX and targeted(cfg, path):
            raise ValueError(f"target_modules {cfg.target_modules!r} matches {path}, a {kind}, which has no matrix")
    found = [role for role, site in model.sites.items() if targeted(cfg, site.path)]
    if not found:
        known = sorted({site.path.rpartition(".")[2] for site in model.sites.values() if site.kind in MATRIX})
        raise ValueError(
            f"target_modules {cfg.target_modules!r} matches no module of the model, which has {', '.join(known)}"
        )
    return found


def language(model: Model) -> bool:
    """Are the outputs words, and not classes?"""
    out = model.sites.get("head.out")
    return not set(POOLS) & set(model.config.head) and not (out and out.path == "classifier")


def modules(model: Model) -> dict[str, str]:
    """Every module by its path, with its kind: the layers, and the containers around them."""
    kinds = {site.path: site.kind for site in model.sites.values()}
    parts = [path.split(".") for path in kinds]
    return {".".join(p[:n]): "container" for p in parts for n in range(1, len(p))} | kinds


def beside(m: Method, cfg: Any, model: Model) -> dict[str, str]:
    """What a method's adapter trains whole besides its own; a method that selects tensors names these itself."""
    return {} if hasattr(m, "merge_model") else saved_whole(cfg, model)


def saved_whole(cfg: Any, model: Model) -> dict[str, str]:
    """Tensors that are trained whole, by the adapter's name for them → the model's: `modules_to_save`, then `bias`.

    As in HF peft, an entry of `modules_to_save` stands for every module whose path ends in it, and all that is inside.
    """
    whole: dict[str, str] = {}
    names, bias = getattr(cfg, "modules_to_save", None), getattr(cfg, "bias", "none")
    chosen = set(targets(cfg, model)) if bias.endswith("_only") else set()  # 'lora_only', …
    saved = [path for path in modules(model) if path.endswith(tuple(names or ()))]
    if names and not saved:
        raise ValueError(f"modules_to_save {names!r} matches no module of the model")
    for role, site in model.sites.items():
        if any(site.path == path or site.path.startswith(path + ".") for path in saved):
            whole[site.path + ".weight"] = site.weight
            whole[site.path + ".bias"] = site.bias
        elif bias == "all" or role in chosen:
            whole[site.path + ".bias"] = site.bias
    return {name: tensor for name, tensor in whole.items() if tensor in model.params.keys() - model.config.buffers}


def dropout(
    adapter: Adapter,
    model: Model,
    ids_shape: tuple[int, int],
    seed: int = 0,
    decoder_shape: tuple[int, int] | None = None,
) -> Adapter:
    """The adapter with masks for its `lora_dropout` or `vera_dropout` p on inputs of this shape [b, s]: 0 with
    probability p, else 1/(1 − p), drawn from `seed` alone. Embeddings get none, since their inputs are ids (as in HF
    peft). An encoder-decoder needs the `decoder_shape` too, that of decoder_input_ids."""
    own = getattr(METHODS[adapter.method], "masks", None)
    if own is not None:
        return adapter.replace(masks=own(adapter.config, model, np.random.default_rng(seed), ids_shape, decoder_shape))
    rng, cfg = np.random.default_rng(seed), adapter.config
    p = getattr(cfg, "lora_dropout", getattr(cfg, "vera_dropout", 0.0))
    masks: dict[str, Array] = {}
    for role in targets(adapter.config, model) if p else ():
        part = model.part(role)
        if part.kind in LINEAR:
            sized = decoder_shape if model.config.encoder_decoder and decodes(role) else ids_shape
            if sized is None:
                raise ValueError("an encoder-decoder needs decoder_shape, the shape of decoder_input_ids")
            shape = (*sized[: 1 if role in pooled_roles(model) else 2], part.W.shape[1])
            dtype = np.float32 if is_half(part.W.dtype) else part.W.dtype
            masks[part.path] = np.where(rng.random(shape) < p, 0, 1 / (1 - p)).astype(dtype)
    return adapter.replace(masks=masks)


def decodes(role: str) -> bool:
    """Does a layer of an encoder-decoder run over the decoder's tokens? Cross-attention takes keys from the encoder."""
    return not role.startswith("encoder.") and not role.endswith(("cross.k", "cross.v"))


def pooled_roles(model: Model) -> Sequence[str]:
    """The layers of the head that see one position only."""
    head = model.config.head
    return head[next((n for n, step in enumerate(head) if step in POOLS), len(head)) :]


def merge(model: Model, adapter: Adapter | Sequence[Adapter]) -> Model:
    """The model with its adapters folded into its weights; nothing else changes.

    Several adapters are folded in one after the other, as they run (claims L4, D5).
    A tensor that two layers share and only one of them changes is given to each on its own (and no longer tied);
    where both change it alike, they go on sharing it.
    """
    adapters = model.fitting(adapter)
    mergeable(adapters)
    model, adapters = substituted(model, adapters)
    params, sites = dict(model.params), dict(model.sites)
    for role in model.sites:
        old = model.part(role)
        W, b = merged_part(adapters, old)
        if W is not old.W:
            sites = untied(sites, params, role)
            params[sites[role].weight] = np.ascontiguousarray(stored(old.kind, W))
        if b is not None and b is not old.b:
            params[sites[role].bias] = b
    sites = retied(model.sites, sites, params)
    used = {s.weight for s in sites.values()} | {s.bias for s in sites.values()}
    source = model.source if sites == dict(model.sites) else untied_source(model)
    return replace(model, params={n: v for n, v in params.items() if n in used}, sites=sites, source=source)


def untied_source(model: Model) -> dict[str, Any]:
    """config.json of a model whose head is no longer tied; of a T5, the scale before it was said by the tie."""
    kept = {"scale_decoder_outputs": True} if "scale" in model.config.head else {}
    return {**model.source, "tie_word_embeddings": False, **kept}


def mergeable(adapters: Sequence[Adapter]) -> None:
    for a in adapters:
        m = METHODS[a.method]
        if a.rows is not None:
            raise ValueError("an adapter for some rows of a batch cannot be merged, since weights serve all rows")
        if not (substitutes(a) or hasattr(m, "merge")):
            raise ValueError(f"{a.method} has no merge: what it computes cannot be written as weights of the model")


def substituted(model: Model, adapters: Sequence[Adapter]) -> tuple[Model, list[Adapter]]:
    """The model with the tensors in place that adapters substitute for its own, and the adapters that are left."""
    for adapter in adapters:
        if substitutes(adapter):
            model = METHODS[adapter.method].merge_model(adapter, model)  # type: ignore[attr-defined]
    return model, [a for a in adapters if not substitutes(a)]


def merged_part(adapters: Sequence[Adapter], part: Part) -> tuple[Array, Array | None]:
    """W′ and b′ of one part; the very arrays of the part where nothing changes them."""
    part = replaced(adapters, part)
    W, b = part.W, part.b
    for adapter, φ in found(adapters, part.path):
        W, b, _ = METHODS[adapter.method].merge(adapter.at(part.path), W, b, φ.values, (part.W, part.b))
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


def retied(before: Mapping[str, Site], sites: dict[str, Site], params: dict[str, Array]) -> dict[str, Site]:
    """The sites with those sharing a tensor again that did before, if all of them came out equal."""
    again = dict(sites)
    for tensor in {before[r].weight for r in sites if sites[r] != before[r]}:
        sharing = [r for r, s in before.items() if s.weight == tensor]
        first, *rest = (params[sites[r].weight] for r in sharing)
        if all(np.array_equal(first, other) for other in rest):
            params[tensor] = first
            again |= {r: before[r] for r in sharing}
    return again
