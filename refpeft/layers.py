"""The stages of the transformer, each a run:   y, back = stage(x)   with the backward pass derived by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add

import numpy as np

from refpeft.config import Config, Site
from refpeft.hooks import Block, Hooks, Memory, recall
from refpeft.inputs import Inputs, ends, last
from refpeft.ops import Array, Vjp, activations, attention, pick, rope
from refpeft.part import INNER, Back, Grads, Key, Lazy, Once, Part, Run, Want, chain, join, link, op_run, plus
from refpeft.relative import buckets

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


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of its tokens, x [b, t, d]; which of them the decoder may see; the key of its cotangent."""

    x: Array
    mask: Array | None
    key: Key = (INNER, "encoder")


def stack(
    m: Parts, at: str, layers: int, inputs: Inputs, past: Sequence[Pair] | None = None, encoded: Encoded | None = None
) -> tuple[Array, list[Back], list[Pair]]:
    """Embeddings, layers and final norm of one stack ('encoder.', 'decoder.', or '' where there is one only): the
    output, the backward passes in the order in which they ran, and the keys and values of its attentions."""
    x, back = embed(m, at, inputs)
    backs, present = [back], []
    turns, bias = rotations(m.config, x, inputs.places), distances(m, at, inputs.ids, past)
    before = iter(past or ())
    for n in range(layers):
        here = f"{at}layers.{n}."
        attention, kept = attend(m, here + "attn.", inputs.mask, turns, bias, next(before, None))
        sublayers = [(here + "attn.", attention)]
        if encoded is not None:
            across, kept_across = attend_across(m, here + "cross.", encoded, next(before, None))
            sublayers.append((here + "cross.", across))
        for sublayer, f in (*sublayers, (here + "mlp.", mlp(m, here + "mlp."))):
            x, back = m.block(sublayer, f).run(x)
            backs.append(back)
        present += kept if encoded is None else [*kept, *kept_across]
    if at + "final.norm" in m.sites:
        x, back = m.part(at + "final.norm").run(x)
        backs.append(back)
    return x, backs, present


def embed(m: Parts, at: str, inputs: Inputs) -> tuple[Array, Back]:
    """x = α token[ids] (+ position[places]) (+ type[types]), then a norm if the family has one.

    The rows of a prompt that has no positions come before all that, as they are."""
    tables: dict[str, Array] = {
        "embed.token": inputs.ids,
        at + "embed.position": inputs.places,
        at + "embed.type": inputs.types,
    }
    runs = {role: m.part(role).run for role in tables if role in m.sites}
    token = runs["embed.token"] = scaled(runs["embed.token"], m.config.embed_scale)
    terms = {role: run(tables[role]) for role, run in runs.items()}
    x = reduce(add, [y for y, _ in terms.values()])
    norm = m.part(at + "embed.norm").run(x) if at + "embed.norm" in m.sites else None
    y, front = norm[0] if norm else x, None if inputs.front is None else token(inputs.front)

    def back(dx: Lazy, want: Want) -> tuple[Lazy, Grads]:
        dy, grads_front = (dx, {}) if front is None else parted(dx, front, want)
        dx, grads = norm[1](dy, want) if norm else (dy, {})
        grads = join(grads, grads_front)
        for role, (y, back_term) in terms.items():
            _, g = back_term(over_batch(dx, y) if role == at + "embed.position" else dx, want)
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


def scaled(f: Run, α: float) -> Run:
    """y = α f(x)"""
    if α == 1:
        return f

    def run(x: Array) -> tuple[Array, Back]:
        y, back = f(x)
        return α * y, lambda dy, want: back(Once(lambda: α * dy()), want)

    return run


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────

Bias = Callable[[Sequence[Memory]], tuple[Array, Back]]


def attend(
    m: Parts, at: str, mask: Array | None, turns: Pair | None, bias: Bias | None, past: Pair | None
) -> tuple[Run, list[Pair]]:
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
        kept[:] = [(k, v)]  # a method may run this for some rows, and again for others
        z, back_z = mixed(m, at, q, k, v, mask, bias)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dq, dk, dv, grads_z = back_z(dz, want)
            if turned:
                dq, dk = link(turned[0], dq, 1)[0], link(turned[1], dk, 1)[0]
            dx, grads = back_qkv(dq, dk, dv, want)
            return dx, join(grads_z, grads)

        return z, back

    return run, kept


def attend_across(m: Parts, at: str, encoded: Encoded, past: Pair | None) -> tuple[Run, list[Pair]]:
    """z = o(attention(q x, k m, v m)), m what the encoder made. With `past`, k m and v m are known."""
    kept: list[Pair] = []
    h, e = m.config.num_heads, m.config.head_dim

    def run(x: Array) -> tuple[Array, Back]:
        b, s = x.shape[:2]
        q, back_q = m.part(at + "q").run(x)
        k, v, back_kv = encoded_pair(m, at, encoded) if past is None else (*past, lambda dk, dv, want: {})
        kept[:] = [(k, v)]  # a method may run this for some rows, and again for others
        z, back_z = mixed(m, at, q.reshape(b, s, h, e), k, v, encoded.mask, None)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dq, dk, dv, grads = back_z(dz, want)
            dx, grads_q = back_q(Once(lambda: dq().reshape(b, s, h * e)), want)
            return dx, join(join(grads, grads_q), back_kv(dk, dv, want))

        return z, back

    return run, kept


def encoded_pair(m: Parts, at: str, encoded: Encoded) -> tuple[Array, Array, Callable[[Lazy, Lazy, Want], Grads]]:
    """k m and v m [b, t, g, e]; their cotangents go to the encoder too, if it has something to learn."""
    (k, back_k), (v, back_v) = (m.part(at + name).run(encoded.x) for name in "kv")
    shape = (*k.shape[:2], m.config.num_kv_heads, m.config.head_dim)

    def back(dk: Lazy, dv: Lazy, want: Want) -> Grads:
        dm_k, grads_k = back_k(Once(lambda: dk().reshape(k.shape)), want)
        dm_v, grads_v = back_v(Once(lambda: dv().reshape(v.shape)), want)
        dm: Grads = {encoded.key: plus(dm_k, dm_v)} if encoded.key in want else {}
        return join(join(grads_k, grads_v), dm)

    return k.reshape(shape), v.reshape(shape), back


MixedBack = Callable[[Lazy, Want], tuple[Lazy, Lazy, Lazy, Grads]]


def mixed(
    m: Parts, at: str, q: Array, k: Array, v: Array, mask: Array | None, bias: Bias | None
) -> tuple[Array, MixedBack]:
    """z = o(attention(q, [K; k], [V; v])), K and V the memories that a method has put there.      z [b, s, d]"""
    memories = m.hooks.memory(at)
    if memories:
        k, v, mask, back_memories = recall(memories, k, v, mask)
    B, back_B = bias(memories) if bias else (None, None)
    a, vjp = attention(q, k, v, mask, B, scale=m.config.attention_scale)
    b, s, h, e = a.shape
    z, back_o = m.part(at + "o").run(a.reshape(b, s, h * e))

    def back(dz: Lazy, want: Want) -> tuple[Lazy, Lazy, Lazy, Grads]:
        da, grads = back_o(dz, want)
        dq, dk, dv, _, dB = link(vjp, Once(lambda: da().reshape(b, s, h, e)), 5)
        if back_B:
            grads = join(grads, back_B(dB, want)[1])
        if memories:
            dk, dv, grads_memories = back_memories(dk, dv, want)
            grads = join(grads, grads_memories)
        return dq, dk, dv, grads

    return z, back


def distances(m: Parts, at: str, ids: Array, past: Sequence[Pair] | None) -> Bias | None:
    """The bias B [1, h, s, n + t] of a stack with relative positions. Its layers share the table, so gradients add up.

    Keys of a memory that is `placed` stand before those of the tokens, at −n … −1; others have no place, and no bias.
    """
    if at + "embed.relative" not in m.sites or m.config.relative is None:
        return None
    part, (n, longest) = m.part(at + "embed.relative"), m.config.relative
    s, start = ids.shape[1], past[0][0].shape[1] if past else 0
    queries = np.arange(start, start + s, like=ids)[:, None]

    @cache
    def columns(before: int) -> tuple[Array, Back]:
        """[s, t, h] for the tokens, or for the places `before` them."""
        keys = np.arange(before, like=ids) - before if before else np.arange(start + s, like=ids)
        return part.run(buckets(keys - queries, n, longest, both=not m.config.causal_at(at)))

    def bias(memories: Sequence[Memory]) -> tuple[Array, Back]:
        terms = [(columns(k.k.shape[1]), k.placed) for k in memories] + [(columns(0), True)]
        B = np.concatenate([y if placed else np.zeros_like(y) for (y, _), placed in terms], axis=1)
        starts = np.cumsum([0] + [memory.k.shape[1] for memory in memories]).tolist()

        def back(dB: Lazy, want: Want) -> tuple[Lazy, Grads]:
            grads: Grads = {}
            for ((_, back_y), placed), a, z in zip(terms, starts, [*starts[1:], None], strict=True):
                own = Once(lambda a=a, z=z: dB()[0, :, :, a:z].transpose(1, 2, 0))
                grads = join(grads, back_y(own, want)[1]) if placed else grads
            return dB, grads

        return B.transpose(2, 0, 1)[None], back

    return bias


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


def head(m: Parts, x: Array, inputs: Inputs) -> tuple[Array, list[Back]]:
    """The steps after the last layer."""
    backs = []
    for step in m.config.head:
        x, back = head_step(m, step, inputs)(x)
        backs.append(back)
    return x, backs


def head_step(m: Parts, step: str, inputs: Inputs) -> Run:
    """A layer, an activation, the scale d^−½, or the one position that a classifier reads."""
    if step in m.sites:
        return m.part(step).run
    if step in activations:
        return op_run(activations[step])
    if step == "scale":
        return scaled(lambda x: (x, lambda dy, want: (dy, {})), m.config.hidden_size**-0.5)
    before = 0 if inputs.front is None else inputs.front.shape[1]
    if step == "eos":
        index = ends(m.config.eos_token_id, inputs.source)
    else:
        index = np.zeros_like(inputs.ids[:, 0]) if step == "first" else last(m.config, inputs.ids) + before
    return op_run(lambda x: pick(x, index))


def rotations(c: Config, x: Array, places: Array) -> Pair | None:
    """cos and sin of θ = place · frequency, [b or 1, s, 1, e/2], in the dtype of x (16 bits: from float32)."""
    if c.inv_freq is None:
        return None
    dtype = x.real.dtype
    wide = dtype if dtype.itemsize > 2 else np.dtype(np.float32)
    θ = places.astype(wide)[:, :, None] * c.inv_freq.astype(wide)
    return np.cos(θ).astype(dtype)[:, :, None], np.sin(θ).astype(dtype)[:, :, None]
