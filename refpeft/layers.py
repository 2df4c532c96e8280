"""The stages of the transformer, each a run:   y, back = stage(x)   with the backward pass derived by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from refpeft.config import Config, Site
from refpeft.hooks import Block, Hooks, recall
from refpeft.inputs import Inputs, last
from refpeft.ops import Array, Vjp, activations, attention, pick, rope
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want, chain, join, link, op_run, plus

Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Parts:
    """The model's layers as they are wrapped for one forward pass."""

    config: Config
    sites: Mapping[str, Site]
    part: Callable[[str], Part]
    hooks: Hooks

    def block(self, at: str, f: Run) -> Block:
        """The sublayer f at 'layers.3.attn.', with its norm and the residual."""
        norm = self.part(at + "norm").run
        return self.hooks.block(Block(at, norm, f, self.config.norm_first, residual(self.config, norm, f)))


def embed(m: Parts, inputs: Inputs) -> tuple[Array, Back]:
    """x = token[ids] (+ position[places]) (+ type[types]), then a norm if the family has one.

    The rows of a prompt that has no positions come before all that, as they are."""
    tables: dict[str, Array] = {
        "embed.token": inputs.ids,
        "embed.position": inputs.places,
        "embed.type": inputs.types,
    }
    terms = {role: m.part(role).run(i) for role, i in tables.items() if role in m.sites}
    x = reduce(add, [y for y, _ in terms.values()])
    norm = m.part("embed.norm").run(x) if "embed.norm" in m.sites else None
    y, front = norm[0] if norm else x, None if inputs.front is None else m.part("embed.token").run(inputs.front)

    def back(dx: Lazy, want: Want) -> tuple[Lazy, Grads]:
        dy, grads_front = (dx, {}) if front is None else parted(dx, front, want)
        dx, grads = norm[1](dy, want) if norm else (dy, {})
        grads = join(grads, grads_front)
        for role, (y, back_term) in terms.items():
            _, g = back_term(over_batch(dx, y) if role == "embed.position" else dx, want)
            grads = join(grads, g)
        return dx, grads

    return y if front is None else np.concatenate([front[0], y], axis=1), back


def parted(dx: Lazy, front: tuple[Array, Back], want: Want) -> tuple[Lazy, Grads]:
    """The cotangent of [front; y] parted into that of y and the gradients of what made the front."""
    n = front[0].shape[1]
    _, grads = front[1](Once(lambda: dx()[:, :n]), want)
    return Once(lambda: dx()[:, n:]), grads


def over_batch(dx: Lazy, y: Array) -> Lazy:
    """Positions [1, s, d] are shared by the rows of a batch: their cotangents add up."""
    return Once(lambda: dx().sum(0, keepdims=True) if y.shape[0] == 1 else dx())


def residual(c: Config, norm: Run, f: Run) -> Run:
    """Pre-norm: y = x + f(norm x).   Post-norm: y = norm(x + f(x))."""

    def pre(x: Array) -> tuple[Array, Back]:
        n, back_norm = norm(x)
        z, back_f = f(n)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dn, grads_f = back_f(dy, want)
            dx, grads_norm = back_norm(dn, want)
            return plus(dy, dx), join(grads_f, grads_norm)

        return x + z, back

    def post(x: Array) -> tuple[Array, Back]:
        z, back_f = f(x)
        y, back_norm = norm(x + z)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            d, grads_norm = back_norm(dy, want)
            dx, grads_f = back_f(d, want)
            return plus(d, dx), join(grads_f, grads_norm)

        return y, back

    return pre if c.norm_first else post


def attend(m: Parts, at: str, inputs: Inputs, turns: Pair | None, past: Pair | None) -> tuple[Run, list[Pair]]:
    """z = o(attention(q x, k x, v x)), q and k turned to their places. Its keys and values end up in the list."""
    kept: list[Pair] = []
    h, g, e = m.config.num_heads, m.config.num_kv_heads, m.config.head_dim

    def run(x: Array) -> tuple[Array, Back]:
        b, s = x.shape[:2]
        q, k, v, back_qkv = project(m, at, x)
        q, k, v = q.reshape(b, s, h, e), k.reshape(b, s, g, e), v.reshape(b, s, g, e)
        turned: list[Vjp] = []
        if turns is not None:
            (q, vjp_q), (k, vjp_k) = rope(q, *turns), rope(k, *turns)
            turned = [vjp_q, vjp_k]
        if past is not None:
            k, v = np.concatenate([past[0], k], axis=1), np.concatenate([past[1], v], axis=1)
        kept.append((k, v))
        mask, memories = inputs.mask, m.hooks.memory(at)
        if memories:
            k, v, mask, back_memories = recall(memories, k, v, mask)
        a, vjp = attention(q, k, v, mask)
        z, back_o = m.part(at + "o").run(a.reshape(b, s, h * e))

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            da, grads_o = back_o(dz, want)
            dq, dk, dv = link(vjp, Once(lambda: da().reshape(b, s, h, e)), 3)
            if memories:
                dk, dv, grads_memories = back_memories(dk, dv, want)
                grads_o = join(grads_o, grads_memories)
            if turned:
                dq, dk = link(turned[0], dq, 1)[0], link(turned[1], dk, 1)[0]
            dx, grads = back_qkv(dq, dk, dv, want)
            return dx, join(grads_o, grads)

        return z, back

    return run, kept


QkvBack = Callable[[Lazy, Lazy, Lazy, Want], tuple[Lazy, Grads]]


def project(m: Parts, at: str, x: Array) -> tuple[Array, Array, Array, QkvBack]:
    """Queries, keys and values: three layers, or one whose outputs lie side by side (GPT-2)."""
    c = m.config
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def flat(d: Lazy, width: int) -> Lazy:
        return Once(lambda: d().reshape(*x.shape[:2], width))

    if at + "qkv" in m.sites:
        y, back_y = m.part(at + "qkv").run(x)

        def back_fused(dq: Lazy, dk: Lazy, dv: Lazy, want: Want) -> tuple[Lazy, Grads]:
            parts = (flat(dq, wide), flat(dk, narrow), flat(dv, narrow))
            return back_y(Once(lambda: np.concatenate([d() for d in parts], axis=-1)), want)

        return y[..., :wide], y[..., wide : wide + narrow], y[..., wide + narrow :], back_fused

    (q, back_q), (k, back_k), (v, back_v) = (m.part(at + name).run(x) for name in "qkv")

    def back(dq: Lazy, dk: Lazy, dv: Lazy, want: Want) -> tuple[Lazy, Grads]:
        dx_q, grads_q = back_q(flat(dq, wide), want)
        dx_k, grads_k = back_k(flat(dk, narrow), want)
        dx_v, grads_v = back_v(flat(dv, narrow), want)
        return plus(plus(dx_q, dx_k), dx_v), join(join(grads_q, grads_k), grads_v)

    return q, k, v, back


def mlp(m: Parts, at: str) -> Run:
    """z = down(act(up x)),   or gated   z = down(act(gate x) ⊙ up x)."""
    act = op_run(activations[m.config.activation])

    def plain(x: Array) -> tuple[Array, Back]:
        return chain(m.part(at + "up").run, act, m.part(at + "down").run)(x)

    def gated(x: Array) -> tuple[Array, Back]:
        a, back_a = chain(m.part(at + "gate").run, act)(x)
        u, back_u = m.part(at + "up").run(x)
        z, back_z = m.part(at + "down").run(a * u)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            d, grads = back_z(dz, want)
            dx_a, grads_a = back_a(Once(lambda: d() * u), want)
            dx_u, grads_u = back_u(Once(lambda: d() * a), want)
            return plus(dx_a, dx_u), join(grads, join(grads_a, grads_u))

        return z, back

    return gated if m.config.gated else plain


def head_step(m: Parts, step: str, inputs: Inputs) -> Run:
    """A layer, an activation, or the one position that a classifier reads: the first, or the last but padding."""
    if step in m.sites:
        return m.part(step).run
    if step in activations:
        return op_run(activations[step])
    before = 0 if inputs.front is None else inputs.front.shape[1]
    index = np.zeros_like(inputs.ids[:, 0]) if step == "first" else last(m.config, inputs.ids) + before
    return op_run(lambda x: pick(x, index))


def rotations(c: Config, x: Array, places: Array) -> Pair | None:
    """cos and sin of θ = place · frequency, [b or 1, s, 1, e/2], in the dtype of x (16 bits: from float32)."""
    if c.inv_freq is None:
        return None
    dtype = x.real.dtype
    wide = dtype if dtype.itemsize > 2 else np.dtype(np.float32)
    θ = places[:, :, None, None].astype(wide) * c.inv_freq.astype(wide)
    return np.cos(θ).astype(dtype), np.sin(θ).astype(dtype)
