"""prefix: learned keys and values, fed as the past of the first run.

The graph is that of `--decode`, whoever makes the past: any runtime that decodes with it decodes with a prefix. The
folder holds the prefix as adapter.onnx_adapter, past_key_values.N.key and .value [1, g, n, e] each: one row, to be
repeated for every row of a batch. The attention mask begins with n ones, and positions with n, unless the prefix was
trained without position_shift.

Of an encoder-decoder (`refpeft.export.seq2seq`):

    of the decoder's own attention   past_key_values.N.decoder.key and .value, if the prefix moves positions: a decoder
                                     counts its past, so the past gives its tokens the places behind the prefix
    of that to the encoder           past_key_values.N.encoder.key and .value, for n rows of any numbers that come
                                     before what the encoder answered, and n ones before its mask
    of the encoder                   no past, since it runs once: an optional input, adapter.encoder.prompt_embeddings
                                     [n, 2 L t] as in the form inputs, without rows if it is not fed; and so is
                                     adapter.prompt_embeddings, the decoder's own, where it moves no positions
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, each
from refpeft.export import adapters as files
from refpeft.export import signature, slots, verification
from refpeft.export.form import (
    Array,
    Check,
    Made,
    Store,
    Subject,
    base_tensors,
    fingerprint,
    hooks_of,
    needed,
    own,
    trained,
)
from refpeft.export.form import prefixes as beginnings
from refpeft.export.forms import inputs, unmerged
from refpeft.export.graphs import run
from refpeft.export.precision import Seen
from refpeft.export.runtime import Runner
from refpeft.export.symbols import Graph
from refpeft.hooks import Hooks, compose
from refpeft.methods.prefix_tuning import places
from refpeft.model import Model
from refpeft.prompts import P
from refpeft.stacks import attentions

FOLDS = False
DECODES = True


def check(subject: Subject) -> None:
    found = prefixes(subject.adapters)
    if not found:
        raise ValueError("the form prefix needs an adapter that is a prefix: prefix_tuning")
    if len({a.config.position_shift for a in found}) > 1:
        raise ValueError("position_shift is true in some of these prefixes and false in others")
    whole, aside = attentions(subject.model), outside(subject)
    for a in found:
        left = places(a.config, subject.model)
        if any(len(left[stack]) < len(ats) for stack, ats in whole.items() if stack not in aside):
            raise ValueError(f"leave_out is {list(a.config.leave_out)}, and the past has one length in all layers")
    unmerged.no_prompts(replace(subject, adapters=[a for a in subject.adapters if a.method not in slots.PREFIXES]))


def prefixes(adapters: Sequence[Adapter]) -> list[Adapter]:
    return [a for a in adapters if a.method in slots.PREFIXES]


def outside(subject: Subject) -> list[str]:
    """The stacks (`refpeft.stacks`) whose prefix is no past."""
    if not subject.model.config.encoder_decoder:
        return []
    return ["encoder."] if moves(subject.adapters) else ["encoder.", ""]


def moves(adapters: Sequence[Adapter]) -> bool:
    return all(a.config.position_shift for a in prefixes(adapters))


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    """What else the adapters hold stays beside the weights."""
    rest = [without_prefix(trained(a)) for a in subject.adapters]
    model, hooks, held = unmerged.beside(replace(subject, adapters=[a for a in rest if a.params]), graph)
    taken = slots_of(subject)
    fed = {name: graph.input(name, np.float32, slot.shape) for name, slot in taken.items()}
    encoder, decoder = (compose([hooks, *remembered(subject, model, fed, at)]) for at in ("encoder.", ""))
    names, outputs = run(graph, model, encoder, subject, decoder)
    neutral = [(name, slot.neutral, np.dtype(np.float32)) for name, slot in taken.items()]
    tensors = store(needed(graph, outputs, [*base_tensors(subject), *held, *neutral]))
    card = {"facts": slots.facts(prefixes(subject.adapters)), "unread": []}
    return Made(names, outputs, tensors, subject.model, list(taken), card)


def slots_of(subject: Subject) -> dict[str, slots.Slot]:
    """The optional inputs: of the stacks whose prefix is no past."""
    aside = outside(subject)
    found = slots.slots(prefixes(subject.adapters), subject.model, subject.dtype) if aside else {}
    begin = beginnings(prefixes(subject.adapters))
    return {name: found[name] for name in (at + stack + P for at in begin for stack in aside)}


def remembered(subject: Subject, model: Model, fed: Mapping[str, Any], stack: str) -> list[Hooks]:
    """The hooks of the prefixes that a stack gets by an input of its own; a decoder's moves no positions."""
    found = prefixes(subject.adapters)
    names = {at: at + stack + P for at in beginnings(found)}

    def of_one(a: Adapter, at: str) -> Hooks:
        h = each([trained(a).replace(params={stack + P: fed[names[at]]}, frozen={})], model)
        ats = attentions(model)[stack].values()
        return Hooks(memory=lambda at: h.memory(at) if at in ats else [], shift=h.shift)

    return [of_one(a, at) for a, at in zip(found, names, strict=True) if names[at] in fed]


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
    """What the first run is fed besides its tokens."""
    return {**past(subject), **{name: slot.value.astype(np.float32) for name, slot in slots_of(subject).items()}}


def past(subject: Subject) -> dict[str, Array]:
    """Of each layer, the keys and values that every query sees."""
    types = Seen(subject.model.params, lambda name, a: a.astype(subject.dtype, copy=False))  # of what is looked at
    model = replace(subject.model, params=types)
    hooks = hooks_of([trained(a) for a in prefixes(subject.adapters)], model)
    found: dict[str, Array] = {}
    for at, key, value in caches(subject):
        memories = hooks.memory(at)
        none = np.zeros((1, 0, model.config.num_kv_heads, model.config.head_dim), subject.dtype)
        k, v = (np.concatenate([none, *(getattr(m, kind) for m in memories)], axis=1) for kind in "kv")
        found |= {key: k.swapaxes(1, 2).astype(subject.dtype), value: v.swapaxes(1, 2).astype(subject.dtype)}
    return found


def caches(subject: Subject) -> list[tuple[str, str, str]]:
    """The attentions whose prefix is a past, with the names of its keys and values."""
    model, what = subject.model, "past_key_values"
    if not model.config.encoder_decoder:
        names = signature.caches(model, what)
        return [(f"layers.{n}.attn.", key, value) for n, (key, value) in enumerate(names)]
    kept = {"decoder": "attn.", "encoder": "cross."}
    if "" in outside(subject):
        kept.pop("decoder")
    pairs = [(n, side) for n in range(model.config.num_decoder_layers or 0) for side in kept]
    return [
        (f"decoder.layers.{n}.{kept[side]}", f"{what}.{n}.{side}.key", f"{what}.{n}.{side}.value") for n, side in pairs
    ]


def complete(folder: Path, subject: Subject, made: Made) -> None:
    files.write(folder / inputs.FILE, values(subject), fingerprint(subject))


def checks(subject: Subject) -> list[Check]:
    """With the prefix; of an encoder-decoder, whose graphs have inputs for it, without it too."""
    first, sizes = past(subject), [(b, length) for b in verification.BATCHES for length in verification.LENGTHS]
    if not subject.model.config.encoder_decoder:
        n = shift(subject)
        return [verification.decoded(subject, b, length, None, first, n) for b, length in sizes]
    with_it = [verification.across(subject, b, length, None, first) for b, length in sizes]
    return [*(fed(c, values(subject)) for c in with_it), *map(without, verification.checks(subject))]


def fed(check: Check, given: Mapping[str, Array]) -> Check:
    besides = {name: a for name, a in given.items() if name.startswith("adapter.")}

    def ask(runner: Runner) -> Any:
        return check.ask(runner.feeding(besides))

    return replace(check, ask=ask)


def without(check: Check) -> Check:
    spec: Callable[..., Any] = check.spec
    what = f"no prefix, {check.what}"
    return replace(check, what=what, spec=lambda model, adapters: spec(model, [without_prefix(a) for a in adapters]))
