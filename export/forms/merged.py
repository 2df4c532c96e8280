"""merged: the adapters folded into the weights.

The base model's graph, node for node, with other numbers: no cost at run time, and every tool that takes the base model
takes this. Prompts and prefixes have no merge, as they change no weight.
"""

from collections.abc import Iterator
from dataclasses import replace

from refpeft.export import verification, weights
from refpeft.export.form import Check, Made, Store, Subject
from refpeft.export.graphs import run
from refpeft.export.precision import Tensor
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
    shapes: dict[str, tuple[int, ...]] = {}

    def one_by_one() -> Iterator[Tensor]:
        rounded = None if subject.precision.blocks else subject.precision.dtype
        for name, a in weights.merged(model, subject.adapters, sites, rounded):
            shapes[name] = a.shape
            yield name, a, dtype

    tensors = store(one_by_one())
    source = model.source if sites == dict(model.sites) else untied_source(model)
    whole = replace(model, sites=sites, source=source)
    params = {name: graph.input(name, dtype, shape) for name, shape in shapes.items()}
    inputs, outputs = run(graph, replace(whole, params=params), Hooks(), subject)
    return Made(inputs, outputs, tensors, whole)


def checks(subject: Subject) -> list[Check]:
    return verification.checks(subject)
