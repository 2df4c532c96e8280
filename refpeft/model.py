"""The transformer: one, described by data.

`Config` says what it computes, `sites` where each of its layers finds its parameters; a family (GPT-2, LLaMA, BERT, …)
is nothing but a table of these two (`refpeft.checkpoint.families`). Every layer passes through `wrap(part) → part`
before it runs, and the model never learns whether an adapter did something there.

    pre-norm    x ← x + attend(norm x);   x ← x + mlp(norm x);   finally norm
    post-norm   x ← norm(x + attend x);   x ← norm(x + mlp x)

Shapes: ids [b, s] → x [b, s, d] → logits [b, s, v] (language models), [b, labels] (classifiers), or the last hidden
state [b, s, d] where there is no head. A site's name says its place: 'layers.3.attn.q', 'embed.token', 'head.out'.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, each
from refpeft.ops import Array, activations, attention, pick, rope
from refpeft.part import BASE, Back, Grads, Key, Lazy, Once, Part, Run, Want, join, link, make, op_run, plus, stored

Wrap = Callable[[Part], Part]
Cache = Sequence[tuple[Array, Array]]  # per layer: keys and values [b, t, g, e]
Named = dict[str, Array]


@dataclass(frozen=True)
class Config:
    """What the transformer computes. Names as in HF's config.json where one exists."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str  # of `ops.activations`
    gated: bool  # mlp x = down(act(gate x) ⊙ up x), else down(act(up x))
    norm_first: bool
    norm_eps: float
    causal: bool
    head: tuple[str, ...]  # steps after the last layer: sites, activations, 'first' or 'last' (pick one position)
    inv_freq: Array | None = None  # rotary frequencies [e/2]
    positions: str = "index"  # learned positions: 'index' 0, 1, …; 'nonpad': pad_token_id + 1, … counting non-pad ids
    pad_token_id: int | None = None


@dataclass(frozen=True)
class Site:
    """A layer's place in the checkpoint: its module, its kind, and its tensors' names (tied layers share one)."""

    path: str
    kind: str  # 'linear', 'conv1d', 'embedding', 'layer_norm', 'rms_norm'
    weight: str
    bias: str  # a layer has no bias if the checkpoint has no tensor of this name


@dataclass(frozen=True)
class Model:
    """A transformer with its parameters, named as HF names them. `source`: the config.json it came from."""

    config: Config
    sites: Mapping[str, Site]
    params: Mapping[str, Array]
    source: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        ids: Array,
        adapter: Adapter | Sequence[Adapter] | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> tuple[Array, Callable[..., Any]]:
        """out, vjp = model(ids, …);   grads = vjp(dout): the adapter's gradients by name (a list of dicts for a list of
        adapters). vjp(dout, base=True), or base=[names], returns (grads, base_grads)."""
        adapters = adapter_list(adapter)
        out, backs, _ = self.run(each(adapters), ids, attention_mask, token_type_ids, position_ids)

        def vjp(dout: Array, base: bool | Collection[str] = False) -> Any:
            names = self.params.keys() if base is True else base or ()
            wanted = {(BASE, name) for name in names}
            wanted |= {(k, name) for k, a in enumerate(adapters) for name in a.params}
            found = collect(backs, dout, wanted)

            def named(owner: int, params: Mapping[str, Array]) -> Named:
                return {n: found[owner, n] if (owner, n) in found else np.zeros_like(v) for n, v in params.items()}

            per = [named(k, a.params) for k, a in enumerate(adapters)]
            grads: Any = per if isinstance(adapter, Sequence) else (per[0] if per else {})
            return grads if base is False else (grads, named(BASE, {n: self.params[n] for n in names}))

        return out, vjp

    def decode(
        self,
        ids: Array,
        cache: Cache | None = None,
        adapter: Adapter | Sequence[Adapter] | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
    ) -> tuple[Array, Cache]:
        """logits, cache = model.decode(ids, cache): the new positions only, given the keys and values of those before.
        `attention_mask` [b, t] covers both."""
        out, _, present = self.run(each(adapter_list(adapter)), ids, attention_mask, None, position_ids, cache)
        return out, present

    def part(self, role: str) -> Part:
        site = self.sites[role]
        W, b = stored(site.kind, self.params[site.weight]), self.params.get(site.bias)
        return make(site.path, site.kind, W, b, (BASE, site.weight), (BASE, site.bias), self.config.norm_eps)

    def astype(self, dtype: Any) -> "Model":
        """The same model with every parameter in another dtype."""
        return replace(self, params={name: v.astype(dtype) for name, v in self.params.items()})

    def run(
        self,
        wrap: Wrap,
        ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        past: Cache | None = None,
    ) -> tuple[Array, list[Back], Cache]:
        """The forward pass, and the backward passes of its stages in the order in which they ran."""
        c = self.config
        ids = np.asarray(ids) if isinstance(ids, list) else ids
        start = past[0][0].shape[1] if past else 0
        check_ids(self, ids, start)

        def part(role: str) -> Part:
            return wrap(self.part(role))

        mask = visible(c, ids, start, attention_mask)
        x, back = embed(self, part, ids, start, token_type_ids, position_ids)
        turns = rotations(c, x, ids, start, position_ids)
        backs, present = [back], []
        for n in range(c.num_layers):
            at = f"layers.{n}."
            attend, kv = attention_run(self, part, at + "attn.", mask, turns, past[n] if past else None)
            for f, norm in ((attend, at + "attn.norm"), (mlp_run(c, part, at + "mlp."), at + "mlp.norm")):
                x, back = residual(c, part(norm).run, f)(x)
                backs.append(back)
            present.append(kv[0])
        for step in c.head:
            x, back = head_step(self, part, step, ids)(x)
            backs.append(back)
        return x, backs, present


def adapter_list(adapter: Adapter | Sequence[Adapter] | None) -> Sequence[Adapter]:
    return [] if adapter is None else [adapter] if isinstance(adapter, Adapter) else adapter


def collect(backs: list[Back], dout: Array, want: Collection[Key]) -> dict[Key, Array]:
    """Walk the stages from the last to the first, compute what is wanted of each, stop below the last that has any."""
    dy: Lazy = lambda: dout  # noqa: E731
    stages: list[tuple[Lazy, Grads]] = []
    for back in reversed(backs):
        dy, grads = back(dy, want)
        stages.append((dy, grads))
    found: dict[tuple[int, str], Array] = {}
    while any(grads for _, grads in stages):
        dx, grads = stages.pop(0)
        for key, g in grads.items():
            found[key] = found[key] + g() if key in found else g()
        if any(grads for _, grads in stages):
            dx()
    return found


# ── what is seen, and where things stand ─────────────────────────────────────────────────────────────────────────────


def check_ids(model: Model, ids: Array, start: int) -> None:
    """Ids and positions that the model does not have are refused: NumPy would read negative ones from the end."""
    if not isinstance(ids, np.ndarray):
        return
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers [batch, positions], found {ids.dtype} {list(ids.shape)}")
    v = model.params[model.sites["embed.token"].weight].shape[0]
    if ids.size and (ids.min() < 0 or ids.max() >= v):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"token id {bad} is not in the vocabulary, which has {v} entries (0 to {v - 1})")
    if "embed.position" in model.sites:
        n = model.params[model.sites["embed.position"].weight].shape[0]
        n -= 0 if model.config.positions == "index" else (model.config.pad_token_id or 0) + 1
        if start + ids.shape[1] > n:
            raise ValueError(f"a sequence of {start + ids.shape[1]} positions does not fit the model, which has {n}")


def visible(c: Config, ids: Array, start: int, attention_mask: Array | None) -> Array | None:
    """Which keys a query may see, [b or 1, 1, s or 1, t] of bool: those up to its own place if causal, and no padding."""
    s = ids.shape[1]
    mask = None
    if c.causal:
        q, k = np.arange(s, like=ids), np.arange(start + s, like=ids)
        mask = (k[None, :] <= q[:, None] + start)[None, None]
    if attention_mask is None:
        return mask
    keep = (np.asarray(attention_mask) if isinstance(attention_mask, list) else attention_mask)[:, None, None, :] > 0
    return keep if mask is None else keep & mask


def place(c: Config, ids: Array, start: int, position_ids: Array | None) -> Array:
    """Position of each token, [b or 1, s]: as given, or counted from the start (RoBERTa: counting only non-pad ids)."""
    if position_ids is not None:
        return position_ids
    if c.positions == "nonpad":
        real = (ids != c.pad_token_id).astype(ids.dtype)
        return np.cumsum(real, axis=1) * real + c.pad_token_id
    return (np.arange(ids.shape[1], like=ids) + start)[None, :]


def rotations(c: Config, x: Array, ids: Array, start: int, position_ids: Array | None) -> tuple[Array, Array] | None:
    """cos and sin of θ = position · frequency, [b or 1, s, 1, e/2], in the model's dtype (float32 for 16 bits)."""
    if c.inv_freq is None:
        return None
    dtype = x.real.dtype if x.dtype.itemsize > 2 else np.float32
    θ = place(c, ids, start, position_ids)[:, :, None, None].astype(dtype) * c.inv_freq.astype(dtype)
    return np.cos(θ).astype(x.real.dtype), np.sin(θ).astype(x.real.dtype)


# ── stages: each a run, x → y, back ──────────────────────────────────────────────────────────────────────────────────


def embed(
    m: Model, part: Callable[[str], Part], ids: Array, start: int, types: Array | None, position_ids: Array | None
) -> tuple[Array, Back]:
    """x = token[ids] (+ position[place]) (+ type[types]), then a norm if the family has one."""
    inputs = {"embed.token": ids}
    if "embed.position" in m.sites:
        inputs["embed.position"] = place(m.config, ids, start, position_ids)
    if "embed.type" in m.sites:
        inputs["embed.type"] = np.zeros_like(ids) if types is None else types
    terms = {role: part(role).run(i) for role, i in inputs.items()}
    x = sum_of([y for y, _ in terms.values()])
    norm = part("embed.norm").run(x) if "embed.norm" in m.sites else None

    def back(dx: Lazy, want: Want) -> tuple[Lazy, Grads]:
        dx, grads = norm[1](dx, want) if norm else (dx, {})
        for role, (y, back_term) in terms.items():
            _, g = back_term(dx if role != "embed.position" else over_batch(dx, y), want)
            grads = join(grads, g)
        return dx, grads

    return norm[0] if norm else x, back


def sum_of(terms: Sequence[Array]) -> Array:
    total = terms[0]
    for y in terms[1:]:
        total = total + y
    return total


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


def attention_run(
    m: Model,
    part: Callable[[str], Part],
    at: str,
    mask: Array | None,
    turns: tuple[Array, Array] | None,
    past: tuple[Array, Array] | None,
) -> tuple[Run, list[tuple[Array, Array]]]:
    """z = o(attention(q x, k x, v x)), with q and k turned to their positions. Its keys and values are put in the list."""
    kv: list[tuple[Array, Array]] = []
    h, g, e = m.config.num_heads, m.config.num_kv_heads, m.config.head_dim

    def run(x: Array) -> tuple[Array, Back]:
        b, s = x.shape[:2]
        q, k, v, back_qkv = project(m, part, at, x)
        q, k, v = q.reshape(b, s, h, e), k.reshape(b, s, g, e), v.reshape(b, s, g, e)
        back_turn: tuple[Any, ...] = ()
        if turns is not None:
            (q, turn_q), (k, turn_k) = rope(q, *turns), rope(k, *turns)
            back_turn = (turn_q, turn_k)
        if past is not None:
            k, v = np.concatenate([past[0], k], axis=1), np.concatenate([past[1], v], axis=1)
        kv.append((k, v))
        a, vjp = attention(q, k, v, mask)
        z, back_o = part(at + "o").run(a.reshape(b, s, h * e))

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            da, grads_o = back_o(dz, want)
            dq, dk, dv = link(vjp, Once(lambda: da().reshape(b, s, h, e)), 3)
            if back_turn:
                dq, dk = link(back_turn[0], dq, 1)[0], link(back_turn[1], dk, 1)[0]
            dx, grads = back_qkv(dq, dk, dv, want)
            return dx, join(grads_o, grads)

        return z, back

    return run, kv


QkvBack = Callable[[Lazy, Lazy, Lazy, Want], tuple[Lazy, Grads]]


def project(m: Model, part: Callable[[str], Part], at: str, x: Array) -> tuple[Array, Array, Array, QkvBack]:
    """Queries, keys and values: three layers, or one whose outputs lie side by side (GPT-2)."""
    c = m.config
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def flat(d: Lazy, width: int) -> Lazy:
        return Once(lambda: d().reshape(*x.shape[:2], width))

    if at + "qkv" in m.sites:
        y, back_y = part(at + "qkv").run(x)

        def back_fused(dq: Lazy, dk: Lazy, dv: Lazy, want: Want) -> tuple[Lazy, Grads]:
            parts = (flat(dq, wide), flat(dk, narrow), flat(dv, narrow))
            return back_y(Once(lambda: np.concatenate([d() for d in parts], axis=-1)), want)

        return y[..., :wide], y[..., wide : wide + narrow], y[..., wide + narrow :], back_fused

    runs = [part(at + name).run(x) for name in "qkv"]

    def back(dq: Lazy, dk: Lazy, dv: Lazy, want: Want) -> tuple[Lazy, Grads]:
        (dx_q, gq), (dx_k, gk), (dx_v, gv) = (
            run[1](flat(d, w), want) for run, d, w in zip(runs, (dq, dk, dv), (wide, narrow, narrow), strict=True)
        )
        return plus(plus(dx_q, dx_k), dx_v), join(join(gq, gk), gv)

    return runs[0][0], runs[1][0], runs[2][0], back


def mlp_run(c: Config, part: Callable[[str], Part], at: str) -> Run:
    """z = down(act(up x)),   or gated   z = down(act(gate x) ⊙ up x)."""
    act = op_run(activations[c.activation])

    def plain(x: Array) -> tuple[Array, Back]:
        return chain(part(at + "up").run, act, part(at + "down").run)(x)

    def gated(x: Array) -> tuple[Array, Back]:
        a, back_a = chain(part(at + "gate").run, act)(x)
        u, back_u = part(at + "up").run(x)
        z, back_z = part(at + "down").run(a * u)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            d, grads = back_z(dz, want)
            dx_a, grads_a = back_a(Once(lambda: d() * u), want)
            dx_u, grads_u = back_u(Once(lambda: d() * a), want)
            return plus(dx_a, dx_u), join(grads, join(grads_a, grads_u))

        return z, back

    return gated if c.gated else plain


def chain(*runs: Run) -> Run:
    """One after the other."""

    def run(x: Array) -> tuple[Array, Back]:
        backs = []
        for f in runs:
            x, back_f = f(x)
            backs.append(back_f)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            grads: Grads = {}
            for back_f in reversed(backs):
                dy, g = back_f(dy, want)
                grads = join(grads, g)
            return dy, grads

        return x, back

    return run


def head_step(m: Model, part: Callable[[str], Part], step: str, ids: Array) -> Run:
    """A layer, an activation, or the one position that a classifier reads: the first, or the last that is not padding."""
    if step in m.sites:
        return part(step).run
    if step in activations:
        return op_run(activations[step])
    index = np.zeros_like(ids[:, 0]) if step == "first" else last(m.config, ids)
    return op_run(lambda x: pick(x, index))


def last(c: Config, ids: Array) -> Array:
    """Index [b] of the last id that is not padding; of the very last where no padding id is defined."""
    at = np.arange(ids.shape[1], like=ids) + np.zeros_like(ids)
    return (at if c.pad_token_id is None else np.where(ids != c.pad_token_id, at, 0)).max(axis=1)
