"""P-tuning: its claims, templates with virtual tokens anywhere, answers read off words, and HF peft's PromptEncoder."""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft import templates
from refpeft.checkpoint.safetensors import read
from refpeft.methods import p_tuning
from refpeft.prompts import P, table
from tests.models import tiny
from tests.refpeft.equal import EXACT, same
from tests.refpeft.soft import HF, both, hf, hf_base, hf_load, hf_run

N, V = 3, 29
rng = np.random.default_rng(0)
IDS = rng.integers(2, V, (2, 6))
ENCODERS = {
    "mlp": {},
    "narrow mlp": {"encoder_hidden_size": 5},
    "lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 4, "encoder_num_layers": 1},
    "deep lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 3, "encoder_num_layers": 3},
}
encoders = pytest.mark.parametrize("config", ENCODERS.values(), ids=list(ENCODERS))


def fresh(model: Any, seed: int = 0, **config: Any) -> refpeft.Adapter:
    return refpeft.init("p_tuning", {"num_virtual_tokens": N, **config}, model, seed)


# ── the encoder ──────────────────────────────────────────────────────────────────────────────────────────────────────


@encoders
@pytest.mark.parametrize(("family", "architecture"), [("gpt2", None), ("llama", None), ("bert", "ForMaskedLM")])
def test_gradients_are_exact(family: str, architecture: str | None, config: Any) -> None:
    """Of every parameter of the encoder, through the LSTM in both directions; and of the base under it."""
    model = tiny(family, architecture)
    adapter = fresh(model, **config)
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT


def test_gradients_are_exact_under_dropout() -> None:
    """Between the layers of the LSTM, with one mask for the batch; a mask of ones is none."""
    model = tiny("gpt2")
    config = ENCODERS["deep lstm"]
    adapter = fresh(model, encoder_dropout=0.5, **config)
    dropped = refpeft.dropout(adapter, model, IDS.shape, seed=1)
    (mask,) = dropped.masks.values()
    assert mask.shape == (2, 1, N, 6)
    assert set(np.unique(mask)) == {0, 2}
    assert max(refpeft.check_model(model, IDS, dropped).values()) <= EXACT
    assert np.abs(model(IDS, dropped)[0] - model(IDS, adapter)[0]).max() > 1e-3
    ones = adapter.replace(masks={p_tuning.LSTM: np.ones_like(mask)})
    np.testing.assert_array_equal(model(IDS, ones)[0], model(IDS, adapter)[0])
    assert refpeft.dropout(fresh(model, encoder_dropout=0.5), model, IDS.shape).masks == {}


@encoders
def test_the_encoder_can_be_dropped(config: Any) -> None:
    """PU1: outputs are the same to the bit, and what is trained from then on is P."""
    model = tiny("gpt2")
    adapter = fresh(model, **config)
    plain = refpeft.drop_encoder(adapter)
    assert set(plain.params) == {P}
    out, vjp = model(IDS, plain)
    np.testing.assert_array_equal(out, model(IDS, adapter)[0])
    assert set(vjp(out)) == {P}
    assert refpeft.drop_encoder(plain).params == plain.params
    with pytest.raises(ValueError, match="lora has no encoder that could be dropped"):
        refpeft.drop_encoder(refpeft.init("lora", {}, model))


def test_a_head_trained_beside_outlives_the_encoder() -> None:
    """PU1"""
    model = tiny("bert", "ForSequenceClassification")
    adapter = fresh(model, modules_to_save=["classifier"])
    plain = refpeft.drop_encoder(adapter)
    assert set(plain.params) == {P, "classifier.weight", "classifier.bias"}
    np.testing.assert_array_equal(model(IDS, plain)[0], model(IDS, adapter)[0])


@encoders
def test_before_the_tokens_it_is_prompt_tuning(config: Any) -> None:
    """PU2: outputs, and the gradient of P."""
    model = tiny("llama")
    plain = refpeft.drop_encoder(fresh(model, **config))
    prompt = refpeft.init("prompt_tuning", {"num_virtual_tokens": N}, model).replace(params=plain.params)
    (out, vjp), (want, vjp_prompt) = model(IDS, plain), model(IDS, prompt)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(vjp(out)[P], vjp_prompt(out)[P])


@pytest.mark.parametrize("config", [ENCODERS["lstm"], ENCODERS["deep lstm"]], ids=["one layer", "three"])
def test_both_biases_of_the_lstm_have_one_gradient(config: Any) -> None:
    """PU4"""
    model = tiny("gpt2")
    out, vjp = model(IDS, fresh(model, **config))
    grads = vjp(rng.normal(size=out.shape))
    pairs = [(n, n.replace("bias_ih", "bias_hh")) for n in grads if "bias_ih" in n]
    assert len(pairs) == 2 * config["encoder_num_layers"]
    for one, other in pairs:
        assert np.abs(grads[one]).max() > 0
        np.testing.assert_array_equal(grads[one], grads[other])


def test_what_the_encoder_computes_written_out() -> None:
    """The MLP alone, and the LSTM step by step from the formula, read in both directions."""
    model = tiny("gpt2")
    φ = fresh(model, encoder_hidden_size=5).params
    mlp = lambda z, last: z @ φ[f"mlp_head.{last}.weight"].T + φ[f"mlp_head.{last}.bias"]  # noqa: E731
    P_mlp = mlp(np.maximum(mlp(np.maximum(mlp(φ["embedding.weight"], 0), 0), 2), 0), 4)
    same(refpeft.drop_encoder(fresh(model, encoder_hidden_size=5)).params[P], P_mlp)
    adapter = fresh(model, **ENCODERS["lstm"])
    φ = adapter.params
    sides = []
    for way, order in (("l0", range(N)), ("l0_reverse", reversed(range(N)))):
        W, U, b, β = (φ[f"lstm_head.{name}_{way}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, c, found = np.zeros(4), np.zeros(4), {}
        for t in order:
            i, f, g, o = np.split(W @ φ["embedding.weight"][t] + b + U @ h + β, 4)
            c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
            h = found[t] = np.tanh(c) / (1 + np.exp(-o))
        sides.append(np.stack([found[t] for t in range(N)]))
    z = np.maximum(mlp(np.concatenate(sides, 1), 0), 0)
    same(refpeft.drop_encoder(adapter).params[P], mlp(z, 2))


def test_initialisation() -> None:
    """N(0, 1) for H, U(−1/√n, 1/√n) for all else, n being the width of what is read, or of the LSTM."""
    model = tiny("gpt2", n_embd=64)
    adapter = fresh(model, num_virtual_tokens=40, encoder_reparameterization_type="LSTM", encoder_hidden_size=25)
    assert adapter.config.encoder_hidden_size == 25
    assert fresh(model).config.encoder_hidden_size == 64
    assert abs(adapter.params["embedding.weight"].std() - 1) < 0.05
    for name, n in (("lstm_head.weight_ih_l1", 25), ("mlp_head.0.weight", 50), ("mlp_head.2.bias", 50)):
        a = adapter.params[name]
        assert 0.8 / np.sqrt(n) < np.abs(a).max() <= 1 / np.sqrt(n), name
    half = fresh(tiny("gpt2", dtype=ml_dtypes.bfloat16), **ENCODERS["lstm"])
    assert {a.dtype for a in half.params.values()} == {np.dtype(np.float32)}
    out, vjp = tiny("gpt2", dtype=ml_dtypes.bfloat16)(IDS, half)
    assert out.dtype == ml_dtypes.bfloat16
    assert {g.dtype for g in vjp(np.ones_like(out)).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder_reparameterization_type": "GRU"}, "must be 'MLP' or 'LSTM', found 'GRU'"),
        ({"encoder_num_layers": 0}, "must be positive integers, found 0"),
        ({"encoder_hidden_size": 0}, "must be positive integers, found 2 and 0"),
        ({"encoder_dropout": 1.0}, r"encoder_dropout must be in \[0, 1\), found 1.0"),
        ({"num_virtual_tokens": -1}, "num_virtual_tokens must be a positive integer, found -1"),
    ],
)
def test_what_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(tiny("gpt2"), **config)


# ── templates ────────────────────────────────────────────────────────────────────────────────────────────────────────

MASK = 4
WORDS = {"the": 5, "capital": 6, "of": 7, "is": 8}


def tokenise(text: str) -> list[int]:
    return [WORDS[w] for w in text.split()]


def template(text: str) -> templates.Compiled:
    return templates.compiled(text, tokenise, V, {"MASK": MASK, "CLS": 2})


def test_a_template_of_virtual_tokens_and_words() -> None:
    """(P₁, x, P₂, [MASK]) as ids: virtual tokens numbered from the left, hard words kept."""
    made = template("[CLS][P*2] the capital of {x} is [P] [MASK]")
    assert made == [2, V, V + 1, 5, 6, 7, "x", 8, V + 2, MASK]
    assert templates.virtual_tokens(made, V) == N
    rows = templates.filled(made, [{"x": [20, 21]}, {"x": [22]}], MASK, pad_id=0)
    assert rows.ids.tolist() == [[2, V, V + 1, 5, 6, 7, 20, 21, 8, V + 2, MASK],
                                 [2, V, V + 1, 5, 6, 7, 22, 8, V + 2, MASK, 0]]  # fmt: skip
    assert rows.at.tolist() == [10, 9]
    left = templates.filled(made, [{"x": [20, 21]}, {"x": [22]}], MASK, left=True)
    assert left.ids[1, 0] == left.attention_mask[1, 0] == 0
    assert left.at.tolist() == [10, 10]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_virtual_tokens_stand_anywhere(family: str) -> None:
    """PU3: with P = E[words] a template is the same sequence of words, and gradients are exact."""
    model = tiny(family, "ForMaskedLM" if family == "bert" else None)
    made = template("[P] {x} [P*2] [MASK]")
    rows = templates.filled(made, [{"x": [20, 21]}, {"x": [22, 23]}], MASK)
    words = np.array([11, 12, 13])
    adapter = fresh(model, placement="template").replace(params={P: table(model)[words].copy()})
    spelled = np.where(rows.ids >= V, words[rows.ids % V % N], rows.ids)
    same(model(rows.ids, adapter)[0], model(spelled)[0])
    trained = fresh(model, placement="template", **ENCODERS["lstm"])
    assert max(refpeft.check_model(model, rows.ids, trained, base=True).values()) <= EXACT


def test_the_order_of_virtual_tokens_decides() -> None:
    """PU3: exchanging two ids in the template exchanges two rows of P."""
    model = tiny("bert", "ForMaskedLM")
    ids = np.array([[2, V, 20, V + 1, V + 2, MASK]])
    turned = np.array([[2, V + 1, 20, V, V + 2, MASK]])
    adapter = refpeft.drop_encoder(fresh(model, placement="template"))
    exchanged = adapter.replace(params={P: adapter.params[P][[1, 0, 2]]})
    same(model(turned, adapter)[0], model(ids, exchanged)[0])
    assert np.abs(model(turned, adapter)[0] - model(ids, adapter)[0]).max() > 1e-3
    repeated = np.array([[V + 1, 20, V + 1, MASK]])  # one row twice: its gradient is that of both places
    assert max(refpeft.check_model(model, repeated, adapter).values()) <= EXACT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[P*3] {x", "is no \\[P\\], \\[P\\*3\\], \\[NAME\\] or {field}"),
        ("[SEP] {x}", r"\[SEP\] is no special token: there are MASK, CLS, and P"),
    ],
)
def test_a_template_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template(text)


def test_examples_that_do_not_fit_a_template() -> None:
    made = template("{x} [P] [MASK]")
    cut = templates.filled(made, [{"x": [20, 21, 22]}], MASK, max_length=4)
    assert cut.ids.tolist() == [[20, 21, V, MASK]]
    with pytest.raises(ValueError, match="do not fit max_length 1"):
        templates.filled(made, [{"x": [20]}], MASK, max_length=1)
    with pytest.raises(ValueError, match=r"there is nothing for \{x\}: the example has y"):
        templates.filled(made, [{"y": [20]}], MASK)
    with pytest.raises(ValueError, match="a row has 2 tokens to be filled in"):
        templates.filled(made, [{"x": [MASK]}], MASK)
    with pytest.raises(ValueError, match="there are no examples"):
        templates.filled(made, [], MASK)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_labels_are_read_off_words() -> None:
    """y_c is the mean of the logits of its words where the [MASK] is, and its gradient goes there and nowhere else."""
    words = [[5], [6, 7, 8]]
    logits = rng.normal(size=(2, 4, V))
    at = np.array([3, 1])
    y, back = templates.answers(logits, at, words)
    same(y, [[z[5], (z[6] + z[7] + z[8]) / 3] for z in (logits[0, 3], logits[1, 1])])
    dy = rng.normal(size=y.shape)
    dlogits = back(dy)
    for b, t in enumerate(at):
        same(dlogits[b, t, [5, 6, 7, 8]], [dy[b, 0], *[dy[b, 1] / 3] * 3])
    assert np.count_nonzero(dlogits) == 8
    assert refpeft.check_op(lambda z: templates.verbalizer(z, words), logits) <= EXACT
    same(templates.answers(logits, at, words, first=True)[0], logits[[0, 1], at][:, [5, 6]])
    with pytest.raises(ValueError, match="every label needs a word"):
        templates.verbalizer(logits, [[5], []])
    with pytest.raises(ValueError, match=f"words must be token ids from 0 to {V - 1}"):
        templates.verbalizer(logits, [[V]])


# ── HF peft ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hf_config(name: str, config: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of encoder_num_layers, which an MLP does not look at
        return peft.PromptEncoderConfig(task_type=name.split()[0], num_virtual_tokens=N, **config)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["CAUSAL_LM of gpt2", "CAUSAL_LM of llama", "SEQ_CLS of bert"])
@encoders
def test_it_is_hf_pefts_encoder(name: str, config: Any, tmp_path: Any) -> None:
    """Outputs and gradients of every weight of PromptEncoder, copied from there."""
    m = hf(name, hf_config(name, config))
    hf_base(name).save_pretrained(tmp_path / "base")
    model = refpeft.load(tmp_path / "base").astype(np.float64)
    theirs = {n: a.detach().numpy().copy() for n, a in m.prompt_encoder["default"].named_parameters()}
    ours = fresh(model, **config)
    assert {n: a.shape for n, a in ours.params.items()} == {n: a.shape for n, a in theirs.items()}
    ours = ours.replace(params={n: theirs[n] for n in ours.params})
    out, vjp = model(IDS, ours)
    dout = rng.normal(size=out.shape)
    want, grads = hf_run(m, IDS, np.ones_like(IDS), dout)
    tolerance = 1e-6 if "llama" in name else EXACT  # HF computes rotary positions and norms in float32
    same(out, want, tolerance)
    for n, g in vjp(dout).items():
        same(g, grads[f"prompt_encoder.default.{n}"], tolerance)


@pytest.mark.peft
@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("config", [ENCODERS["mlp"], ENCODERS["deep lstm"]], ids=["mlp", "lstm"])
def test_folders_both_ways(name: str, config: Any, tmp_path: Any) -> None:
    """They hold P and no encoder; ours is read by HF peft, and computes the same there."""
    m, model, theirs = both(name, hf_config(name, config), tmp_path)
    tensors = read(tmp_path / "theirs/adapter_model.safetensors")
    assert P in tensors
    assert not [n for n in tensors if "head." in n]
    tolerance = 1e-6 if "llama" in name else EXACT
    same(model(IDS, theirs)[0], hf_run(m, IDS, np.ones_like(IDS)), tolerance)
    refpeft.save_adapter(theirs, tmp_path / "again")
    again = read(tmp_path / "again/adapter_model.safetensors")
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in tensors.items()}
    heads = {"modules_to_save": ["classifier", "score"]} if "CLS" in name else {}
    ours = fresh(model, **config, **heads)
    refpeft.save_adapter(ours, tmp_path / "ours")
    loaded = hf_load(hf_base(name), tmp_path / "ours")
    rounded = refpeft.drop_encoder(ours)  # HF peft keeps prompts in float32 while it loads
    rounded = rounded.replace(params={n: a.astype(np.float32).astype(np.float64) for n, a in rounded.params.items()})
    same(model(IDS, rounded)[0], hf_run(loaded, IDS, np.ones_like(IDS)), tolerance)
