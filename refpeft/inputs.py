"""What goes into a model besides its parameters: token ids, who may see whom, and where each token stands."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refpeft.config import Config
from refpeft.hooks import Prompt
from refpeft.ops import Array


@dataclass(frozen=True)
class Inputs:
    """ids [b, s], mask [b or 1, 1, s or 1, t] (None: all is seen), types [b, s] or None, places [b or 1, s];
    front [b, n] or None: ids of the rows that come before what the embeddings make of those; source [b, t] or None:
    of a decoder, the ids that the encoder was given."""

    ids: Array
    mask: Array | None
    types: Array | None
    places: Array
    front: Array | None = None
    source: Array | None = None


def read(
    c: Config,
    ids: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    start: int = 0,
    sizes: tuple[int | None, int | None, int | None] = (None, None, None),
    prompt: Prompt | None = None,
    shift: int | Array = 0,
    causal: bool = False,
    side: str = "",
) -> Inputs:
    """Checked, and completed by what HF takes where nothing is given. `start`: how many positions came before.
    `sizes`: how many tokens, positions and types there are (None: no such table). A `prompt` is put before the tokens
    unless positions came before; `shift`, a number or [b, 1], moves the places of all tokens. `side`: 'decoder_' in the
    names of a decoder's inputs."""
    ids, attention_mask, token_type_ids, position_ids = (
        np.asarray(a) if isinstance(a, list | tuple) else a for a in (ids, attention_mask, token_type_ids, position_ids)
    )
    virtual = prompt.virtual if prompt else 0
    check(f"{side}input_ids" if side else "ids", ids, ("batch", "positions"), sizes[0] and sizes[0] + virtual)
    b, s = ids.shape
    check("token_type_ids", token_type_ids, (b, s), sizes[2])
    most = shift.max() if isinstance(shift, np.ndarray) else shift if isinstance(shift, int) else 0
    if position_ids is not None and c.relative:
        raise ValueError(f"a {c.family} model has relative positions, but position_ids were given")
    before = 0 if prompt is None else prompt.length  # places that the mask of a longer sequence does not mention
    moved = before if prompt and prompt.placed else 0
    taken = most + (moved if isinstance(moved, int) else 0)
    last_place = None if sizes[1] is None else sizes[1] - taken - c.position_offset
    check("position_ids", position_ids, (len(position_ids) if is_row(position_ids) else b, s), last_place)
    if prompt is not None and isinstance(ids, np.ndarray) and np.ndim(prompt.ids) == 2 and len(prompt.ids) != b:
        raise ValueError(f"a prompt is given for each of {len(prompt.ids)} rows, but the batch has {b}")
    check(f"{side}attention_mask", attention_mask, (b, (start - before if before and start else start) + s), None)
    unused = c.position_offset if c.positions == "index" else (c.pad_token_id or 0) + 1
    room = None if sizes[1] is None else sizes[1] - unused
    placed = 0 if start else moved
    counted = isinstance(ids, np.ndarray) and position_ids is None and room is not None
    if counted and (length := start + s + placed + most) > room:
        raise ValueError(f"a sequence of {length} positions does not fit the model, which has {room}")
    if token_type_ids is not None and sizes[2] is None:
        raise ValueError(f"a {c.family} model has no token types, but token_type_ids were given")
    types = np.zeros_like(ids) if token_type_ids is None and sizes[2] is not None else token_type_ids
    front = None
    if prompt is not None and prompt.length:
        attention_mask = extended(attention_mask, prompt)
        if not start and prompt.placed:
            ids, types, position_ids = prefixed(prompt, ids, types, position_ids)
        elif not start:
            front = prompt.ids + np.zeros_like(ids[:, 0])[:, None]
            mask = visible(causal, np.concatenate([front, ids], axis=1), 0, attention_mask)
            return Inputs(ids, mask, types, place(c, ids, shift, position_ids), front)
        elif position_ids is not None:
            position_ids = position_ids + moved
        elif not prompt.placed:
            shift = shift - prompt.length  # which are among the positions that came before
    places = place(c, ids, shift if position_ids is not None else start + shift, position_ids)
    return Inputs(ids, visible(causal, ids, start, attention_mask), types, places)


def extended(attention_mask: Array | None, prompt: Prompt) -> Array | None:
    """The mask of tokens with a prompt before them, which everyone sees."""
    if attention_mask is None:
        return None
    front = np.zeros_like(attention_mask[:, 0])[:, None] + (np.zeros_like(prompt.ids) + 1)
    return np.concatenate([front, attention_mask], axis=1)


def prefixed(prompt: Prompt, ids: Array, types: Array | None, places: Array | None) -> tuple[Array, Any, Any]:
    """ids, types and places of [prompt; tokens]: type 0, and places before those of the tokens."""
    n = prompt.length
    front = prompt.ids + np.zeros_like(ids[:, 0])[:, None]
    ids = np.concatenate([front, ids], axis=1)
    if types is not None:
        types = np.concatenate([np.zeros_like(front), types], axis=1)
    if places is not None:
        places = np.concatenate([np.zeros_like(places[:, 0])[:, None] + np.arange(n, like=ids), places + n], axis=1)
    return ids, types, places


def check(name: str, a: Any, shape: tuple[Any, ...], size: int | None) -> None:
    """NumPy would read a negative id from the end and stretch a mask of another shape: both are refused."""
    if not isinstance(a, np.ndarray):
        return
    wanted = f"[{', '.join(map(str, shape))}]"
    named = isinstance(shape[0], str)
    if (a.ndim != 2 if named else a.shape != shape) or (a.dtype.kind not in "iu" and name != "attention_mask"):
        raise ValueError(f"{name} must be integers {wanted}, found {a.dtype} {list(a.shape)}")
    low, high = (a.min(), a.max()) if size is not None and a.size else (0, -1)
    if size is not None and (low < 0 or high >= size):
        bad = low if low < 0 else high
        raise ValueError(f"{name} holds {bad}, but the model has {size} entries there (0 to {size - 1})")


def is_row(a: Any) -> bool:
    """[1, s], which serves all rows of a batch."""
    return isinstance(a, np.ndarray) and a.ndim == 2 and a.shape[0] == 1


def visible(causal: bool, ids: Array, start: int, attention_mask: Array | None) -> Array | None:
    """A query may see the keys up to its own place if the stack is causal, and no padding."""
    s = ids.shape[1]
    mask = None
    if causal:
        q, k = np.arange(start, start + s, like=ids), np.arange(start + s, like=ids)
        mask = k <= q[:, None]
    if attention_mask is None:
        return None if mask is None else mask[None, None]
    keep = attention_mask[:, None, None, :] > 0
    return keep if mask is None else keep & mask


def place(c: Config, ids: Array, start: int | Array, given: Array | None = None) -> Array:
    """Position of each token, counted from the start; RoBERTa counts non-padding ids only, from pad_token_id + 1. Those
    that are given are moved by the start."""
    start = start + c.position_offset if c.position_offset else start
    if given is not None:
        return given + start
    if c.positions == "nonpad":
        real = (ids != c.pad_token_id).astype(ids.dtype)
        return (np.cumsum(real, axis=1) + start) * real + c.pad_token_id
    return np.arange(ids.shape[1], like=ids)[None, :] + start


def shift_right(ids: Array, start_id: int, pad_id: int, ignored: int = -100) -> Array:
    """What a decoder reads to predict `ids`: those before each, after `start_id`; padding where they are ignored."""
    before = np.concatenate([np.zeros_like(ids[:, :1]) + start_id, ids[:, :-1]], axis=1)
    return np.where(before == ignored, pad_id, before)


def ends(eos_id: int | None, ids: Array) -> Array:
    """Index [b] of the last end-of-text token of each row, which must have one."""
    found = ids == eos_id
    if isinstance(ids, np.ndarray) and not found.any(1).all():
        raise ValueError(f"every row of ids must hold eos_token_id {eos_id}, whose place the classifier reads")
    return np.where(found, np.arange(ids.shape[1], like=ids), 0).max(axis=1)


def last(c: Config, ids: Array) -> Array:
    """Index [b] of the last id that is not padding; of the very last where no padding id is defined."""
    at = np.arange(ids.shape[1], like=ids) + np.zeros_like(ids)
    return (at if c.pad_token_id is None else np.where(ids != c.pad_token_id, at, 0)).max(axis=1)
