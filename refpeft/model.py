"""The transformer: one, described by data.

`Config` says what it computes, `sites` where each of its layers finds its parameters; a family (GPT-2, LLaMA, BERT, …)
is nothing but a table of these two (`refpeft.checkpoint.families`). Every layer passes through `part(part) → part`
before it runs, and some other places through hooks of their own (`refpeft.hooks`); the model never learns whether an
adapter did something there.

    pre-norm    x ← x + attend(norm x);   x ← x + mlp(norm x);   finally norm
    post-norm   x ← norm(x + attend x);   x ← norm(x + mlp x)

Shapes: ids [b, s] → x [b, s, d] → logits [b, s, v] (language models), [b, labels] (classifiers), or the last hidden
state [b, s, d] where there is no head. A site's name says its place: 'layers.3.attn.q', 'embed.token', 'head.out'.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, check_rows, each, fits, stepwise
from refpeft.config import Config, Site
from refpeft.hooks import Hooks
from refpeft.inputs import read
from refpeft.layers import Pair, Parts, attend, embed, head_step, mlp, rotations
from refpeft.ops import Array
from refpeft.part import BASE, Back, Grads, Key, Lazy, Part, make, stored

__all__ = ["Cache", "Config", "Model", "Site", "adapter_list"]

Cache = Sequence[Pair]  # per layer: keys and values [b, t, g, e]
Named = dict[str, Array]


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
        adapters = self.fitting(adapter, ids)
        inputs = (ids, attention_mask, token_type_ids, position_ids)
        out, backs, _ = self.run(each(adapters, self), *inputs)
        shape = out.shape

        def vjp(dout: Array, base: bool | Collection[str] = False) -> Any:
            if dout.shape != shape:
                raise ValueError(f"dout must have the shape of the output, {shape}, found {dout.shape}")
            names = self.params.keys() if base is True else base or ()
            if missing := set(names) - self.params.keys():
                raise ValueError(f"the model has no parameter {min(missing)!r}")
            wanted = {(BASE, name) for name in names}
            wanted |= {(k, name) for k, a in enumerate(adapters) for name in a.params}
            # a frozen base does not keep what its own gradients need: they cost the forward pass once more
            stages = self.run(each(adapters, self), *inputs, frozen=False)[1] if base else backs
            found = collect(stages, dout, wanted)

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
        if not self.config.causal:
            raise ValueError(f"a {self.config.family} model sees all positions at once and cannot decode step by step")
        adapters = self.fitting(adapter, ids)
        stepwise(adapters)
        out, _, present = self.run(each(adapters, self), ids, attention_mask, None, position_ids, cache)
        return out, present

    def fitting(self, adapter: Adapter | Sequence[Adapter] | None, ids: Any = None) -> Sequence[Adapter]:
        """The adapters as a list, all of them made for modules that this model has, and for a batch of this size."""
        adapters = adapter_list(adapter)
        if any(a.rows is not None for a in adapters) and ids is not None:
            check_rows(adapters, len(ids))
        fits(adapters, {site.path for site in self.sites.values()} if adapters else ())
        return adapters

    def part(self, role: str, frozen: bool = False) -> Part:
        site = self.sites[role]
        W, b = stored(site.kind, self.params[site.weight]), self.params.get(site.bias)
        return make(site.path, site.kind, W, b, (BASE, site.weight), (BASE, site.bias), self.config.norm_eps, frozen)

    def astype(self, dtype: Any) -> "Model":
        """The same model with every parameter in another dtype."""
        return replace(self, params={name: v.astype(dtype, copy=False) for name, v in self.params.items()})

    def run(
        self,
        hooks: Hooks,
        ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        past: Cache | None = None,
        frozen: bool = True,
    ) -> tuple[Array, list[Back], Cache]:
        """The forward pass, and the backward passes of its stages in the order in which they ran."""
        c = self.config
        start = past[0][0].shape[1] if past else 0
        given = (ids, attention_mask, token_type_ids, position_ids)
        inputs = read(c, *given, start, self.sizes(), hooks.prompt, hooks.shift)
        m = Parts(c, self.sites, lambda role: hooks.part(self.part(role, frozen)), hooks)
        x, back = embed(m, inputs)
        turns = rotations(c, x, inputs.places)
        backs, present = [back], []
        for n in range(c.num_layers):
            at = f"layers.{n}."
            attention, kept = attend(m, at + "attn.", inputs, turns, past[n] if past else None)
            for sublayer, f in ((at + "attn.", attention), (at + "mlp.", mlp(m, at + "mlp."))):
                x, back = m.block(sublayer, f).run(x)
                backs.append(back)
            present += kept
        for step in c.head:
            x, back = head_step(m, step, inputs)(x)
            backs.append(back)
        return x, backs, present

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        """How many tokens, positions and types there are."""

        def rows(role: str) -> int | None:
            return self.params[self.sites[role].weight].shape[0] if role in self.sites else None

        return rows("embed.token"), rows("embed.position"), rows("embed.type")


def adapter_list(adapter: Adapter | Sequence[Adapter] | None) -> Sequence[Adapter]:
    return [] if adapter is None else [adapter] if isinstance(adapter, Adapter) else adapter


def collect(backs: list[Back], dout: Array, want: Collection[Key]) -> dict[Key, Array]:
    """Walk the stages from the last to the first, compute what is wanted of each, stop below the last that has any."""
    dy: Lazy = lambda: dout  # noqa: E731
    stages: list[tuple[Lazy, Grads]] = []
    for back in reversed(backs):
        dy, grads = back(dy, want)
        stages.append((dy, grads))
    while stages and not stages[-1][1]:
        stages.pop()
    found: dict[Key, Array] = {}
    stages.reverse()
    while stages:
        dx, grads = stages.pop()
        for key, g in grads.items():
            found[key] = found[key] + g() if key in found else g()
        if stages:
            dx()
    return found
