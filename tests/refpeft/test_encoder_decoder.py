"""What an encoder-decoder must do, whatever its family: two stacks, of which one reads what the other made."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import Adapter, Model
from refpeft.hooks import Hooks, Memory
from refpeft.relative import buckets, thresholds
from tests.models import ENCODER_DECODERS, tiny
from tests.refpeft.test_model import Counter

Array = np.ndarray[Any, Any]
EXACT = 1e-12
every = pytest.mark.parametrize("name", ENCODER_DECODERS)
language = pytest.mark.parametrize("name", [n for n in ENCODER_DECODERS if n not in ("T5Model", "BartModel")][:4])
IDS = np.array([[5, 9, 3, 7, 2, 8], [6, 4, 2, 11, 3, 2]])
DECODED = np.array([[0, 12, 5, 21, 7], [0, 8, 9, 3, 20]])
GIVEN = {"decoder_input_ids": DECODED}


def made(name: str, **more: Any) -> Model:
    family, architecture, config = ENCODER_DECODERS[name]
    return tiny(family, architecture, **{**config, **more})


def lora(model: Model, targets: Any = "all-linear", **config: Any) -> Adapter:
    fresh = refpeft.init("lora", {"r": 2, "target_modules": targets, "init_lora_weights": False, **config}, model)
    return fresh.replace(params={n: 0.3 * v for n, v in fresh.params.items()})


def moved(adapter: Adapter, size: float = 0.1) -> Adapter:
    rng = np.random.default_rng(5)
    return adapter.replace(params={n: v + size * rng.normal(size=v.shape) for n, v in adapter.params.items()})


def same(a: Array, b: Array, tolerance: float = EXACT) -> None:
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1))


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


@every
def test_gradients_are_exact(name: str) -> None:
    """Of every parameter, under padding in both stacks: those of what all layers share add up."""
    mask, decoder_mask = np.ones_like(IDS), np.ones_like(DECODED)
    mask[1, 4:] = decoder_mask[0, 3:] = 0
    given = {**GIVEN, "attention_mask": mask, "decoder_attention_mask": decoder_mask}
    found = refpeft.check_model(made(name), IDS, base=True, **given)
    assert max(found.values()) <= EXACT


def test_gradients_of_an_encoder_alone_are_exact() -> None:
    model = tiny("t5", "EncoderModel")
    assert {"layers.1.attn.q", "embed.relative", "final.norm"} <= model.sites.keys()
    assert max(refpeft.check_model(model, IDS, base=True).values()) <= EXACT


def test_what_decoder_layers_ask_of_the_encoder_adds_up() -> None:
    """The encoder's gradient is that of one layer asking plus that of the others: o = 0 takes a layer out."""
    model = made("BART")
    roles = [f"decoder.layers.{n}.cross.o" for n in range(3)]
    W, b = ([getattr(model.sites[r], leaf) for r in roles] for leaf in ("weight", "bias"))
    dout = np.random.default_rng(0).normal(size=(2, 5, 29)) * 1e-6
    small = {n: 1e-7 * model.params[n] for n in W} | {n: 1e-7 * model.params[n] for n in b}

    def encoder_gradient(layers: Sequence[int]) -> Array:
        own = {n: (small[n] if k in layers else 0 * small[n]) for k in range(3) for n in (W[k], b[k])}
        _, vjp = Model(model.config, model.sites, {**model.params, **own})(IDS, **GIVEN)
        d: Array = vjp(dout, base=["model.encoder.layers.0.fc1.weight"])[1]["model.encoder.layers.0.fc1.weight"]
        return d

    parts = sum(encoder_gradient([n]) for n in range(3))
    together = encoder_gradient([0, 1, 2])
    assert np.abs(together).max() > 0
    same(together / np.abs(together).max(), parts / np.abs(together).max(), 1e-5)


@language
def test_a_frozen_encoder_is_not_walked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    only = lora(model, r".*decoder.*\.(q|q_proj)")
    count = Counter(monkeypatch)
    out, vjp = model(IDS, only, **GIVEN)
    vjp(out)
    assert count.of("attention", 0) == 3 * 2  # both attentions of the decoder's layers, and none of the encoder
    assert count.of("attention", 1) == 2  # of the decoder's own keys above its lowest layer: the encoder is not asked
    assert count.of("embedding", 1) == count.of("rms_norm", 1) == count.of("layer_norm", 1) == 0


# ── rows, dtypes, what is seen ───────────────────────────────────────────────────────────────────────────────────────


@every
def test_rows_of_a_batch_do_not_influence_each_other(name: str) -> None:
    model = made(name)
    out, _ = model(IDS, **GIVEN)
    for n in range(2):
        same(model(IDS[n : n + 1], decoder_input_ids=DECODED[n : n + 1])[0][0], out[n])


@every
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (2, 1, 4), (2, 4, 1)])
def test_an_empty_batch_and_one_token(name: str, shape: tuple[int, int, int]) -> None:
    model, (b, t, s) = made(name), shape
    decoded = DECODED[:b, : max(s, t) if "classifier" in name else s]
    out, vjp = model(np.full((b, t), 2), lora(model), decoder_input_ids=decoded)
    grads, base = vjp(np.ones_like(out), base=True)
    assert out.shape[0] == b
    assert all(np.isfinite(d).all() and (b or not d.any()) for d in [*grads.values(), *base.values()])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@every
def test_the_dtype_of_the_weights_is_the_dtype_of_everything(name: str, dtype: Any) -> None:
    model = made(name, dtype=dtype)
    out, vjp = model(IDS, **GIVEN)
    assert {v.dtype for v in [out, *vjp(np.ones_like(out), base=True)[1].values()]} == {np.dtype(dtype)}


@language
def test_the_decoder_is_causal_and_sees_all_of_the_encoder(name: str) -> None:
    model, later = made(name), DECODED.copy()
    later[:, 3:] += 1
    out, changed = model(IDS, **GIVEN)[0], model(IDS, decoder_input_ids=later)[0]
    same(out[:, :3], changed[:, :3])
    assert np.abs(out[:, 3:] - changed[:, 3:]).max() > 1e-3
    other = IDS.copy()
    other[:, 5] += 1
    assert (np.abs(model(other, **GIVEN)[0] - out).max(-1) > 1e-5).all()


@pytest.mark.parametrize(
    ("name", "side"),
    [("T5", "left"), ("T5", "right"), ("T5 v1.1", "left"), ("BART", "right"), ("BART, scaled", "right")],
)
def test_padding_changes_nothing_else(name: str, side: str) -> None:
    """Not so BART on the left, which counts positions from the first token, padding or not, as in transformers."""
    model = made(name)
    pad = np.full((2, 2), model.config.pad_token_id)

    def where(a: Array, p: Array) -> Array:
        return np.concatenate([a, p] if side == "right" else [p, a], axis=1)

    mask, decoder_mask = where(np.ones_like(IDS), 0 * pad), where(np.ones_like(DECODED), 0 * pad)
    given = {"attention_mask": mask, "decoder_attention_mask": decoder_mask, "decoder_input_ids": where(DECODED, pad)}
    out, vjp = model(where(IDS, pad), lora(model), **given)
    expected, vjp_alone = model(IDS, lora(model), **GIVEN)
    kept = slice(0, 5) if side == "right" else slice(2, 7)
    same(out[:, kept], expected)
    dout = np.random.default_rng(1).normal(size=expected.shape)
    wide = np.zeros_like(out)
    wide[:, kept] = dout
    for n, d in vjp_alone(dout).items():
        same(vjp(wide)[n], d)


# ── step by step ─────────────────────────────────────────────────────────────────────────────────────────────────────

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "target_modules": "all-linear", "init_lora_weights": False},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
}


@language
@pytest.mark.parametrize("method", [None, *METHODS])
def test_decoding_step_by_step_is_decoding_at_once(
    name: str, method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding in the encoder; and the encoder runs at the first step alone."""
    model = made(name)
    adapter = moved(refpeft.init(method, METHODS[method], model)) if method else None
    mask = np.ones_like(IDS)
    mask[1, 4:] = 0
    expected, _ = model(IDS, adapter, attention_mask=mask, **GIVEN)
    cache, found, ran = None, [], []
    real = Model.part
    monkeypatch.setattr(Model, "part", lambda self, role, *rest: ran.append(role) or real(self, role, *rest))
    for n in (slice(0, 2), slice(2, 3), slice(3, 5)):
        out, cache = model.decode(IDS, cache, adapter, attention_mask=mask, decoder_input_ids=DECODED[:, n])
        found.append(out)
        seen = [role for role in ran if role.startswith("encoder.") or re.search(r"cross\.[kv]", role)]
        assert bool(seen) == (n.start == 0)
        ran.clear()
    same(np.concatenate(found, axis=1), expected)
    assert cache is not None
    assert [k.shape[1] for k, _ in cache] == [5, cache[1][0].shape[1]] * 3


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_keys_of_a_text_are_a_prefix_with_which_the_decoder_goes_on(name: str) -> None:
    """PX3, of a decoder: relative positions count on from the memory if it is placed, learned ones by the shift."""
    model = made(name)
    _, cache = model.decode(IDS, decoder_input_ids=DECODED[:, :3])
    known = {f"decoder.layers.{n}.attn.": cache[2 * n] for n in range(3)}

    def memory(at: str) -> list[Memory]:
        return [Memory(*known[at], lambda dk, dv, want: {}, placed=True)] if at in known else []

    whole, _ = model(IDS, **GIVEN)
    hooks = Hooks(memory=memory, shift=3)
    inputs = {"decoder_input_ids": DECODED[:, 3:]}
    if name == "T5":
        same(model.run(hooks, IDS, **inputs)[0], whole[:, 3:])
    else:  # the shift is for both stacks: the encoder's tokens stand further on too
        tables = {
            n: np.roll(v, 3, axis=0) for n, v in model.params.items() if n.endswith("encoder.embed_positions.weight")
        }
        back = Model(model.config, model.sites, {**model.params, **tables})
        same(back.run(hooks, IDS, **inputs)[0], whole[:, 3:])


# ── relative positions ───────────────────────────────────────────────────────────────────────────────────────────────


def test_buckets_of_the_paper() -> None:
    """32 buckets up to 128: 8 near distances to each side, then 16, 32 and 64 begin every second one of the rest."""
    assert thresholds(16, 128) == [12, 16, 23, 32, 46, 64, 91]
    near = np.arange(-7, 8)
    assert buckets(near, 32, 128, both=True).tolist() == [*range(7, -1, -1), *range(17, 24)]
    far = np.array([8, 11, 12, 15, 16, 64, 90, 91, 127, 128, 10**6])
    assert (buckets(-far, 32, 128, both=True)).tolist() == [8, 8, 9, 9, 10, 14, 14, 15, 15, 15, 15]
    assert (buckets(far, 32, 128, both=True) - buckets(-far, 32, 128, both=True)).tolist() == [16] * len(far)
    assert buckets(np.array([5, 1, 0, -1, -15, -16, -18, -19, -1000]), 32, 128, both=False).tolist() == [
        0, 0, 0, 1, 15, 16, 16, 17, 31,
    ]  # fmt: skip


@pytest.mark.peft
@pytest.mark.parametrize(("n", "longest"), [(32, 128), (8, 10), (16, 64), (10, 100), (64, 1000), (4, 20)])
@pytest.mark.parametrize("both", [True, False])
def test_buckets_are_those_of_transformers(n: int, longest: int, both: bool) -> None:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    r = np.arange(-2000, 2001)
    theirs = T5Attention._relative_position_bucket(torch.tensor(r), both, n, longest).numpy()
    np.testing.assert_array_equal(buckets(r, n, longest, both), theirs)
