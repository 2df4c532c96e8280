"""Bottleneck adapters: their claims, every option against an oracle, and gradients by the complex step."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refpeft
from refpeft import bottleneck
from refpeft.bottleneck import Config, adapted
from refpeft.check import check_op
from refpeft.hooks import Block
from refpeft.method import Phi
from refpeft.part import BASE, make
from tests.models import tiny
from tests.refpeft.equal import EXACT, Array, moved, same
from tests.refpeft.necks import FAMILIES, IDS, THREE, fresh

rng = np.random.default_rng(1)
three = pytest.mark.parametrize("method", THREE)
each_family = pytest.mark.parametrize("family", FAMILIES)


# ── one sublayer: an oracle, written from AdapterHub's options without refpeft.ops ───────────────────────────────────


def norm(x: Array, g: Array, b: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * g + b


def branch(c: Config, φ: Mapping[str, Array], z: Array) -> Array:
    seen = norm(z, φ["γ1"], φ["β1"]) if c.ln_before else z
    p = np.tanh(np.einsum("btd,md->btm", seen, φ["D"]) + φ["b_D"])
    u = np.einsum("btm,dm->btd", p, φ["U"]) + φ["b_U"]
    u = u * (φ["s"] if isinstance(c.scaling, str) else c.scaling)
    if c.use_gating:
        score = np.einsum("btd,d->bt", z, φ["w"][0]) + φ["c"]
        u = u * (1 / (1 + np.exp(-score))).mean(1)[:, None, None]
    return u


def oracle(c: Config, φ: Mapping[str, Array], x: Array, h: Array, N: Any, first: Any) -> Array:
    """y for the sublayer's output h of its input x; N the norm after the residual (or nothing), `first` that before."""
    if c.is_parallel:
        u = branch(c, φ, first(x) if c.normed_input else x)
        v = (norm(u, φ["γ2"], φ["β2"]) if c.ln_after else u) + h
    else:
        z = N(h + x) if c.original_ln_before else h
        r = h
        if c.original_ln_before and c.residual_before_ln == "post_add":
            r = h + x
        if not c.residual_before_ln:
            r = z
        u = branch(c, φ, z)
        if c.ln_after and c.adapter_residual_before_ln:
            v = norm(u + r, φ["γ2"], φ["β2"])
        else:
            v = (norm(u, φ["γ2"], φ["β2"]) if c.ln_after else u) + r
    return N(v + x) if c.original_ln_after else v


def sublayer(c: Config, norm_first: bool, names: list[str]) -> Any:
    """The adapted sublayer as an op of x, its own W, g, b, and the adapter's parameters."""
    keys = [(BASE, "W"), (BASE, "g"), (BASE, "b"), *((0, n) for n in names)]

    def f(x: Array, W: Array, g: Array, b: Array, *values: Array) -> Any:
        layer = make("f", "linear", W, None, (BASE, "W"), (BASE, "none"))
        own = make("n", "layer_norm", g, b, (BASE, "g"), (BASE, "b"), eps=1e-5)
        φ = Phi(dict(zip(names, values, strict=True)), {n: (0, n) for n in names})
        y, back = adapted(c, φ, Block("layers.0.mlp.", own.run, layer.run, norm_first, layer.run)).run(x)

        def vjp(dy: Array) -> Any:
            dx, grads = back(lambda: dy, set(keys))
            zeros = (np.zeros_like(a) for a in (W, g, b, *values))
            return (dx, *(grads.get(k, z) for k, z in zip(keys, zeros, strict=True)))

        return y, vjp

    return f


booleans = st.booleans()
CONFIGS = st.builds(
    Config, non_linearity=st.just("tanh"), reduction_factor=st.just(3), original_ln_before=booleans,
    original_ln_after=booleans, ln_before=booleans, ln_after=booleans, is_parallel=booleans, use_gating=booleans,
    scaling=st.sampled_from([1.0, 4.0, "learned", "channel"]), residual_before_ln=booleans,
    adapter_residual_before_ln=booleans, normed_input=booleans,
) | st.builds(
    Config, non_linearity=st.just("tanh"), reduction_factor=st.just(3), original_ln_before=st.just(True),
    residual_before_ln=st.just("post_add"), original_ln_after=booleans, ln_after=booleans, use_gating=booleans,
)  # fmt: skip


@given(CONFIGS, booleans)
@settings(max_examples=150)
def test_every_option_is_what_it_says_and_its_gradient_is_exact(c: Config, norm_first: bool) -> None:
    d = 6
    r = np.random.default_rng(7)
    shapes = bottleneck.shapes(c, 0, tiny("bert", hidden_size=d, num_attention_heads=2))
    φ = {n: r.normal(size=shape) for n, shape in shapes.items()}
    x, W, g, b = r.normal(size=(2, 3, d)), r.normal(size=(d, d)), 1 + 0.3 * r.normal(size=d), r.normal(size=d)
    own = lambda t: norm(t, g, b)  # noqa: E731
    h = (own(x) if norm_first else x) @ W.T
    f = sublayer(c, norm_first, list(φ))
    y, _ = f(x, W, g, b, *φ.values())
    same(y, oracle(c, φ, x, h, (lambda t: t) if norm_first else own, own if norm_first else lambda t: t))
    if c.ln_after and (c.is_parallel or not c.adapter_residual_before_ln):
        return  # LN₂ takes away what a number before it does: gradients of gates and scales are 0 but for rounding
    assert check_op(f, x, W, g, b, *φ.values()) <= EXACT


def test_the_gradient_of_a_norm_after_the_adapter_is_exact() -> None:
    """Without numbers that it takes away."""
    for c in (Config(ln_after=True, reduction_factor=3), Config(ln_after=True, is_parallel=True, scaling="channel")):
        r = np.random.default_rng(7)
        shapes = bottleneck.shapes(c, 0, tiny("bert", hidden_size=6, num_attention_heads=2)).values()
        own = [r.normal(size=shape) for shape in ((2, 3, 6), (6, 6), (6,), (6,), *shapes)]
        names = list(bottleneck.shapes(c, 0, tiny("bert", hidden_size=6, num_attention_heads=2)))
        assert check_op(sublayer(c, False, names), *own) <= EXACT


# ── whole models ─────────────────────────────────────────────────────────────────────────────────────────────────────

OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_gating": True, "scaling": "learned", "non_linearity": "swish", "train_norms": True},
    {"ln_before": True, "ln_after": True, "scaling": "channel", "leave_out": [0]},
    {"original_ln_before": True, "residual_before_ln": "post_add", "reduction_factor": {"1": 8, "default": 4}},
    {"original_ln_before": True, "residual_before_ln": False, "original_ln_after": False, "normed_input": True},
]


@three
@each_family
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_exact(family: str, method: str, options: dict[str, Any]) -> None:
    """Of all the adapter's parameters and of the model's own."""
    architecture = {"bert": "ForSequenceClassification", "gpt2": "ForSequenceClassification"}.get(family)
    head = {"bert": ["classifier"], "gpt2": ["score"]}.get(family)
    model = tiny(family, architecture)
    adapter = moved(fresh(method, model, modules_to_save=head, **options))
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
@each_family
def test_with_nothing_to_add_the_model_is_as_it_was(family: str, method: str) -> None:
    """H1, PF1: to the bit; and as it begins, it is near."""
    model = tiny(family)
    adapter = fresh(method, model, ln_before=True)
    still = {n: p * 0 if ".adapter_up." in n else p + 1 for n, p in adapter.params.items() if ".adapters." in n}
    want, _ = model(IDS)
    assert np.array_equal(model(IDS, adapter.replace(params={**adapter.params, **still}))[0], want)
    near, _ = model(IDS, adapter)
    assert 0 < np.abs(near - want).max() < 0.02 * np.abs(want).max()


@each_family
def test_parallel_adapters_begin_as_nothing(family: str) -> None:
    """PA1: to the bit."""
    model = tiny(family)
    adapter = fresh("parallel", model, use_gating=True)
    assert np.array_equal(model(IDS, adapter)[0], model(IDS)[0])
    assert np.abs(model(IDS, moved(adapter))[0] - model(IDS)[0]).max() > 0.01


def test_a_number_scales_what_goes_up() -> None:
    """PA2"""
    model = tiny("bert")
    adapter = moved(fresh("parallel", model, scaling=4.0))
    up = {n: 4.0 * p if ".adapter_up." in n else p for n, p in adapter.params.items()}
    one = adapter.replace(config=replace(adapter.config, scaling=1.0), params=up)
    (y, vjp), (want, vjp_one) = model(IDS, adapter), model(IDS, one)
    same(y, want)
    dy = rng.normal(size=y.shape)
    grads, ones = vjp(dy), vjp_one(dy)
    for n, g in grads.items():
        same(g, 4.0 * ones[n] if ".adapter_up." in n else ones[n])


@pytest.mark.parametrize("scaling", ["learned", "channel"])
def test_a_scale_that_is_trained(scaling: str) -> None:
    """PA3: it starts at 1 and is equal to the same number; its gradient is what F's is in its direction."""
    model = tiny("gpt2")
    adapter = fresh("parallel", model, scaling=scaling)
    scales = {n: p for n, p in adapter.params.items() if n.endswith(".scaling")}
    assert [p.shape for p in scales.values()] == [(16,) if scaling == "channel" else (1,)] * 2
    assert all((p == 1).all() for p in scales.values())
    adapter = moved(adapter).replace(
        params={n: p * 0 + 2.5 if n in scales else p for n, p in moved(adapter).params.items()}
    )
    fixed = {n: p for n, p in adapter.params.items() if n not in scales}
    number = adapter.replace(config=replace(adapter.config, scaling=2.5), params=fixed)
    (y, vjp), (want, vjp_number) = model(IDS, adapter), model(IDS, number)
    same(y, want)
    dy = rng.normal(size=y.shape)
    grads, ups = vjp(dy), vjp_number(dy)
    for n in scales:  # s · ds = Σ U ⊙ dU + b_U ⊙ db_U, per channel or all of it
        at = n.removesuffix("scaling") + "adapter_up."
        each = (fixed[at + "weight"] * ups[at + "weight"]).sum(1) + fixed[at + "bias"] * ups[at + "bias"]
        same(2.5 * grads[n], each if scaling == "channel" else each.sum(keepdims=True))


def test_parallel_adapters_add_up() -> None:
    """PA4: two are one with both bottlenecks side by side, in any order."""
    model = tiny("bert")
    a, b = (moved(fresh("parallel", model, seed), seed) for seed in (1, 2))
    D, U = "adapter_down", "adapter_up"
    wide = {}
    for n, p in a.params.items():
        q = b.params[n]
        joined = np.concatenate([p, q], axis=1 if U in n else 0) if D in n or n.endswith(f"{U}.weight") else p + q
        wide[n] = joined
    one = a.replace(config=replace(a.config, reduction_factor=2), params=wide)
    want, _ = model(IDS, one)
    same(model(IDS, [a, b])[0], want)
    same(model(IDS, [b, a])[0], want)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_second_adapter_takes_the_first_for_its_sublayer(family: str, method: str) -> None:
    """H4: gradients too; a first that adds nothing is as if it were not there, and so is a second."""
    model = tiny(family)
    a, b = (moved(fresh(method, model, seed, use_gating=True, train_norms=False), seed) for seed in (1, 2))
    found = refpeft.check_model(model, IDS, [a, b])
    assert max(found.values()) <= EXACT
    nothing = {n: p * 0 if ".adapter_up." in n else p for n, p in a.params.items()}
    alone, _ = model(IDS, a)
    same(model(IDS, [a.replace(params=nothing), b])[0], model(IDS, b)[0])
    same(model(IDS, [a, a.replace(params=nothing)])[0], alone)
    assert np.abs(model(IDS, [a, b])[0] - model(IDS, [b, a])[0]).max() > 1e-3


def test_a_gate_is_one_number_per_sequence() -> None:
    """H5: σ(c) if w = 0; rows of a batch have each its own; the sequence's end changes its beginning."""
    model = tiny("gpt2")
    adapter = moved(fresh("houlsby", model, use_gating=True))
    ws = {n: p * 0 if n.endswith("gate.weight") else p * 0 + 0.4 if n.endswith("gate.bias") else p
          for n, p in adapter.params.items()}  # fmt: skip
    number = {n: p for n, p in ws.items() if ".gate." not in n}
    σ = 1 / (1 + math.exp(-0.4))
    scaled = adapter.replace(config=replace(adapter.config, use_gating=False, scaling=σ), params=number)
    same(model(IDS, adapter.replace(params=ws))[0], model(IDS, scaled)[0])
    both, _ = model(IDS, adapter)
    same(both[:1], model(IDS[:1], adapter)[0])
    other = IDS.copy()
    other[:, -1] = 2 + (other[:, -1] - 1) % 20
    assert np.abs(model(other, adapter)[0][:, 0] - both[:, 0]).max() > 1e-4
    with pytest.raises(ValueError, match="houlsby with use_gating reads the whole sequence and cannot decode step by"):
        model.decode(IDS, None, adapter)


@three
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_step_by_step(family: str, method: str) -> None:
    model = tiny(family)
    adapter = moved(fresh(method, model))
    want, _ = model(IDS, adapter)
    cache = None
    for t in range(IDS.shape[1]):
        y, cache = model.decode(IDS[:, t : t + 1], cache, adapter)
        same(y[:, 0], want[:, t])


@three
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_with_another_adapter_for_each_row(family: str, method: str) -> None:
    """A sublayer runs once for each of them, and its keys and values are kept once."""
    model = tiny(family)
    adapters = refpeft.by_row([moved(fresh(method, model), k) for k in (1, 2)], np.array([1, -1]))
    want, _ = model(IDS, adapters)
    first, cache = model.decode(IDS[:, :3], None, adapters)
    assert len(cache) == model.config.num_layers
    then, _ = model.decode(IDS[:, 3:], cache, adapters)
    same(np.concatenate([first, then], axis=1), want)


@three
def test_there_is_no_merge(method: str) -> None:
    """H6"""
    model = tiny("bert")
    with pytest.raises(ValueError, match=f"{method} has no merge: what it computes cannot be written as weights"):
        refpeft.merge(model, fresh(method, model))


# ── AdapterDrop, tasks by row, dropout ───────────────────────────────────────────────────────────────────────────────


@three
@each_family
def test_adapters_left_out_wait(family: str, method: str) -> None:
    """H3, PF4, PA5: with gradient 0, and come back; the rest is what an adapter made without them is."""
    model = tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})
    adapter = moved(fresh(method, model, train_norms=False))
    dropped = adapter.replace(config=replace(adapter.config, leave_out=[0, 1]))
    small = fresh(method, model, train_norms=False, leave_out=[0, 1])
    assert set(small.params) == {n for n in adapter.params if ".2." in n}
    small = small.replace(params={n: adapter.params[n] for n in small.params})
    (y, vjp), (want, vjp_small) = model(IDS, dropped), model(IDS, small)
    assert np.array_equal(y, want)
    dy = rng.normal(size=y.shape)
    grads, kept = vjp(dy), vjp_small(dy)
    assert {n for n, g in grads.items() if not g.any()} == set(adapter.params) - set(kept)
    for n, g in kept.items():
        assert np.array_equal(grads[n], g)
    back = dropped.replace(config=replace(adapter.config, leave_out=()))
    assert np.array_equal(model(IDS, back)[0], model(IDS, adapter)[0])


def test_each_row_has_its_task() -> None:
    """Two adapters for two rows, one of the norms' too, and one row without: as each alone."""
    model = tiny("bert")
    ids = rng.integers(2, 29, (3, 5))
    a, b = moved(fresh("houlsby", model), 1), moved(fresh("pfeiffer", model, use_gating=True), 2)
    rows = np.array([0, 1, -1])
    out, vjp = model(ids, refpeft.by_row([a, b], rows))
    want = np.stack([model(ids, a)[0][0], model(ids, b)[0][1], model(ids)[0][2]])
    same(out, want)
    dy = rng.normal(size=out.shape)
    per = vjp(dy)
    for k, adapter in enumerate((a, b)):
        _, alone = model(ids[k : k + 1], adapter)
        for n, g in alone(dy[k : k + 1]).items():
            same(per[k][n], g)


@three
def test_dropout_and_stochastic_depth(method: str) -> None:
    model = tiny("bert")
    adapter = moved(fresh(method, model, dropout=0.25, use_gating=True))
    masked = refpeft.dropout(adapter, model, IDS.shape, seed=3)
    assert {m.shape for m in masked.masks.values()} == {(*IDS.shape, 16)}
    assert {round(float(v), 12) for m in masked.masks.values() for v in m.ravel()} == {0, round(4 / 3, 12)}
    assert max(refpeft.check_model(model, IDS, masked).values()) <= EXACT
    rows = refpeft.dropout(moved(fresh(method, model, stochastic_depth=0.5)), model, (64, 5), seed=0)
    (mask, *_) = rows.masks.values()
    assert mask.shape == (64, 1, 1)
    assert set(mask.ravel()) == {0, 2}
    out, _ = model(np.tile(IDS[:1], (64, 1)), rows)
    gone = np.all([m.ravel() == 0 for m in rows.masks.values()], axis=0)
    base, _ = model(IDS[:1], rows.replace(masks={}, config=replace(rows.config, scaling=0.0)))
    assert gone.any()
    same(out[gone], np.tile(base, (gone.sum(), 1, 1)))
    assert refpeft.dropout(fresh(method, model), model, IDS.shape).masks == {}
