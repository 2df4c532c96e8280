"""Hooks: the places at which a method takes hold of a model.

    part(part) → part          a layer: all that adapts weights, and the layer beside them
    block(block) → block       a sublayer with the norm and the residual around it: bottleneck adapters
    memory(at) → memories      keys and values that every query of one attention sees: prefixes
    prompt                     rows before the tokens of each sequence: soft prompts
    shift                      by how many places the positions of the tokens are moved: a number, or [b, 1]

Most methods need the first alone, and define `wrap`, from which their hooks are made; the others define
`hooks(adapter, k, model)`, k being the adapter's place in the list: the gradient of its parameter `name` has the key
(k, name). What a method does not mention it leaves alone. `at` is a role as in the names of sites: 'layers.3.attn.'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from refpeft.ops import Array
from refpeft.part import Grads, Lazy, Once, Part, Run, Want, chain, choose, join


class Block(NamedTuple):
    """A sublayer f with its norm:   pre-norm y = x + f(norm x),   post-norm y = norm(x + f(x)).   `run` is x → y.

    `inner` is x → what is added to x, where that is no longer f(norm x) or f(x) alone."""

    at: str  # 'layers.3.attn.' or 'layers.3.mlp.'
    norm: Run
    f: Run
    norm_first: bool
    run: Run
    inner: Run | None = None

    @property
    def sub(self) -> Run:
        """x → what is added to x."""
        return self.inner or (chain(self.norm, self.f) if self.norm_first else self.f)

    def changed(self, inner: Run, run: Run) -> "Block":
        return self._replace(inner=inner, run=run)


@dataclass(frozen=True)
class Memory:
    """Learned keys and values k, v [1 or b, n, g, e] of one attention. `back(dk, dv, want)` takes their cotangents,
    [b, n, g, e], to the gradients of what they were made from. `seen` [b]: which rows of the batch see them. `placed`:
    where positions are relative, these stand at the n places before the tokens; otherwise they have no place."""

    k: Array
    v: Array
    back: Callable[[Lazy, Lazy, Want], Grads]
    seen: Array | None = None
    placed: bool = False


@dataclass(frozen=True)
class Prompt:
    """Tokens before the others: `ids` [n], or [b, n] for a prompt for each row. Ids from the size of the vocabulary on
    are virtual: the method's own rows, `virtual` in number, appended to it. Where they stand nowhere else in the input,
    `ids` is all there is; a template may also hold virtual ids among its tokens, with `ids` of length 0.

    `placed`: they have positions, before those of the tokens. Otherwise they come without position, type and norm
    before what the embeddings made of the tokens."""

    ids: Array
    virtual: int
    placed: bool = True

    @property
    def length(self) -> int:
        n: int = self.ids.shape[-1]
        return n


@dataclass(frozen=True)
class Hooks:
    part: Callable[[Part], Part] = lambda part: part
    block: Callable[[Block], Block] = lambda block: block
    memory: Callable[[str], Sequence[Memory]] = lambda at: ()
    prompt: Prompt | None = None
    shift: int | Array = 0


def compose(hooks: Sequence[Hooks]) -> Hooks:
    """All of them, in order; one prompt at most."""

    def part(p: Part) -> Part:
        for h in hooks:
            p = h.part(p)
        return p

    def block(b: Block) -> Block:
        for h in hooks:
            b = h.block(b)
        return b

    prompts = [h.prompt for h in hooks if h.prompt is not None]
    if len(prompts) > 1:
        raise ValueError(f"{len(prompts)} adapters bring a prompt, of which a model can take one at a time")
    return Hooks(
        part,
        block,
        lambda at: [m for h in hooks for m in h.memory(at)],
        prompts[0] if prompts else None,
        sum(h.shift for h in hooks),
    )


def only(rows: Array, hooks: Hooks) -> Hooks:
    """The same hooks in those rows of the batch where `rows` [b] holds; in the others, as if there were none."""
    if hooks.prompt is not None:
        raise ValueError("a prompt makes every row of a batch longer, and cannot be given to some rows only")

    def part(p: Part) -> Part:
        q = hooks.part(p)
        return p if q is p else p.wrapped(choose(rows, q.run, p.run))  # with W and b as they are for other rows

    def block(b: Block) -> Block:
        c = hooks.block(b)
        return b if c is b else c.changed(choose(rows, c.sub, b.sub), choose(rows, c.run, b.run))

    def memory(at: str) -> list[Memory]:
        return [replace(m, seen=rows if m.seen is None else m.seen & rows) for m in hooks.memory(at)]

    still = isinstance(hooks.shift, int) and hooks.shift == 0
    return Hooks(part, block, memory, None, 0 if still else rows[:, None] * hooks.shift)


Recall = Callable[[Lazy, Lazy, Want], tuple[Lazy, Lazy, Grads]]


def recall(
    memories: Sequence[Memory], k: Array, v: Array, mask: Array | None
) -> tuple[Array, Array, Array | None, Recall]:
    """[K; k], [V; v] and the mask for both; `back(dk, dv, want)` parts their cotangents again.

    k, v [b, t, g, e], mask [b or 1, 1, s or 1, t] → [b, n + t, g, e], [b or 1, 1, s or 1, n + t]
    """
    widths = [m.k.shape[1] for m in memories]
    empty = np.zeros_like(k[:, 0])[:, None]  # [b, 1, g, e]: a memory for each row of the batch
    keys = np.concatenate([*(m.k + empty for m in memories), k], axis=1)
    values = np.concatenate([*(m.v + empty for m in memories), v], axis=1)
    if any(m.seen is not None for m in memories):  # then rows differ, and the mask must say so of each
        all_seen = np.zeros_like(k[:, :, 0, 0])[:, None, None, :] == 0  # [b, 1, 1, t]
        mask = all_seen if mask is None else mask & all_seen
    if mask is not None:
        mask = np.concatenate([*(columns(mask, m) for m in memories), mask], axis=-1)
    n = sum(widths)

    def back(dk: Lazy, dv: Lazy, want: Want) -> tuple[Lazy, Lazy, Grads]:
        grads: Grads = {}
        start = 0
        for m, w in zip(memories, widths, strict=True):
            grads = join(grads, m.back(cut(dk, start, start + w), cut(dv, start, start + w), want))
            start += w
        return cut(dk, n, None), cut(dv, n, None), grads

    return keys, values, mask, back


def cut(d: Lazy, start: int, stop: int | None) -> Lazy:
    return Once(lambda: d()[:, start:stop])


def columns(mask: Array, memory: Memory) -> Array:
    """The mask of a memory's n places: seen by all queries of the rows that see it.      [b or 1, 1, s or 1, n]"""
    seen = (np.zeros_like(mask[..., 0]) == 0)[..., None] & (np.zeros_like(memory.k[0, :, 0, 0].real) == 0)
    return seen if memory.seen is None else seen & memory.seen[:, None, None, None]
