"""What goes into a graph and what comes out, named as transformers and optimum name it.

    plain     input_ids, attention_mask (, token_type_ids) (, decoder_input_ids)  →  logits or last_hidden_state
    decode    input_ids [b, s], attention_mask [b, past + s], position_ids [b, s],
              past_key_values.N.key and .value [b, g, past, e]  →  logits, present.N.key and .value [b, g, past + s, e]

`past` may be 0: one graph reads the prompt and goes on from there. With `last_logits` the logits are those of the last
position [b, 1, v], which is all that writing needs. An encoder-decoder that decodes: `refpeft.export.seq2seq`.
"""

from collections.abc import Collection, Sequence

import numpy as np

from refpeft.config import POOLS
from refpeft.export.form import Outputs, Subject
from refpeft.export.symbols import Graph, Node, Symbol
from refpeft.hooks import Hooks
from refpeft.model import Model

INT = np.dtype(np.int64)
HIDDEN = "last_hidden_state"
BATCH, SEQUENCE, DECODED = "batch", "sequence", "decoder_sequence"
PAST, KNOWN = "past_sequence", "past_encoder_sequence"
ROWS = "batch_size"  # of a past: transformers.js makes the first one by this name, and axes of other names empty


def run(graph: Graph, model: Model, hooks: Hooks, subject: Subject) -> tuple[list[str], Outputs]:
    """The model on inputs of this kind: their names, and the outputs."""
    return decoding(graph, model, hooks, subject) if subject.decode else plain(graph, model, hooks)


def tokens(graph: Graph, model: Model) -> dict[str, Symbol]:
    """The inputs of a model that reads whole texts."""
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * ("embed.type" in model.sites)
    found = {name: graph.input(name, INT, (BATCH, SEQUENCE)) for name in names}
    if model.config.encoder_decoder:
        found["decoder_input_ids"] = graph.input("decoder_input_ids", INT, (BATCH, DECODED))
    return found


def plain(graph: Graph, model: Model, hooks: Hooks) -> tuple[list[str], Outputs]:
    found = tokens(graph, model)
    ids, attention_mask, *_ = found.values()
    types, decoded = found.get("token_type_ids"), found.get("decoder_input_ids")
    out, _, _ = model.run(hooks, ids, attention_mask, types, decoder_input_ids=decoded)
    return list(found), {output_name(model): out}


def decoding(graph: Graph, model: Model, hooks: Hooks, subject: Subject) -> tuple[list[str], Outputs]:
    c = model.config
    ids = graph.input("input_ids", INT, (BATCH, SEQUENCE))
    shape = (BATCH, c.num_kv_heads, PAST, c.head_dim)
    shown = (ROWS, *shape[1:])
    names = caches(model, "past_key_values")
    past = [[graph.input(name, subject.dtype, shape, shown) for name in pair] for pair in names]
    s, t = ids.shape[1], past[0][0].shape[2]
    mask = graph.input("attention_mask", INT, (BATCH, t + s))
    places = graph.input("position_ids", INT, (BATCH, SEQUENCE))
    cache = [(k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v in past]
    out, _, present = model.run(hooks, ids, mask, None, places, past=cache)
    kept = [x.swapaxes(1, 2) for pair in present for x in pair]
    kept_names = [name for pair in caches(model, "present") for name in pair]
    logits = last(out, {*graph.live(kept)}, {}) if subject.last_logits else out
    found = {"logits": logits, **dict(zip(kept_names, kept, strict=True))}
    inputs: Sequence[Symbol] = [ids, mask, places, *(x for pair in past for x in pair)]
    return [x.node.name for x in inputs], found


ROWWISE = {  # nodes that treat every position alone, if all that has positions is cut
    "Add", "Sub", "Mul", "Div", "Tanh", "Sigmoid", "Relu", "Gelu", "Cast", "LayerNormalization", "RMSNormalization",
    "MatMul",
}  # fmt: skip


def last(y: Symbol, whole: Collection[Node], done: dict[Node, Symbol]) -> Symbol:
    """y[:, −1:], taken as early as can be, so that the head and the last MLP are computed for one position only; what
    is needed as a `whole` anyway is cut where it is."""
    if y.node not in done:
        done[y.node] = cut(y, whole, done)
    return done[y.node]


def cut(y: Symbol, whole: Collection[Node], done: dict[Node, Symbol]) -> Symbol:
    g, x = y.graph, y.node
    shape = (y.shape[0], 1, *y.shape[2:])
    args = [None if a is None else Symbol(g, a) for a in x.args]
    stacks = x.op == "MatMul" and any(a is not None and a.ndim > 2 for a in args[1:])
    if x in whole or x.op not in ROWWISE or stacks:
        ends = [g.constant([k], INT) for k in (-1, np.iinfo(np.int64).max, 1)]
        return g.emit("Slice", (y, *ends), y.dtype, shape)

    def positions(a: Symbol | None) -> bool:
        return a is not None and a.ndim == y.ndim and a.shape[1] == y.shape[1]

    kept = [last(a, whole, done) if a is not None and positions(a) else a for a in args]
    return g.emit(x.op, kept, y.dtype, shape, **x.attrs)


def caches(model: Model, what: str) -> list[tuple[str, str]]:
    """The names of keys and values of each layer."""
    return [(f"{what}.{n}.key", f"{what}.{n}.value") for n in range(model.config.num_layers)]


def output_name(model: Model) -> str:
    return "logits" if "head.out" in model.sites else HIDDEN


def decodes(model: Model) -> None:
    """Only a causal language model writes, alone or behind an encoder."""
    if not model.config.causal or "head.out" not in model.sites or set(POOLS) & set(model.config.head):
        architecture = (model.source.get("architectures") or [model.config.family])[0]
        raise ValueError(f"decoding needs a causal language model, and {architecture} is none")
