"""prompt: a soft prompt [n, d] as an input, its rows named by ids from the size of the vocabulary on.

So the rows stand wherever the ids put them: before the text, in a template (P-tuning), another prompt for each row of a
batch; and a graph that decodes reads them like any other token. What else the adapters have is an input as in `inputs`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from refpeft.adapter import Adapter
from refpeft.export import slots
from refpeft.export.form import Array, Check, Made, Store, Subject
from refpeft.export.forms import inputs
from refpeft.export.symbols import Graph
from refpeft.prompts import P

FOLDS = False


def check(subject: Subject) -> None:
    prompts = [a for a in subject.adapters if a.method in slots.PROMPTS]
    if len(prompts) != 1:
        raise ValueError(f"the form prompt needs one adapter that is a soft prompt, found {len(prompts)}")
    inputs.check(replace(subject, adapters=by_id(subject.adapters), decode=False))


def by_id(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, their prompt where the ids put it."""

    def placed(a: Adapter) -> Adapter:
        if getattr(a.config, "placement", None) == "after_embedding":
            raise ValueError(
                "placement 'after_embedding' has rows that are no tokens: export it unmerged, or as inputs"
            )
        return a.replace(config=replace(a.config, placement="template")) if a.method in slots.PROMPTS else a

    return [placed(a) for a in adapters]


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    made = inputs.make(replace(subject, adapters=by_id(subject.adapters)), graph, store)
    (name,) = (n for n in made.optional if n.endswith("." + P))
    return replace(made, card={**made.card, "facts": facts(subject.adapters), "prompt": name})


def complete(folder: Path, subject: Subject, made: Made) -> None:
    inputs.complete(folder, subject, made)


def facts(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """The placement too: who writes with the graph must know whether the rows stand before the text."""
    by_id(adapters)
    return inputs.facts(adapters)


def values(subject: Subject) -> dict[str, Array]:
    return inputs.values(subject)


def checks(subject: Subject) -> list[Check]:
    """With virtual tokens anywhere among the others."""

    def placed(check: Check) -> Check:
        return replace(check, spec=lambda model, adapters: check.spec(model, by_id(adapters)))

    return [placed(c) for c in inputs.checks(replace(subject, adapters=by_id(subject.adapters)))]
