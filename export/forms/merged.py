"""merged: the adapters folded into the weights.

The base model's graph, node for node, with other numbers: no cost at run time, and every tool that takes the base model
takes this. Prompts and prefixes have no merge, as they change no weight.
"""

from dataclasses import replace

from refpeft.export import verification, weights
from refpeft.export.form import Check, Made, Store, Subject
from refpeft.export.graphs import run
from refpeft.export.symbols import Graph
from refpeft.hooks import Hooks
from refpeft.tune import mergeable, untied_source

FOLDS = True


def check(subject: Subject) -> None:
    try:
        mergeable(subject.adapters)
    except ValueError as error:
        raise ValueError(f"{error}; --form unmerged keeps it beside the weights") from None


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    """Stored first, one tensor at a time: only merging tells which tied layers part."""
    model, dtype = subject.model, subject.dtype
    sites = dict(model.sites)
    tensors = store((name, a, dtype) for name, a in weights.merged(model, subject.adapters, sites))
    source = model.source if sites == dict(model.sites) else untied_source(model)
    whole = replace(model, sites=sites, source=source)
    params = {name: graph.input(name, dtype, tuple(t.dims)) for name, t in tensors.items()}
    inputs, outputs = run(graph, replace(whole, params=params), Hooks(), subject)
    return Made(inputs, outputs, tensors, whole)


def checks(subject: Subject) -> list[Check]:
    return verification.checks(subject)
