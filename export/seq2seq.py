"""An encoder-decoder that writes: two graphs over one set of weights, named as optimum names them.

    encoder_model.onnx          input_ids, attention_mask [b, t]  →  last_hidden_state m [b, n + t, d]
    decoder_model_merged.onnx   input_ids [b, s], encoder_attention_mask [b, t], encoder_hidden_states m,
                                past_key_values.N.decoder.key and .value [b, h, past, e],
                                past_key_values.N.encoder.key and .value [b, h, known, e]
                                →  logits [b, s, v] and the same with `present` for `past_key_values`,
                                [b, h, past + s, e] and [b, h, n + t − known, e]

n are the rows that a soft prompt puts before the text, 0 without one. Both pasts may be empty, and one graph does the
first step and all others: of m, the rows from `known` on are turned to keys and values, K = [known; k m[known:]], which
are all at first and none from then on. `present` of the encoder is what is new, so it is empty in all steps but the
first, whose keys and values are fed in all others: as optimum's graphs have it, and whoever runs them. That saves a
copy of them in every step; K is not joined either, but the one or the other (`refpeft.export.lowering`).

A prefix is a past that is there before the first step. One of the attention to the encoder is known for n rows that
come before those of m, whatever these hold, with as many ones before the mask: K = [P_K; k m] (`behind`), which is
joined, and whole in `present`.

Both are traced into one graph of symbols, from which each file takes what its outputs need.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from refpeft.config import Config
from refpeft.export.form import Outputs, Subject
from refpeft.export.signature import BATCH, DECODED, HIDDEN, INT, KNOWN, PAST, SEQUENCE, last, output_name
from refpeft.export.sizes import Size
from refpeft.export.symbols import END, Graph, Symbol
from refpeft.hooks import Hooks
from refpeft.inputs import extended, visible
from refpeft.layers import Encoded, Pair, Parts, encoded_pair, head, stack
from refpeft.model import Model

BEGUN = "prefix_and_past_encoder_sequence"
IDS, DECODER_IDS, MASK, STATES = "input_ids", "decoder_input_ids", "encoder_attention_mask", "encoder_hidden_states"


def caches(c: Config, what: str) -> list[str]:
    """Keys and values of each layer: of the decoder's own attention, then of that to the encoder."""
    layers = range(c.num_decoder_layers or 0)
    return [f"{what}.{n}.{side}.{kind}" for n in layers for side in ("decoder", "encoder") for kind in ("key", "value")]


def inputs(model: Model) -> tuple[list[str], list[str]]:
    """Of the encoder, and of the decoder."""
    return [IDS, "attention_mask"], [DECODER_IDS, MASK, STATES, *caches(model.config, "past_key_values")]


def run(
    graph: Graph, model: Model, hooks: Hooks, subject: Subject, begun: Hooks | None = None
) -> tuple[list[str], Outputs]:
    """Both graphs on inputs of their kinds: their names, and the outputs. `begun`: the hooks of the decoder, if its
    past begins with a prefix."""
    encoded = encoder(graph, model, hooks)
    outputs = decoder(graph, model, hooks if begun is None else begun, subject, begun is not None)
    return [name for names in inputs(model) for name in names], {**encoded, **outputs}


def encoder(graph: Graph, model: Model, hooks: Hooks) -> Outputs:
    ids, mask = (graph.input(name, INT, (BATCH, SEQUENCE)) for name in inputs(model)[0])
    source = model.source_of(hooks, ids, mask)
    x, _, _ = stack(model.parts(hooks), "encoder.", model.config.num_layers, source)
    return {HIDDEN: x}


def decoder(graph: Graph, model: Model, hooks: Hooks, subject: Subject, begun: bool) -> Outputs:
    c, m, dtype = model.config, model.parts(hooks), subject.dtype
    ids = graph.input(DECODER_IDS, INT, (BATCH, DECODED))
    seen = graph.input(MASK, INT, (BATCH, SEQUENCE))
    graph.tell([ids, seen])  # what is the encoder's input is not there
    prompt = hooks.prompt if hooks.prompt and hooks.prompt.length else None
    mask = visible(False, seen, 0, extended(seen, prompt) if prompt else seen)
    rows = seen.shape[1] + (prompt.length if prompt else 0)
    states = graph.input(STATES, dtype, (BATCH, rows, c.hidden_size))
    names = caches(c, "past_key_values")
    lengths = {"decoder": PAST, "encoder": BEGUN if begun else KNOWN}
    shapes = [(BATCH, c.num_heads, lengths[n.split(".")[2]], c.head_dim) for n in names]
    given = [graph.input(n, dtype, s, shown(model, s), loose=True) for n, s in zip(names, shapes, strict=True)]
    past, new = pairs(m, states, [x.swapaxes(1, 2) for x in given])
    target: Any = model.target(seen, ids, None, hooks, past)
    x, _, present = stack(m, "decoder.", c.num_decoder_layers or 0, target, past, Encoded(states, mask))
    logits: Any = head(m, x, target)[0]
    alone = [present[n] if n % 2 == 0 else new[n // 2] for n in range(len(present))]  # own, across, own, …
    kept: list[Any] = [y.swapaxes(1, 2) for pair in (present if begun else alone) for y in pair]
    logits = last(logits, {*graph.live(kept)}, {}) if subject.last_logits else logits
    return {output_name(model): logits, **dict(zip(caches(c, "present"), kept, strict=True))}


def shown(model: Model, shape: Sequence[Any]) -> Sequence[Any]:
    """As the file has it. optimum begins with keys and values of length 0 that are d/h wide, whatever a head's width
    is: of T5's some must be let in so, and what is empty is joined to anything. Those of transformers.js are of no
    text."""
    c = model.config
    return shape if c.num_heads * c.head_dim == c.hidden_size else (*shape[:3], "head_width")


def pairs(m: Parts, states: Symbol, past: Sequence[Symbol]) -> tuple[list[Pair], list[Pair]]:
    """Keys and values [b, t, h, e] of every attention: those of the past, and across [known; k m[known:]]; and those of
    m[known:] alone."""
    found: list[Pair] = []
    new: list[Pair] = []
    rest = Encoded(after(states, past[2].shape[1]), None)
    for n in range(0, len(past), 4):
        k, v, known_k, known_v = past[n : n + 4]
        new_k, new_v, _ = encoded_pair(m, f"decoder.layers.{n // 4}.cross.", rest)
        found += [(k, v), (np.concatenate([known_k, new_k], axis=1), np.concatenate([known_v, new_v], axis=1))]
        new.append((new_k, new_v))
    return found, new


def renewed(past: Iterable[str], first: bool) -> list[str]:
    """The caches that a step gives anew: those of the encoder are kept from the first one on."""
    return [name for name in past if first or ".encoder." not in name]


def after(x: Symbol, n: Size) -> Any:
    """x[:, n:], all of it or less; none where n is all."""
    g = x.graph
    bounds = [g.ints([n]), *(g.constant([k], INT) for k in (END, 1))]
    length: Any = x.shape[1]
    return g.emit("Slice", (x, *bounds), x.dtype, (x.shape[0], length - n, *x.shape[2:]))


def start(c: Config, dtype: Any, batch: int, first: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keys and values before the first step: none, or those of a prefix, of one row each."""
    none = np.zeros((1, c.num_heads, 0, c.head_dim), dtype)
    return {name: np.repeat((first or {}).get(name, none), batch, axis=0) for name in caches(c, "past_key_values")}


def behind(past: Mapping[str, Any], states: Any, mask: Any) -> tuple[Any, Any]:
    """What the encoder answered, and its mask, behind the rows of a prefix, of which keys and values are known."""
    n = max((k.shape[2] for name, k in past.items() if ".encoder." in name), default=0)
    front = np.zeros((states.shape[0], n, *states.shape[2:]), states.dtype)
    return np.concatenate([front, states], axis=1), np.concatenate([np.ones((len(mask), n), mask.dtype), mask], axis=1)
