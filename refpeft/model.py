"""The transformer: one, described by data.

`Config` says what it computes, `sites` where each of its layers finds its parameters; a family (GPT-2, LLaMA, BERT, …)
is nothing but a table of these two (`refpeft.checkpoint.families`). Every layer passes through `part(part) → part`
before it runs, and some other places through hooks of their own (`refpeft.hooks`); the model never learns whether an
adapter did something there.

    pre-norm    x ← x + attend(norm x);   x ← x + mlp(norm x);   finally norm
    post-norm   x ← norm(x + attend x);   x ← norm(x + mlp x)

An encoder-decoder has two stacks of such layers. Those of the decoder attend to what the encoder made of its tokens, m,
between the two: x ← x + attend(norm x; m). Otherwise there is one stack, which sees all positions or is causal.

Shapes: ids [b, s] → x [b, s, d] → logits [b, s, v] (language models), [b, labels] (classifiers), or the last hidden
state [b, s, d] where there is no head; of an encoder-decoder, s is the length of decoder_input_ids. A site's name says
its place: 'layers.3.attn.q', 'embed.token', 'head.out'; 'encoder.layers.3.attn.q', 'decoder.layers.3.cross.q'.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, check_rows, each, fits, numbered, stepwise
from refpeft.config import Config, Site
from refpeft.hooks import Hooks
from refpeft.inputs import Inputs, read, shift_right
from refpeft.layers import Encoded, Pair, Parts, head, stack
from refpeft.ops import Array
from refpeft.part import BASE, INNER, Back, Grads, Key, Lazy, Once, Part, make, stored

__all__ = ["Cache", "Config", "Model", "Site", "adapter_list"]

Cache = Sequence[Pair]  # of every attention, in the order in which they run: keys and values [b, t, g, e]
Chain = tuple[str, list[Back]]  # stages one after the other, and what others call the value that they end in
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
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
    ) -> tuple[Array, Callable[..., Any]]:
        """out, vjp = model(ids, …);   grads = vjp(dout): the adapter's gradients by name (a list of dicts for a list of
        adapters). vjp(dout, base=True), or base=[names], returns (grads, base_grads). Of an encoder-decoder, the first
        inputs are those of the encoder."""
        adapters = self.fitting(adapter, ids)
        inputs = (ids, attention_mask, token_type_ids, position_ids, decoder_input_ids, decoder_attention_mask)
        out, chains, _ = self.run(each(adapters, self), *inputs)
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
            run = self.run(each(adapters, self), *inputs, frozen=False)[1] if base else chains
            found = collect(run, dout, wanted)

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
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
    ) -> tuple[Array, Cache]:
        """logits, cache = model.decode(ids, cache): the new positions only, given the keys and values of those before.
        `attention_mask` [b, t] covers both. Of an encoder-decoder, this is said of the decoder's inputs; those of the
        encoder are the same at each step, of which the first alone runs it."""
        if not self.config.causal:
            raise ValueError(f"a {self.config.family} model sees all positions at once and cannot decode step by step")
        adapters = self.fitting(adapter, ids)
        stepwise(adapters)
        inputs = (ids, attention_mask, None, position_ids, decoder_input_ids, decoder_attention_mask)
        out, _, present = self.run(each(adapters, self), *inputs, cache)
        return out, present

    def fitting(self, adapter: Adapter | Sequence[Adapter] | None, ids: Any = None) -> Sequence[Adapter]:
        """The adapters as a list, all of them made for modules that this model has, and for a batch of this size."""
        adapters = adapter_list(adapter)
        if any(a.rows is not None for a in adapters) and ids is not None:
            check_rows(adapters, len(ids))
        fits(adapters, {site.path for site in self.sites.values()} if adapters else ())
        self.apart(adapters)
        return adapters

    def apart(self, adapters: Sequence[Adapter]) -> None:
        """Refuses an adapter for some rows that changes what all rows share: the biases of relative positions."""
        some = [a.replace(rows=None) for a in adapters if a.rows is not None and not numbered(a)]
        shared = [self.part(role) for role in self.sites if role.endswith("embed.relative")] if some else []
        for a in some if shared else ():
            part = each([a], self).part
            if found := [p.path for p in shared if part(p) is not p]:
                raise ValueError(f"{found[0]} is one table for all rows of a batch, and an adapter for some adapts it")

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
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        past: Cache | None = None,
        frozen: bool = True,
    ) -> tuple[Array, list[Chain], Cache]:
        """The forward pass, and the backward passes of its stages in the order in which they ran."""
        c, m = self.config, self.parts(hooks, frozen)
        given = (ids, attention_mask, token_type_ids, position_ids)
        chains: list[Chain] = []
        if not c.encoder_decoder:
            for name, a in (("input_ids", decoder_input_ids), ("attention_mask", decoder_attention_mask)):
                if a is not None:
                    raise ValueError(f"a {c.family} model has no decoder of its own, but decoder_{name} were given")
            start = past[0][0].shape[1] if past else 0
            inputs = read(c, *given, start, self.sizes(), hooks.prompt, hooks.shift, c.causal)
            x, backs, present = stack(m, "", c.num_layers, inputs, past)
        else:
            source = self.source_of(hooks, *given)
            inputs = self.target(ids, decoder_input_ids, decoder_attention_mask, hooks, past)
            x, backs = (None, []) if past else stack(m, "encoder.", c.num_layers, source)[:2]
            chains.append(("encoder", backs))
            encoded = Encoded(x, source.mask)
            x, backs, present = stack(m, "decoder.", c.num_decoder_layers or 0, inputs, past, encoded)
        x, steps = head(m, x, inputs)
        return x, [*chains, ("", backs + steps)], present

    def parts(self, hooks: Hooks, frozen: bool = True) -> Parts:
        """The layers as these hooks wrap them."""
        return Parts(self.config, self.sites, lambda role: hooks.part(self.part(role, frozen)), hooks)

    def source_of(self, hooks: Hooks, ids: Any, mask: Any = None, types: Any = None, places: Any = None) -> Inputs:
        """What goes into the encoder."""
        return read(self.config, ids, mask, types, places, 0, self.sizes("encoder."), hooks.prompt, hooks.shift)

    def target(self, source: Array, ids: Any, attention_mask: Any, hooks: Hooks, past: Cache | None) -> Inputs:
        """What goes into the decoder."""
        c = self.config
        source = np.asarray(source) if isinstance(source, list | tuple) else source
        first, pad = c.decoder_start_token_id, c.pad_token_id
        if ids is None and c.shifts_input and not past and first is not None and pad is not None:
            ids = shift_right(source, first, pad)
        if ids is None:
            raise ValueError(f"a {c.family} model has a decoder, which needs decoder_input_ids")
        start = past[0][0].shape[1] if past else 0
        sizes = self.sizes("decoder.")
        inputs = read(c, ids, attention_mask, None, None, start, sizes, None, hooks.shift, True, "decoder_")
        if isinstance(inputs.ids, np.ndarray) and len(inputs.ids) != len(source):
            raise ValueError(f"decoder_input_ids have {len(inputs.ids)} rows, ids {len(source)}")
        return replace(inputs, source=source)

    def sizes(self, at: str = "") -> tuple[int | None, int | None, int | None]:
        """How many tokens, positions and types there are, for a stack."""

        def rows(role: str) -> int | None:
            return self.params[self.sites[role].weight].shape[0] if role in self.sites else None

        return rows("embed.token"), rows(at + "embed.position"), rows(at + "embed.type")


def adapter_list(adapter: Adapter | Sequence[Adapter] | None) -> Sequence[Adapter]:
    return [] if adapter is None else [adapter] if isinstance(adapter, Adapter) else adapter


def collect(chains: Sequence[Chain], dout: Array, want: Collection[Key]) -> dict[Key, Array]:
    """Walk the stages from the last to the first, compute what is wanted of each, stop below the last that has any.

    The last chain ends in the output. What another one ends in, stages of later ones use: its cotangent is the sum of
    theirs, and is asked for only if that chain has something that is wanted."""
    found: dict[Key, Array] = {}
    linked = []
    want = set(want)
    for n, (name, backs) in enumerate(chains):
        key: Key = (INNER, name)
        dy: Lazy = Once(found.pop, key) if n < len(chains) - 1 else lambda: dout
        stages: list[tuple[Lazy, Grads]] = []
        for back in reversed(backs):
            dy, grads = back(dy, want)
            stages.append((dy, grads))
        while stages and not stages[-1][1]:
            stages.pop()
        linked.append(stages)
        want |= {key} if stages else set()
    for stages in reversed(linked):
        walk(stages, found)
    return found


def walk(stages: list[tuple[Lazy, Grads]], found: dict[Key, Array]) -> None:
    """Add the gradients of the stages, each of which lets go of what it kept as soon as it is done."""
    stages.reverse()
    while stages:
        dx, grads = stages.pop()
        for key, g in grads.items():
            found[key] = found[key] + g() if key in found else g()
        if stages:
            dx()
