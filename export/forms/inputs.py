"""inputs: the adapter comes from outside, as optional inputs that do nothing until they are fed.

One session serves the base model and any number of adapters, one after the other, in the slots that the exported
adapter has (`refpeft.export.slots`). The folder holds that adapter as adapter.onnx_adapter, in onnxruntime's format;
`refpeft export --adapter-only FOLDER --adapter OTHER --out other.onnx_adapter` makes one of another adapter.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.export import adapters as files
from refpeft.export import slots, verification
from refpeft.export.form import Array, Check, Made, Store, Subject, base_tensors, fingerprint, needed, symbolic
from refpeft.export.forms.unmerged import no_prompts
from refpeft.export.graphs import run
from refpeft.export.runtime import Runner
from refpeft.export.symbols import Graph
from refpeft.model import Model

FOLDS = False
FILE = "adapter.onnx_adapter"


def check(subject: Subject) -> None:
    if not subject.adapters:
        raise ValueError("the form inputs needs an adapter: what it adapts gets inputs for others of its kind")
    if subject.decode:
        no_prompts(subject)


def found(subject: Subject) -> dict[str, slots.Slot]:
    return slots.slots(subject.adapters, subject.seen, subject.dtype)


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    model = symbolic(graph, subject.model, subject.dtype)
    places = found(subject)
    types = {name: np.dtype(np.float32) if slot.own else subject.dtype for name, slot in places.items()}
    fed = {name: graph.input(name, types[name], slot.shape) for name, slot in places.items()}
    still = slots.kept(subject.adapters)
    fed |= {name: graph.input(name, a.dtype, a.shape) for name, a in still.items()}
    inputs, outputs = run(graph, model, slots.hooks(subject.adapters, fed, model), subject)
    neutral = [(name, slot.neutral, types[name]) for name, slot in places.items()]
    constants = [(name, a, a.dtype) for name, a in still.items()]
    tensors = store(needed(graph, outputs, [*base_tensors(subject), *neutral, *constants]))
    read = [name for name in places if name in tensors]
    unread = [name for name in places if name not in tensors]  # the pooler's, where the model ends before it
    card = {"facts": facts(subject.adapters), "unread": unread}
    return Made(inputs, outputs, tensors, subject.model, read, card)


def facts(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    return slots.facts(adapters)


def complete(folder: Path, subject: Subject, made: Made) -> None:
    tensors = {name: a for name, a in values(subject).items() if name in made.optional}
    files.write(folder / FILE, tensors, fingerprint(subject))


def values(subject: Subject) -> dict[str, Array]:
    """What the subject's adapters feed."""
    return {
        name: slot.value.astype(np.float32 if slot.own else subject.dtype, copy=False)
        for name, slot in found(subject).items()
    }


def checks(subject: Subject) -> list[Check]:
    """With the adapter, from its file, and without: then it is the base model."""
    bare = replace(subject, adapters=[])
    return [*map(with_file, verification.checks(subject)), *map(without, verification.checks(bare))]


def with_file(check: Check) -> Check:
    def ask(runner: Runner) -> Any:
        return check.ask(runner.using(runner.load(runner.folder / FILE)))

    return replace(check, ask=ask)


def without(check: Check) -> Check:
    def spec(model: Model, adapters: Sequence[Adapter]) -> Any:
        return check.spec(model, [])

    return replace(check, spec=spec, what=", ".join(filter(None, ["no adapter", check.what])))
