"""Bottleneck adapters as AdapterHub's `adapters` saves them.

adapter_config.json     {"config": the fields of its BnConfig, "name": the adapter's, "version": …, …}
adapter.safetensors     <module>.adapters.<name>.adapter_down.0.weight [m, d], .bias; adapter_up.…; and as the config
                        has them gate.…, scaling, adapter_norm_before.…, adapter_norm_after.…
head_config.json, model_head.safetensors      the head, where one was saved with it

AdapterHub writes pytorch_adapter.bin unless it is told `use_safetensors=True`. A pickle can run code, so it is refused.

With `ln_before`, adapter_down.0 is that norm a second time and adapter_down.1 is what adapter_down.0 is otherwise.
AdapterHub 1.3.0 cannot write this as safetensors (the two names share one tensor), but reads it: here both are written.

What is beyond AdapterHub stands in its config as further fields, and what is trained whole in adapter.safetensors by
the model's own names, from where AdapterHub loads it into the model too. A config with `normed_input` has another
`architecture`, at which AdapterHub stops, since it would compute something else. Of a head in a folder of AdapterHub's,
what is equal to the model's own, to the bit, is not held to be trained.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import __version__, bottleneck, tune
from refpeft.adapter import Adapter
from refpeft.checkpoint import folder, safetensors
from refpeft.checkpoint.families import FAMILIES
from refpeft.checkpoint.safetensors import Malformed, show, take
from refpeft.methods import METHODS as ALL
from refpeft.model import Model
from refpeft.ops import Array, is_half

METHODS: Collection[str] = ("houlsby", "pfeiffer", "parallel")
PEFT_TYPES: Collection[str] = ()
CONFIG, FILE = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG, HEAD = "head_config.json", "model_head.safetensors"
NAME, NORMED = "default", "refpeft_normed_parallel"
CONVERT = (
    "only safetensors files are read, since pickle can run any code: convert it with `name = "
    "model.load_adapter({folder!r}); model.save_adapter(new_folder, name, use_safetensors=True)` of AdapterHub"
)
DEFAULTS = {  # what AdapterHub's BnConfig takes for a field that is missing, where it is not what ours takes
    "init_weights": "bert", "original_ln_before": False, "train_norms": False, "is_parallel": False, "scaling": 1.0,
}  # fmt: skip
REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
OWN = ("train_norms", "modules_to_save", "normed_input")
IGNORED = {  # without influence on the function, while phm_layer is off
    "init_weights_seed", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W", "shared_W_phm",
    "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm",
    "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
}  # fmt: skip
RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version, as adapter-transformers 1 wrote them
FIRST = ("adapter_norm_before.weight", "adapter_norm_before.bias")


def recognises(raw: Mapping[str, Any]) -> bool:
    """Is this the adapter_config.json of a bottleneck adapter of AdapterHub's?"""
    config = raw.get("config")
    return "peft_type" not in raw and isinstance(config, Mapping) and config.get("architecture") in (None, NORMED)


def read_folder(where: Path, raw: Mapping[str, Any], model: Model) -> Adapter:
    """The adapter of a folder with this adapter_config.json, for this model."""
    return read(raw, in_folder(where, model), model)


def in_folder(where: Path, model: Model) -> Mapping[str, Array]:
    """The tensors of an adapter in AdapterHub's folder, with those of a head that was trained with it."""
    tensors = folder.tensors(where, "adapter", CONVERT)
    if (where / HEAD_CONFIG).is_file():
        if safetensors.read_json(where / HEAD_CONFIG).get("config") is not None:
            raise Malformed(f"{HEAD_CONFIG}: heads of AdapterHub's own kinds are not supported: save with_head=False")
        head = folder.tensors(where, "model_head", CONVERT)
        tensors = {**tensors, **trained(head, model)}
    return tensors


def named(raw: Mapping[str, Any]) -> str:
    """The adapter's name, which is part of the names of its tensors."""
    name = raw.get("name")
    if not isinstance(name, str) or not name:
        raise Malformed(f"{CONFIG}: name must be the name of the adapter, found {show(name)}")
    return name


def base_of(model: Model) -> str:
    """'bert.', with which the names of models with a head begin, and not those of models without."""
    base = FAMILIES[model.config.family].base
    return base if not base or base.endswith(".") else base + "."


def trained(head: Mapping[str, Array], model: Model) -> dict[str, Array]:
    """The tensors of those layers of a head of which one differs from the model's own."""
    found: dict[str, Array] = {}
    known: set[str] = set()
    for site in model.sites.values():
        own = {f"{site.path}.{leaf}": getattr(site, leaf) for leaf in ("weight", "bias")}
        own = {name: tensor for name, tensor in own.items() if tensor in model.params}
        known |= own.keys() | set(own.values())
        there = {name: head[n] for name, tensor in own.items() for n in (name, tensor) if n in head}
        if any(not np.array_equal(a, model.params[own[name]]) for name, a in there.items()):
            found |= there
    if unknown := head.keys() - known:
        raise Malformed(f"{HEAD}: tensor {show(min(unknown))} is not one that the model has")
    return found


def read(raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> Adapter:
    """The adapter, every tensor of it accounted for."""
    try:
        method, cfg = read_config(raw, tensors, model)
    except ValueError as e:
        raise Malformed(f"{CONFIG}: {e}") from None
    name, base = named(raw), base_of(model)
    rest = {unnamed(n, name).removeprefix(base): a for n, a in tensors.items()}
    params: dict[str, Array] = {}
    for p in bottleneck.places(replace(cfg, leave_out=()), model):
        stem = p.module.removeprefix(base) + ".adapters."
        if p.layer not in cfg.leave_out or any(n.startswith(stem) for n in rest):
            params |= one(cfg, p, rest, stem, model)
    for n, tensor in whole(cfg, model).items():
        params[n] = take(FILE, rest, n.removeprefix(base), model.params[tensor].shape, model.params[tensor].dtype)
    if rest:
        raise Malformed(f"{FILE}: tensor {show(min(rest))} is not one that this adapter has")
    return Adapter(method, cfg, params)


def one(
    cfg: bottleneck.Config, p: bottleneck.Place, rest: dict[str, Array], stem: str, model: Model
) -> dict[str, Array]:
    """The parameters at one place, taken out of the tensors left."""
    like = model.params[model.sites[p.last].weight].dtype
    dtype = np.float32 if is_half(like) else like
    params = {
        bottleneck.name(p, symbol): take(FILE, rest, stem + stored(bottleneck.leaf(symbol), cfg), shape, dtype)
        for symbol, shape in bottleneck.shapes(cfg, p.layer, model).items()
    }
    for s in ("weight", "bias") if cfg.ln_before else ():
        once, name = params[f"{p.module}.adapters.adapter_norm_before.{s}"], f"{stem}adapter_down.0.{s}"
        if not np.array_equal(take(FILE, rest, name, once.shape, dtype), once):
            raise Malformed(f"{FILE}: {name} must be equal to adapter_norm_before.{s}, found other values")
    return params


def read_config(raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> tuple[str, bottleneck.Config]:
    config = {n: v for n, v in raw["config"].items() if v is not None}
    architecture = config.pop("architecture", None)
    for n in REQUIRED:
        if n not in config:
            raise ValueError(f"config.{n} is missing")
    if bool(config.get("normed_input")) != (architecture == NORMED):
        raise ValueError(f"config.normed_input and config.architecture contradict each other: {show(architecture)}")
    known = {f.name for f in fields(bottleneck.Config)}
    for n, value in config.items():
        if n not in known | IGNORED and value not in (False, "", [], {}):
            raise ValueError(f"config.{show(n)} is set to {show(value)}, which is not supported")
    given = DEFAULTS | {n: v for n, v in config.items() if n in known}
    both = given["mh_adapter"] and given["output_adapter"]
    method = "parallel" if given["is_parallel"] else "houlsby" if both else "pfeiffer"
    tune.check_types(ALL[method], given)
    if "version" not in raw:
        given["non_linearity"] = RENAMED.get(given["non_linearity"], given["non_linearity"])
    if heads := heads_in(tensors, model, given):
        given["modules_to_save"] = [*(given.get("modules_to_save") or ()), *heads]
    cfg: bottleneck.Config = tune.configured(ALL[method], method, given, model)
    return method, cfg


def heads_in(tensors: Mapping[str, Array], model: Model, given: Mapping[str, Any]) -> list[str]:
    """The layers that the file holds whole, and the config does not name."""
    named = given.get("modules_to_save") or ()
    there = [s.path for s in model.sites.values() if s.path + ".weight" in tensors or s.path + ".bias" in tensors]
    norms = {n.rpartition(".")[0] for n in bottleneck.norms(model)} if given.get("train_norms") else set()
    return [path for path in there if path not in norms and not path.endswith(tuple(named) or ("\0",))]


def whole(cfg: bottleneck.Config, model: Model) -> dict[str, str]:
    """What is trained whole: the adapter's name for it → the model's."""
    return (bottleneck.norms(model) if cfg.train_norms else {}) | tune.saved_whole(cfg, model)


def unnamed(name: str, adapter: str) -> str:
    """A tensor's name without the adapter's."""
    return name.replace(f".adapters.{adapter}.", ".adapters.", 1)


def stored(name: str, cfg: bottleneck.Config) -> str:
    """A parameter's name in the file, but for the adapter's."""
    return name.replace("adapter_down.", f"adapter_down.{1 if cfg.ln_before else 0}.")


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]:
    """adapter_config.json and the tensors."""
    cfg: bottleneck.Config = adapter.config
    known = {f.name: getattr(cfg, f.name) for f in fields(bottleneck.Config)}
    config = {n: list(v) if isinstance(v, tuple) else v for n, v in known.items() if n not in OWN or v}
    config["scaling"] = cfg.scaling if isinstance(cfg.scaling, str) else float(cfg.scaling)
    if isinstance(cfg.reduction_factor, Mapping):
        config["reduction_factor"] = dict(cfg.reduction_factor)
    config |= {"phm_layer": False, "inv_adapter": None} | ({"architecture": NORMED} if cfg.normed_input else {})
    tensors: dict[str, Array] = {}
    for name, a in adapter.params.items():
        ours = ".adapters." in name
        full = stored(name, cfg).replace(".adapters.", f".adapters.{NAME}.", 1) if ours else name
        tensors[full] = a
        if ours and cfg.ln_before and name.endswith(FIRST):
            tensors[full.replace("adapter_norm_before.", "adapter_down.0.")] = a
    sizes = {a.shape[-1] for name, a in adapter.params.items() if name.endswith(".adapters.adapter_down.weight")}
    about = {"name": NAME, "version": f"refpeft.{__version__}", "model_name": None, "hidden_size": max(sizes)}
    return {"config": config, **about}, tensors
