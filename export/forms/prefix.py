"""prefix: learned keys and values, fed as the past of the first run.

The graph is that of `--decode`, whoever makes the past: any runtime that decodes with it decodes with a prefix. The
folder holds the prefix as adapter.onnx_adapter, past_key_values.N.key and .value [1, g, n, e] each: one row, to be
repeated for every row of a batch. The attention mask begins with n ones, and positions with n, unless the prefix was
trained without position_shift.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.export import adapters as files
from refpeft.export import signature, slots, verification
from refpeft.export.form import Array, Check, Made, Store, Subject, fingerprint, hooks_of, own, trained
from refpeft.export.forms import inputs, unmerged
from refpeft.export.precision import Seen
from refpeft.export.symbols import Graph

FOLDS = False
DECODES = True


def check(subject: Subject) -> None:
    if subject.model.config.encoder_decoder:
        raise ValueError("a prefix of the encoder comes before no past: --form inputs has prefixes from outside")
    if not prefixes(subject.adapters):
        raise ValueError("the form prefix needs an adapter that is a prefix: prefix_tuning")
    if len({a.config.position_shift for a in prefixes(subject.adapters)}) > 1:
        raise ValueError("position_shift is true in some of these prefixes and false in others")
    for a in prefixes(subject.adapters):
        if a.config.leave_out:
            raise ValueError(f"leave_out is {list(a.config.leave_out)}, and the past has one length in all layers")
    unmerged.no_prompts(replace(subject, adapters=[a for a in subject.adapters if a.method not in slots.PREFIXES]))


def prefixes(adapters: Sequence[Adapter]) -> list[Adapter]:
    return [a for a in adapters if a.method in slots.PREFIXES]


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    """What else the adapters hold stays beside the weights."""
    rest = [without_prefix(trained(a)) for a in subject.adapters]
    made = unmerged.make(replace(subject, adapters=[a for a in rest if a.params]), graph, store)
    return replace(made, card={"facts": slots.facts(prefixes(subject.adapters)), "unread": []})


def facts(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """A file holds prefixes and nothing else."""
    for a in adapters:
        if rest := [name for name in a.params if a.method not in slots.PREFIXES or not own(a, name)]:
            raise ValueError(f"the {a.method} adapter holds {rest[0]}, and a file for this graph prefixes only")
    return slots.facts(adapters)


def without_prefix(adapter: Adapter) -> Adapter:
    """What it replaces whole, as an adapter that does nothing else."""
    if adapter.method not in slots.PREFIXES:
        return adapter
    whole = {n: a for n, a in adapter.params.items() if not own(adapter, n)}
    return adapter.replace(method="lora", params=whole, frozen={})


def shift(subject: Subject) -> int:
    n = hooks_of(prefixes(subject.adapters), subject.model).shift
    assert isinstance(n, int)
    return n


def values(subject: Subject) -> dict[str, Array]:
    """Of each layer, the keys and values that every query sees."""
    types = Seen(subject.model.params, lambda name, a: a.astype(subject.dtype, copy=False))  # of what is looked at
    model = replace(subject.model, params=types)
    hooks = hooks_of([trained(a) for a in prefixes(subject.adapters)], model)
    found: dict[str, Array] = {}
    for n, (key, value) in enumerate(signature.caches(model, "past_key_values")):
        memories = hooks.memory(f"layers.{n}.attn.")
        none = np.zeros((1, 0, model.config.num_kv_heads, model.config.head_dim), subject.dtype)
        k, v = (np.concatenate([none, *(getattr(m, kind) for m in memories)], axis=1) for kind in "kv")
        found |= {key: k.swapaxes(1, 2).astype(subject.dtype), value: v.swapaxes(1, 2).astype(subject.dtype)}
    return found


def complete(folder: Path, subject: Subject, made: Made) -> None:
    files.write(folder / inputs.FILE, values(subject), fingerprint(subject))


def checks(subject: Subject) -> list[Check]:
    first, n = values(subject), shift(subject)
    sizes = [(b, length) for b in verification.BATCHES for length in verification.LENGTHS]
    return [verification.decoded(subject, b, length, None, first, n) for b, length in sizes]
