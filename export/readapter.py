"""An adapter file for a folder that is there: `refpeft export --adapter-only FOLDER --adapter A --out FILE`.

Everything that is needed is in the folder: the base weights are in the graph, what the graph takes is in its signature.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.checkpoint.adapters import load_adapter
from refpeft.checkpoint.families import plan
from refpeft.checkpoint.folder import new_file
from refpeft.checkpoint.safetensors import read_json, show
from refpeft.export import adapters as files
from refpeft.export import initialisers, runtime
from refpeft.export.card import needed, whole
from refpeft.export.form import Array, Subject, prefixes
from refpeft.export.forms import FORMS
from refpeft.export.precision import DTYPES, unpacked
from refpeft.export.program import chosen
from refpeft.model import Model


def adapter_only(
    folder: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> dict[str, list[int]]:
    """Write adapters (HF folders), as many as the graph was made with, into a file for it: names and shapes."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already: an export never overwrites anything")
    card = described(Path(folder))
    model = base(Path(folder), card)
    loaded = [load_adapter(path, model) for path in adapters]
    tensors = fitting(card, loaded, model)
    with new_file(out) as part:
        files.write(part, tensors, card.get("base", files.UNSAID))
    return {name: list(a.shape) for name, a in tensors.items()}


def described(folder: Path) -> dict[str, Any]:
    """What refpeft.json says of a folder whose graph takes its adapter from outside."""
    card = whole(folder)
    if not hasattr(FORMS.get(card["form"]), "values"):
        raise ValueError(f"{folder}: its form is {show(card['form'])}, which takes no adapter from outside")
    chosen(card["dtype"], DTYPES, f"{folder}: dtype")
    needed(folder, card, "facts", "unread")
    return card


def base(folder: Path, card: Mapping[str, Any]) -> Model:
    """The base model, from the graph's own weights; of what the graph does not read, zeros."""
    source = read_json(folder / "config.json")
    p = plan(source)
    found = {name: a for path in runtime.graphs(folder) for name, a in initialisers.read(path).items()}
    params: dict[str, Array] = {}
    for site in p.sites.values():
        for tensor, own in ((site.weight, site.path + ".weight"), (site.bias, site.path + ".bias")):
            names = [tensor, *(at + name for at in prefixes(card["adapters"]) for name in (tensor, own))]
            kept = next((found[name] for name in names if name in found), None)  # its own, or what an adapter replaces
            if kept is None and tensor in p.shapes:
                kept = unpacked(found, tensor, site.kind, p.shapes[tensor])
            if kept is None and tensor in p.shapes:
                kept = np.broadcast_to(np.zeros((), DTYPES[card["dtype"]]), p.shapes[tensor])
            if kept is not None:
                params.setdefault(tensor, kept)
    return Model(p.config, p.sites, params, source)


def fitting(card: Mapping[str, Any], adapters: Sequence[Adapter], model: Model) -> dict[str, Array]:
    """What the adapters feed, each tensor one that the graph takes, of its shape."""
    form: Any = FORMS[card["form"]]
    facts = card["facts"]
    if len(adapters) != len(facts):
        raise ValueError(f"the graph takes {len(facts)} adapters together, found {len(adapters)}")
    for adapter, wanted, has in zip(adapters, facts, form.facts(adapters), strict=True):
        for name, value in wanted.items():
            if name in has and has[name] != value:
                raise ValueError(f"{name} is {has[name]} in the {adapter.method} adapter, and {value} in the graph")
    tensors: dict[str, Array] = form.values(Subject(model, adapters, DTYPES[card["dtype"]], card["decode"]))
    for name in card["unread"]:
        tensors.pop(name, None)
    for name, a in tensors.items():
        shape = (card["optional_inputs"] | card["inputs"]).get(name)
        if shape is None:
            raise ValueError(f"the graph has no input {name}, which the {adapters[0].method} adapter needs")
        if len(shape) != a.ndim or any(isinstance(d, int) and d != n for d, n in zip(shape, a.shape, strict=True)):
            raise ValueError(f"the graph takes {name} of shape {shape}, found {list(a.shape)}")
    return tensors
