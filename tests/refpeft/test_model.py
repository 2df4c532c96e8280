"""What a transformer must do whatever its family: masks, padding, caches, batches, and gradients that cost nothing."""

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import Adapter, Model, ops
from tests.models import ARCHITECTURES, tiny
from tests.refpeft.equal import EXACT, Array, same

DECODERS = ["gpt2", "llama", "qwen2"]
FAMILIES = [*DECODERS, "bert", "roberta"]
STATES = [("gpt2", "Model"), ("llama", "Model"), ("qwen2", "Model"), ("bert", "Model"), ("roberta", "Model")]
every_architecture = pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)


def tokens(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(2, 29, shape)  # 0 and 1 are padding in some families


def adapter_of(model: Model, method: str, seed: int = 0, **config: Any) -> Adapter:
    move = np.random.default_rng(seed)
    fresh = refpeft.init(method, {"r": 2, "target_modules": "all-linear", **config}, model, seed)
    return fresh.replace(params={n: v + 0.2 * move.normal(size=v.shape) for n, v in fresh.params.items()})


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_architecture
def test_rows_of_a_batch_do_not_influence_each_other(family: str, architecture: str) -> None:
    model, ids = tiny(family, architecture), tokens(3, 6)
    out, _ = model(ids)
    for n in range(3):
        same(model(ids[n : n + 1])[0][0], out[n])


@every_architecture
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 1)])
def test_an_empty_batch_and_one_token(family: str, architecture: str, shape: tuple[int, int]) -> None:
    model = tiny(family, architecture)
    adapter = adapter_of(model, "lora")
    out, vjp = model(tokens(*shape), adapter)
    assert out.shape[0] == shape[0]
    grads, base = vjp(np.ones_like(out), base=True)
    for name, value in {**model.params, **adapter.params}.items():
        d = (grads | base)[name]
        assert d.shape == value.shape
        assert np.isfinite(d).all()
        assert shape[0] or not d.any()


@every_architecture
def test_gradients_are_exact(family: str, architecture: str) -> None:
    """Of every parameter, under padding and with token types where there are any."""
    ids = tokens(2, 6)
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"token_type_ids": ids % 2} if family == "bert" else {}
    found = refpeft.check_model(tiny(family, architecture), ids, base=True, attention_mask=mask, **inputs)
    assert max(found.values()) <= EXACT


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@every_architecture
def test_the_dtype_of_the_weights_is_the_dtype_of_everything(family: str, architecture: str, dtype: Any) -> None:
    model = tiny(family, architecture, dtype=dtype)
    out, vjp = model(tokens(2, 5))
    _, base = vjp(np.ones_like(out), base=True)
    assert {v.dtype for v in [out, *base.values()]} == {np.dtype(dtype)}


def test_ids_may_be_a_list() -> None:
    model = tiny("gpt2")
    same(model([[3, 4, 5]], attention_mask=[[1, 1, 1]])[0], model(np.array([[3, 4, 5]]))[0])


# ── what is seen ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", DECODERS)
def test_a_causal_model_does_not_see_the_future(family: str) -> None:
    model, ids = tiny(family), tokens(2, 7)
    later = ids.copy()
    later[:, 4:] = (later[:, 4:] + 1) % 29
    out, changed = model(ids)[0], model(later)[0]
    np.testing.assert_array_equal(out[:, :4], changed[:, :4])
    assert np.abs(out[:, 4:] - changed[:, 4:]).max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_sees_everything(family: str) -> None:
    model, ids = tiny(family), tokens(1, 7)
    later = ids.copy()
    later[:, 6] = (later[:, 6] - 1) % 27 + 2
    assert (np.abs(model(ids)[0] - model(later)[0]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "architecture"), STATES)
@pytest.mark.parametrize("method", [None, "lora", "dora"])
def test_padding_changes_nothing_else(family: str, architecture: str, side: str, method: str | None) -> None:
    """Not the outputs, and not a gradient, on either side, whatever ids the padding has."""
    model, ids = tiny(family, architecture), tokens(2, 5)
    adapter = adapter_of(model, method) if method else []
    n = 3 if side == "left" else 0
    # RoBERTa counts positions by ids that are not padding, so only these may stand there
    filler = np.full((2, 3), 1) if family == "roberta" else tokens(2, 3, seed=7)
    padded = np.concatenate([filler, ids] if n else [ids, filler], axis=1)
    mask = np.concatenate([np.zeros_like(filler), np.ones_like(ids)][:: 1 if n else -1], axis=1)
    inputs = {"attention_mask": mask}
    if n and family != "roberta":
        inputs["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    out, vjp = model(ids, adapter)
    out2, vjp2 = model(padded, adapter, **inputs)
    same(out2[:, n : n + 5], out)
    dout = np.random.default_rng(3).normal(size=out.shape)
    dout2 = np.zeros_like(out2)
    dout2[:, n : n + 5] = dout
    for wanted, got in zip(flat(vjp(dout, base=True)), flat(vjp2(dout2, base=True)), strict=True):
        same(got, wanted)


def flat(grads: tuple[Any, dict[str, Array]]) -> list[Array]:
    of_adapters, base = grads
    per = of_adapters if isinstance(of_adapters, list) else [of_adapters]
    return [d for g in [*per, base] for _, d in sorted(g.items())]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_reads_the_last_token_that_is_not_padding(family: str, side: str) -> None:
    model, ids = tiny(family, "ForSequenceClassification"), tokens(2, 5)
    pad = np.zeros((2, 2), int)
    parts = [pad, ids] if side == "left" else [ids, pad]
    mask = np.concatenate([np.zeros_like(p) if p is pad else np.ones_like(p) for p in parts], axis=1)
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    same(model(np.concatenate(parts, axis=1), attention_mask=mask, position_ids=places)[0], model(ids)[0])


def test_token_types_matter_and_are_0_by_default() -> None:
    model, ids = tiny("bert"), tokens(2, 5)
    same(model(ids, token_type_ids=np.zeros_like(ids))[0], model(ids)[0])
    assert np.abs(model(ids, token_type_ids=np.ones_like(ids))[0] - model(ids)[0]).max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rotary_attention_sees_distances_only(family: str) -> None:
    model, ids = tiny(family), tokens(2, 6)
    same(model(ids, position_ids=np.arange(6)[None] + 11)[0], model(ids)[0])


# ── one position at a time ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps", [[1] * 7, [7], [4, 1, 1, 1], [2, 3, 2], [1, 6]], ids=str)
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", [None, "lora", "rslora", "dora"])
def test_incremental_is_full(family: str, steps: list[int], method: str | None) -> None:
    model, ids = tiny(family), tokens(2, 7)
    adapter = adapter_of(model, method) if method else None
    same(decoded(model, ids, steps, adapter), model(ids, adapter)[0])


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("steps", [[1] * 7, [4, 1, 1, 1], [2, 5]], ids=str)
def test_incremental_is_full_under_left_padding(family: str, steps: list[int]) -> None:
    model, ids = tiny(family), tokens(2, 7)
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    out, _ = model(ids, attention_mask=mask, position_ids=places)
    kept = mask.astype(bool)
    same(decoded(model, ids, steps, None, mask, places)[kept], out[kept])


def decoded(
    model: Model, ids: Array, steps: list[int], adapter: Any, mask: Array | None = None, places: Array | None = None
) -> Array:
    cache, outs, at = None, [], 0
    for n in steps:
        now, to = slice(at, at + n), at + n
        out, cache = model.decode(
            ids[:, now],
            cache,
            adapter,
            None if mask is None else mask[:, :to],
            None if places is None else places[:, now],
        )
        assert cache[0][0].shape[1] == to
        outs.append(out)
        at = to
    return np.concatenate(outs, axis=1)


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bad", [-1, 29, 10**6])
def test_ids_out_of_range_are_refused(family: str, bad: int) -> None:
    ids = tokens(2, 4)
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"ids? .*{bad}\b.* 29 entries"):
        tiny(family)(ids)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_a_sequence_that_is_too_long_is_refused(family: str) -> None:
    longest = 22 if family == "roberta" else 24  # RoBERTa's positions start after its padding id
    model = tiny(family)
    assert np.isfinite(model(tokens(1, longest))[0]).all()
    with pytest.raises(ValueError, match=r"position.* model,? .*has (22|24)"):
        model(tokens(1, longest + 1))


def test_a_cache_that_is_full_is_refused() -> None:
    model = tiny("gpt2")
    _, cache = model.decode(tokens(1, 24))
    with pytest.raises(ValueError, match="25 positions does not fit the model, which has 24"):
        model.decode(tokens(1, 1), cache)


@pytest.mark.parametrize("ids", [np.ones((2, 3)), np.ones(3, int), np.ones((1, 2, 3), int)], ids=["float", "1", "3"])
def test_ids_are_integers_batch_by_positions(ids: Array) -> None:
    with pytest.raises(ValueError, match=r"ids must be integers \[batch, positions\], found"):
        tiny("gpt2")(ids)


MISFITS = [
    ("bert", {"token_type_ids": [[0, 1, 2]]}, "token_type_ids holds 2, but the model has 2 entries"),
    ("bert", {"token_type_ids": [[0, 1]]}, r"token_type_ids must be integers \[1, 3\], found int64 \[1, 2\]"),
    ("gpt2", {"position_ids": [[0, 1, 24]]}, "position_ids holds 24, but the model has 24 entries"),
    ("gpt2", {"position_ids": [[-1, 0, 1]]}, "position_ids holds -1"),
    ("gpt2", {"attention_mask": [[1, 1]]}, r"attention_mask must be .*\[1, 3\], found int64 \[1, 2\]"),
    ("llama", {"attention_mask": [1, 1, 1]}, r"attention_mask must be .*\[1, 3\], found int64 \[3\]"),
]


@pytest.mark.parametrize(("family", "inputs", "message"), MISFITS, ids=[f"{f}-{i}" for f, i, _ in MISFITS])
def test_inputs_that_do_not_fit_are_refused(family: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(family)([[3, 4, 5]], **inputs)


# ── gradients: what is asked for, and nothing else ───────────────────────────────────────────────────────────────────


@every_architecture
def test_base_gradients_are_given_when_asked_for(family: str, architecture: str) -> None:
    model, ids = tiny(family, architecture), tokens(2, 5)
    adapter = adapter_of(model, "lora")
    out, vjp = model(ids, adapter)
    grads, every = vjp(out, base=True)
    assert set(every) == set(model.params)
    assert set(grads) == set(adapter.params) == set(vjp(out))
    some = list(model.params)[::3]
    _, few = vjp(out, base=some)
    assert list(few) == some
    for name in some:
        np.testing.assert_array_equal(few[name], every[name])
    assert vjp(out, base=[])[1] == {}


def test_without_an_adapter_there_is_nothing_to_train() -> None:
    out, vjp = tiny("gpt2")(tokens(2, 5))
    assert vjp(out) == {}


def test_a_list_of_adapters_gives_a_list_of_gradients() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    one, two = adapter_of(model, "lora", 1), adapter_of(model, "dora", 2, target_modules=["q_proj"])
    out, vjp = model(ids, [one, two])
    assert [set(g) for g in vjp(out)] == [set(one.params), set(two.params)]
    out, vjp = model(ids, [one])
    alone, vjp_alone = model(ids, one)
    same(out, alone)
    for name, d in vjp_alone(out).items():
        np.testing.assert_array_equal(vjp(out)[0][name], d)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_a_tied_weight_s_gradient_is_the_sum_of_both_uses(family: str) -> None:
    architecture = {"gpt2": "LMHeadModel", "bert": "ForMaskedLM", "llama": "ForCausalLM"}[family]
    model, ids = tiny(family, architecture, tie_word_embeddings=True), tokens(2, 5)
    shared = model.sites["embed.token"].weight
    head = model.sites["head.out"]
    assert head.weight == shared
    apart = tiny(family, architecture, tie_word_embeddings=False)
    own = apart.sites["head.out"]
    params = {**model.params, own.weight: model.params[shared].copy()}
    if head.bias in params:
        params[own.bias] = params.pop(head.bias)
    apart = Model(apart.config, apart.sites, params, apart.source)
    out, vjp = model(ids)
    out2, vjp2 = apart(ids)
    same(out, out2)
    dout = np.random.default_rng(0).normal(size=out.shape)
    _, tied = vjp(dout, base=[shared])
    _, untied = vjp2(dout, base=[shared, own.weight])
    same(tied[shared], untied[shared] + untied[own.weight])


def test_an_adapter_s_own_tensor_stands_in_place_of_the_base_s() -> None:
    model, ids = tiny("bert", "ForSequenceClassification"), tokens(2, 5)
    adapter = refpeft.init("lora", {"r": 2, "modules_to_save": ["classifier"], "bias": "all"}, model)
    assert "classifier.weight" in adapter.params
    params = {n: v + 1 if n.startswith("classifier") else v for n, v in adapter.params.items()}
    moved = adapter.replace(params=params)
    out, vjp = model(ids, moved)
    by_hand = Model(model.config, model.sites, {**model.params, **{n: params[n] for n in params if n in model.params}})
    expected, vjp_by_hand = by_hand(ids)
    same(out, expected)
    grads, base = vjp(out, base=True)
    _, base_by_hand = vjp_by_hand(out, base=True)
    for name in set(params) & set(model.params):
        same(grads[name], base_by_hand[name])
        assert not base[name].any()  # replaced, the base's own has no say


class Counter:
    """Counts the ops that run forward, and the cotangents that are computed backward, by op and argument."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pulled: list[tuple[str, int]] = []
        for name in ("linear", "layer_norm", "rms_norm", "embedding", "attention", "rope"):
            op = getattr(ops, name)
            for module in [m for n, m in sys.modules.items() if n.startswith("refpeft.") and m is not ops]:
                if getattr(module, name, None) is op:
                    monkeypatch.setattr(module, name, self.counting(op, name))
        for name, f in ops.activations.items():
            monkeypatch.setitem(ops.activations, name, self.counting(f, name))

    def counting(self, op: Any, name: str) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            y, vjp = op(*args, **options)
            return y, lambda dy: tuple(self.thunk(d, (name, k)) for k, d in enumerate(vjp(dy)))

        return counted

    def thunk(self, d: Any, key: tuple[str, int]) -> Any:
        def counted() -> Array:
            self.pulled.append(key)
            return d()

        return d and counted

    def of(self, name: str, argument: int) -> int:
        return self.pulled.count((name, argument))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_frozen_parameter_costs_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one cotangent of a base weight, bias, norm or embedding is computed for LoRA's gradients."""
    model = tiny(family)
    wide = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[family]
    adapter = refpeft.init("lora", {"r": 2, "target_modules": wide}, model)
    count = Counter(monkeypatch)
    out, vjp = model(tokens(2, 5), adapter)
    assert count.pulled == []
    vjp(out)
    adapted = 2 * len(wide)  # layers
    assert count.of("linear", 1) == 2 * adapted  # dA and dB, and no dW
    assert sum(count.of(name, k) for name in ("layer_norm", "rms_norm") for k in (1, 2)) == 0
    assert count.of("linear", 2) == count.of("embedding", 1) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_backward_pass_stops_below_the_lowest_adapted_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(family, num_hidden_layers=5, n_layer=5), tokens(2, 5)
    wide = {"gpt2": ["c_attn"], "llama": ["q_proj"], "bert": ["query"]}[family]
    count = Counter(monkeypatch)
    costs = []
    for lowest in range(5):
        layers = list(range(lowest, 5))
        adapter = refpeft.init("lora", {"r": 2, "target_modules": wide, "layers_to_transform": layers}, model)
        out, vjp = model(ids, adapter)
        count.pulled.clear()
        vjp(out)
        costs.append(len(count.pulled))
        assert count.of("attention", 0) == len(layers)
        fused = family == "gpt2"  # elsewhere, queries alone need no gradient of their layer's values
        assert count.of("attention", 2) == len(layers) - (not fused)
    steps = {a - b for a, b in pairwise(costs)}
    assert len(steps) == 1  # each layer that is adapted costs the same, and those below cost nothing
    assert steps.pop() > 0


def test_one_gradient_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op's cotangent is asked for at most once, whatever shares it."""
    model = tiny("llama")
    count = Counter(monkeypatch)
    out, vjp = model(tokens(2, 5), adapter_of(model, "lora"))
    vjp(out, base=True)
    layers = 7 * 2 + 1
    adapted = 7 * 2
    assert count.of("linear", 1) == layers + 2 * adapted
    assert count.of("attention", 0) == count.of("attention", 1) == count.of("attention", 2) == 2
    assert count.of("rope", 0) == 4


def test_a_cotangent_of_another_shape_is_refused() -> None:
    """NumPy would stretch it."""
    out, vjp = tiny("gpt2", "GPT2LMHeadModel")(np.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match="dout must have the shape of the output"):
        vjp(out[:, :1])
