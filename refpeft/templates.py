"""Templates with virtual tokens, and answers read off words: how P-tuning puts a question.

    (P₁, x, P₂, [MASK], P₃)       "[P*3] {text} [P*3] capital [MASK] [P*2] ."

    [P]        a virtual token; [P*3] three of them. They are numbered from left to right: ids v, v + 1, …
    [MASK]     a special token, by a name in capitals; so are [CLS] and [SEP], which stand only where they are written
    {text}     a field: the tokens of an example, which come later
    capital    all else is text: hard tokens ("anchors"), kept as they are
    [[ ]] {{ }}  a bracket itself

A piece of text is tokenised as it stands, but for blanks at its end, which only set a bracket apart. So " capital"
keeps the blank that GPT-2's words begin with. What a field begins with is up to its own tokens.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from refpeft.ops import Array, Vjp, linear, op, pick

TOKEN = re.compile(r"\[\[|\]\]|\{\{|\}\}|\[P(?:\*(\d+))?\]|\[([A-Z][A-Z0-9_]*)\]|\{([A-Za-z_]\w*)\}|[\[\]{}]")

Compiled = Sequence[int | str]  # ids, virtual ones from v on, and the names of fields


class Question(NamedTuple):
    """A template, and the words of each label: what a masked language model is asked. Without a mask_id, a model that
    reads from left to right is asked, and answers behind the template, in which there is no [MASK]."""

    template: Compiled
    words: Sequence[Sequence[int]]
    mask_id: int | None = None
    max_length: int | None = None
    first: bool = False  # of the words of a label the first alone


class Filled(NamedTuple):
    """ids [b, s], attention_mask [b, s], and `at` [b]: where the [MASK] of each row is (−1: there is none)."""

    ids: Array
    attention_mask: Array
    at: Array


def compiled(
    template: str,
    tokenise: Callable[[str], Sequence[int]],
    vocabulary: int,
    special: Mapping[str, int] | None = None,
) -> Compiled:
    """The template as ids and names of fields. `tokenise` makes ids of text and adds none of its own; `special` knows
    the ids of special tokens by their names in capitals: {"MASK": 103}; `vocabulary` is v."""
    found: list[int | str] = []
    text, start, virtual = "", 0, 0
    for match in [*TOKEN.finditer(template), None]:
        text += template[start : match.start() if match else None]
        whole = match[0] if match else ""
        start = match.end() if match else start
        if whole in ("[[", "]]", "{{", "}}"):
            text += whole[0]
            continue
        if whole in tuple("[]{}") and match:
            raise ValueError(f"template: {template[match.start() :][:12]!r} is no [P], [P*3], [NAME] or {{field}}")
        found += map(int, tokenise(text.rstrip())) if text.strip() else ()
        text = ""
        if match and whole.startswith("[P") and match[2] is None:
            n = int(match[1] or 1)
            found += range(vocabulary + virtual, vocabulary + virtual + n)
            virtual += n
        elif match:
            found.append(match[3] or known(match[2], special or {}))
    return found


def known(name: str, special: Mapping[str, int]) -> int:
    if name not in special:
        raise ValueError(f"template: [{name}] is no special token: there are {', '.join(special) or 'none'}, and P")
    return special[name]


def virtual_tokens(template: Compiled, vocabulary: int) -> int:
    """How many virtual tokens it has: the adapter's num_virtual_tokens."""
    return sum(isinstance(i, int) and i >= vocabulary for i in template)


def filled(
    template: Compiled,
    examples: Sequence[Mapping[str, Sequence[int]]],
    mask_id: int | None = None,
    pad_id: int = 0,
    max_length: int | None = None,
    left: bool = False,
) -> Filled:
    """A batch: the template with the fields of each example, padded on the right, or on the `left`.

    Where a row is longer than `max_length`, its longest field loses tokens from its end, one at a time."""
    if not examples:
        raise ValueError("there are no examples to fill the template with")
    rows = [row(template, fields, max_length) for fields in examples]
    s = max(map(len, rows))
    ids, keep = np.full((len(rows), s), pad_id, np.int64), np.zeros((len(rows), s), np.int64)
    for k, own in enumerate(rows):
        place = slice(s - len(own), s) if left else slice(len(own))
        ids[k, place], keep[k, place] = own, 1
    there = (ids == mask_id) & (keep > 0) if mask_id is not None else np.zeros_like(ids, bool)
    if (many := there.sum(1).max()) > 1:
        raise ValueError(f"a row has {many} tokens to be filled in ({mask_id}), of which there may be one")
    return Filled(ids, keep, np.where(there.any(1), there.argmax(1), -1))


def row(template: Compiled, fields: Mapping[str, Sequence[int]], max_length: int | None = None) -> list[int]:
    """The ids of one example."""
    names = [i for i in template if isinstance(i, str)]
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"template: there is nothing for {{{missing[0]}}}: the example has {', '.join(fields) or '-'}")
    own = {name: list(fields[name]) for name in names}
    length = len(template) - len(names) + sum(len(own[name]) for name in names)
    while max_length is not None and length > max_length:
        longest = max(own, key=lambda name: len(own[name]), default=None)
        if longest is None or not own[longest]:
            raise ValueError(f"template: {length} tokens without its fields do not fit max_length {max_length}")
        own[longest].pop()
        length -= names.count(longest)
    return [i for piece in template for i in (own[piece] if isinstance(piece, str) else [piece])]


def posed(q: Question, examples: Sequence[Mapping[str, Sequence[int]]], pad_id: int = 0) -> Filled:
    """The template filled, and `at`: the place whose logits are the answer."""
    ids, keep, at = filled(q.template, examples, q.mask_id, pad_id, q.max_length)
    return Filled(ids, keep, at if q.mask_id is not None else keep.sum(1) - 1)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def averaging(words: Sequence[Sequence[int]], vocabulary: int, first: bool = False) -> tuple[Array, Array]:
    """The words that stand for labels, as ids [n], each once, and A [labels, n]:   A[c, w] = [w ∈ W_c]/|W_c|.

    With `first`, the first word of each label is the only one."""
    chosen = [list(dict.fromkeys(label))[: 1 if first else None] for label in words]
    if not chosen or not all(chosen):
        raise ValueError(f"every label needs a word, found {words!r}")
    ids = np.unique(np.concatenate(chosen))
    if ids.dtype.kind not in "iu" or ids[0] < 0 or ids[-1] >= vocabulary:
        raise ValueError(f"words must be token ids from 0 to {vocabulary - 1}, found {words!r}")
    A = np.zeros((len(chosen), len(ids)))
    for c, label in enumerate(chosen):
        A[c, np.searchsorted(ids, label)] = 1 / len(label)
    return ids, A


@op
def verbalizer(z: Array, words: Sequence[Sequence[int]], first: bool = False) -> tuple[Array, Vjp]:
    """y_c = 1/|W_c| Σ_{w ∈ W_c} z_w,   or y_c = z_w for the first w of W_c.      z [… v], words W → y [… labels]

    So softmax(y) is the distribution over the labels, and with one word per label that over their words alone.
    dz = Aᵀ dy at the words, 0 elsewhere.      Schick & Schütze 2021, arXiv 2001.07676, §3.1
    """
    ids, A = averaging(words, z.shape[-1], first)
    W = A.astype(z.real.dtype)
    picked = z[..., ids] if isinstance(z, np.ndarray) else np.concatenate([z[..., i : i + 1] for i in ids.tolist()], -1)
    y, _ = linear(picked, W)

    def dz(dy: Array) -> Array:
        d = np.zeros((*z.shape[:-1], z.shape[-1]), dy.dtype)
        d[..., ids] = dy @ W
        return d

    return y, lambda dy: (lambda: dz(dy), None)


def answers(
    logits: Array, at: Array, words: Sequence[Sequence[int]], first: bool = False
) -> tuple[Array, Callable[[Array], Array]]:
    """The scores of the labels, from the logits where the [MASK] is.      logits [b, s, v], at [b] → y [b, labels]

    Behind a prompt of n rows put before the tokens, `at` is n more. `back(dy)` gives the cotangent of the logits."""
    z, vjp_pick = pick(logits, at)
    y, vjp = verbalizer(z, words, first)

    def back(dy: Array) -> Array:
        dz = vjp(dy)[0]
        assert dz is not None
        dlogits = vjp_pick(dz())[0]
        assert dlogits is not None
        return dlogits()

    return y, back
