"""multi: several adapters in one graph, another one for each row of a batch.

    adapter_ids [b]            −1: none; k: the k-th of the adapters that were exported

LoRA, rsLoRA and AdaLoRA on linear layers are stacked, A [k, r, i] and s B [k, o, r], ranks filled up with zeros: each
row fetches its own, so the cost does not grow with the number of adapters.

    y = y₀ + x A_kᵀ (s B_k)ᵀ           k = adapter_ids of the row; a stack's first is of zeros, for none

Anything else is computed for every row by every adapter, and each row keeps its own, as the specification has it
(`refpeft.by_row`): a task per row with prompts and a head of its own (P-tuning v2), DoRA, trained heads. A soft prompt
would make its rows longer than others and is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.adapter import by_row
from refpeft.export import slots, verification
from refpeft.export.form import (
    Array,
    Check,
    Made,
    Store,
    Subject,
    base_tensors,
    dtypes,
    hooks_of,
    named,
    needed,
    own,
    prefixes,
    symbolic,
    symbols,
    trained,
    with_values,
)
from refpeft.export.forms.unmerged import no_prompts
from refpeft.export.graphs import run
from refpeft.export.precision import Tensor
from refpeft.export.runtime import Runner
from refpeft.export.signature import BATCH, INT
from refpeft.export.symbols import Graph
from refpeft.hooks import Hooks
from refpeft.method import branch
from refpeft.model import Model
from refpeft.part import Back, Part
from refpeft.tune import LINEAR

FOLDS = False
IDS = "adapter_ids"


def check(subject: Subject) -> None:
    if not subject.adapters:
        raise ValueError("the form multi needs adapters, of which each row of a batch picks one")
    for a in subject.adapters:
        if hooks_of([a], subject.model).prompt is not None:
            raise ValueError(f"{a.method} makes a row longer, and the rows of a batch have one length")
    if subject.decode:
        no_prompts(subject)


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    model = symbolic(graph, subject.model, subject.dtype)
    ids = graph.input(IDS, INT, (BATCH,))
    stacks = stacked(subject) if stackable(subject) else None
    hooks, tensors = chosen(subject, graph, model, ids) if stacks is None else fetched(stacks, graph, ids)
    inputs, outputs = run(graph, model, hooks, subject)
    kept = store(needed(graph, outputs, [*base_tensors(subject), *tensors]))
    return Made([*inputs, IDS], outputs, kept, subject.model, card={"stacked": stacks is not None})


def place(ids: Any) -> Any:
    """Of each row's adapter, behind the first, which is none."""
    return np.where(ids < 0, 0, ids + 1)


# ── every adapter for every row ──────────────────────────────────────────────────────────────────────────────────────


def chosen(subject: Subject, graph: Graph, model: Model, ids: Any) -> tuple[Hooks, list[Tensor]]:
    adapters = [trained(a) for a in subject.adapters]
    values, types = named(adapters), dtypes(subject, adapters)
    known = graph.constant([-1, *range(len(adapters))], INT)  # a number that there is not is an error, as in a stack
    rows = by_row(with_values(adapters, symbols(graph, values, types)), known[place(ids)])
    return hooks_of(rows, model), [(name, a, types[name]) for name, a in values.items()]


# ── LoRA, stacked ────────────────────────────────────────────────────────────────────────────────────────────────────


def stackable(subject: Subject) -> bool:
    kinds = {site.path: site.kind for site in subject.model.sites.values()}
    return all(
        a.method in ("lora", "rslora", "adalora")
        and not getattr(a.config, "lora_bias", False)
        and all(own(a, name) for name in a.params)
        and all(kinds[path] in LINEAR for path in a.by_module)
        for a in subject.adapters
    )


def stacked(subject: Subject) -> dict[str, Array]:
    """A [1 + K, r, i] and s B [1 + K, o, r] of every module that any adapter has."""
    fed = slots.slots(subject.adapters, subject.model, subject.dtype)
    found: dict[str, Array] = {}
    for name in dict.fromkeys(n.removeprefix(at) for at in prefixes(subject.adapters) for n in fed if n.startswith(at)):
        each = [fed[at + name].value if at + name in fed else None for at in prefixes(subject.adapters)]
        largest = tuple(max(a.shape[k] for a in each if a is not None) for k in (0, 1))
        stack = np.zeros((len(each) + 1, *largest), np.float32)
        for k, a in enumerate(each):
            if a is not None:
                stack[k + 1, : a.shape[0], : a.shape[1]] = a
        found[name] = stack
    return found


def fetched(stacks: Mapping[str, Array], graph: Graph, ids: Any) -> tuple[Hooks, list[Tensor]]:
    f32 = np.dtype(np.float32)
    tensors = {f"adapters.{name}": a for name, a in stacks.items()}
    values = symbols(graph, tensors, dict.fromkeys(tensors, f32))
    row = place(ids)
    A, B = (f"adapters.{{}}.{slots.INPUT[n]}" for n in "AB")

    def part(p: Part) -> Part:
        if A.format(p.path) not in values:
            return p
        return branch(p, low_rank(values[A.format(p.path)][row], values[B.format(p.path)][row]))

    return Hooks(part=part), [(name, a, f32) for name, a in tensors.items()]


def low_rank(A: Any, B: Any) -> Callable[[Any], tuple[Any, Back]]:
    """z = x A_rᵀ B_rᵀ with A [b, r, i] and B [b, o, r] of each row.      x [b, s, i] or [b, i]"""

    def run(x: Any) -> tuple[Any, Back]:
        wide = x if x.ndim == 3 else x[:, None]
        z = wide @ A.swapaxes(1, 2) @ B.swapaxes(1, 2)
        return (z if x.ndim == 3 else z[:, 0]), slots.untrained

    return run


def checks(subject: Subject) -> list[Check]:
    """Against every row by itself: with every adapter, and with none."""
    n = len(subject.adapters)
    make = verification.kind(subject)
    sizes = [(batch, length) for batch in (1, n + 2) for length in verification.LENGTHS]
    which = [(np.arange(batch) + k) % (n + 1) - 1 for k, (batch, _) in enumerate(sizes)]
    return [fed(make(subject, *size, rows), rows) for size, rows in zip(sizes, which, strict=True)]


def fed(check: Check, which: Array) -> Check:
    def ask(runner: Runner) -> Any:
        return check.ask(runner.feeding({IDS: which}))

    return replace(check, ask=ask)
