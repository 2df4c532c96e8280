"""Token by token: how graphs that decode are asked for the logits behind the tokens so far.

    step = alone(runner, rows)          rows of ids, padded on the left
    logits = step(None)                 [b, v], of the token behind each row
    logits = step(tokens)               and behind the tokens [b] that were chosen

The keys and values stay with the runtime from one step to the next; only the last logits are looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refpeft.config import Config
from refpeft.export import runtime, seq2seq
from refpeft.export.runtime import Runner
from refpeft.export.signature import HIDDEN

Array = np.ndarray[Any, Any]
Step = Callable[[Array | None], Array]
PAST = "past_key_values."


def alone(runner: Runner, rows: Sequence[Sequence[int]], prefix: Mapping[str, Array], shift: int) -> Step:
    """One graph, which reads the rows and writes on. `prefix`: keys and values before them, of one row; `shift`: by
    how much it moves their positions."""
    ids, mask = padded(rows, left=True)
    places = np.maximum(mask.cumsum(1) - 1, 0) + shift
    past = first(runner, len(rows), prefix)
    mask = np.concatenate([np.ones((len(rows), seen(past)), np.int64), mask], axis=1)

    def step(chosen: Array | None) -> Array:
        nonlocal ids, mask, places, past
        if chosen is not None:
            ids, places = chosen[:, None], places[:, -1:] + 1
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        new = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        logits, past = answer(runner, new, past, list(past))
        return logits

    return step


def across(runner: Runner, rows: Sequence[Sequence[int]], c: Config, start: int, prefix: Mapping[str, Array]) -> Step:
    """Two graphs: the encoder reads the rows, once; what is written begins with `start`. `prefix`: keys and values
    before all others, of one row."""
    ids, mask = padded(rows, left=False)
    assert runner.encoder is not None
    (states,) = runner.encoder.run_values(values({"input_ids": ids, "attention_mask": mask}), [HIDDEN], looked=0)
    kind = next(i.type for i in runner.session.get_inputs() if i.name.startswith(PAST))
    begin = seq2seq.start(c, np.float16 if "float16" in kind else np.float32, len(rows), prefix)
    if prefix:
        shown, mask = seq2seq.behind(begin, states.numpy(), mask)
        states = values({seq2seq.STATES: shown})[seq2seq.STATES]
    known = {seq2seq.STATES: states, **values({seq2seq.MASK: mask})}
    past: Mapping[str, Any] = values(begin)

    def step(chosen: Array | None) -> Array:
        nonlocal past
        new = np.full(len(rows), start) if chosen is None else chosen
        renewed = seq2seq.renewed(past, first=chosen is None)
        logits, present = answer(runner, {"input_ids": new[:, None]}, {**known, **past}, renewed)
        past = {**past, **present}
        return logits

    return step


def padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[Array, Array]:
    """ids and mask [b, s]"""
    s = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), s), np.int64)
    for k, row in enumerate(rows):
        at = slice(s - len(row), s) if left else slice(0, len(row))
        ids[k, at], mask[k, at] = row, 1
    return ids, mask


def first(runner: Runner, b: int, prefix: Mapping[str, Array]) -> dict[str, Any]:
    """The keys and values before the first token."""
    found = {}
    for i in runner.session.get_inputs():
        if i.name.startswith(PAST):
            _, g, _, e = i.shape
            none = np.zeros((1, g, 0, e), np.float16 if "float16" in i.type else np.float32)
            found[i.name] = np.repeat(prefix.get(i.name, none), b, axis=0)
    return values(found)


def seen(past: Mapping[str, Any]) -> int:
    return int(next(iter(past.values())).shape()[2])


def values(arrays: Mapping[str, Array]) -> dict[str, Any]:
    ort = runtime.require()
    return {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


def answer(
    runner: Runner, new: Mapping[str, Array], known: Mapping[str, Any], caches: Sequence[str]
) -> tuple[Array, dict[str, Any]]:
    """The logits of the last place of each row [b, v], and those keys and values with the new ones."""
    wanted = ["logits", *(name.replace(PAST, "present.") for name in caches)]
    logits, *present = runner.run_values({**values(new), **known}, wanted)
    last: Array = logits.numpy()[:, -1].astype(np.float64)
    return last, dict(zip(caches, present, strict=True))
