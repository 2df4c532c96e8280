"""T5 and BART against HF transformers, and T5 against a float64 oracle of our own.

transformers computes BART in float64 if its weights are: there, equal means 1e-10 relative. Its T5 computes the mean
square of each norm in float32 whatever the weights are (`T5LayerNorm`), and nothing else: as it is, it agrees to 1e-6,
and to 1e-10 with a norm that does not round. `t5_oracle` below is written from the paper in loops and einsum, without
`refpeft.ops`, and agrees to 1e-12.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import Model, objectives
from refpeft.checkpoint.safetensors import read
from refpeft.inputs import shift_right
from tests.models import ENCODER_DECODERS, tiny

Array = np.ndarray[Any, Any]
every = pytest.mark.parametrize("name", [*ENCODER_DECODERS, "T5EncoderModel", "T5, symmetric"])
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "T5EncoderModel": ("t5", "EncoderModel", {}),
    "T5, symmetric": (
        "t5", "ForConditionalGeneration",
        {"num_decoder_layers": None, "d_kv": 4, "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-2,
         "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    ),
}  # fmt: skip
IDS = np.array([[5, 9, 3, 7, 2, 8], [6, 4, 2, 11, 3, 2]])
DECODED = np.array([[0, 12, 5, 21, 7], [0, 8, 9, 3, 20]])


def made(name: str) -> Model:
    family, architecture, config = (ENCODER_DECODERS | MORE)[name]
    return tiny(family, architecture, **config)


def in_transformers(model: Model, folder: Path) -> Any:
    """What transformers reads from what we save; nothing may be missing or left over."""
    import torch
    import transformers

    if not folder.exists():
        refpeft.save(model, folder)
    cls = getattr(transformers, model.source["architectures"][0])
    theirs, info = cls.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    for module in theirs.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # a habit of training: the padding's row would get no gradient
    return theirs.eval()


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5LayerNorm in the dtype of its input."""
    import torch
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    def forward(self: Any, x: Any) -> Any:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(T5LayerNorm, "forward", forward)


def inputs(name: str) -> dict[str, Array]:
    """Padding in both stacks; a classifier reads its own input, shifted, and all of it."""
    mask, decoder_mask = np.ones_like(IDS), np.ones_like(DECODED)
    mask[1, 4:] = decoder_mask[0, 3:] = 0
    if name == "BART classifier":
        return {}
    own = {"attention_mask": mask}
    if name == "T5EncoderModel":
        return own
    return {**own, "decoder_input_ids": DECODED, "decoder_attention_mask": decoder_mask}


def near(ours: Array, theirs: Array, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def agree(name: str, folder: Path, tolerance: float) -> None:
    """Outputs, and the gradients of every parameter."""
    import torch

    model, ids = made(name), np.array([[5, 9, 2, 7, 2, 8], [6, 4, 11, 2, 3, 2]]) if "class" in name else IDS
    theirs = in_transformers(model, folder)
    given = inputs(name)
    expected = theirs(input_ids=torch.tensor(ids), **{k: torch.tensor(v) for k, v in given.items()})[0]
    out, vjp = model(ids, **given)
    near(out, expected.detach().numpy(), tolerance)
    dout = np.random.default_rng(1).normal(size=out.shape)
    expected.backward(torch.tensor(dout))
    grads = vjp(dout, base=True)[1]
    own = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    assert grads.keys() == own.keys() | set(model.config.buffers)
    largest = max(np.linalg.norm(d) for d in own.values())
    for n, d in own.items():  # the bias of the keys has gradient 0 but for rounding, hence a scale for it too
        assert np.linalg.norm(grads[n] - d) <= 5 * tolerance * max(np.linalg.norm(d), largest / 100), n


@pytest.mark.peft
@pytest.mark.usefixtures("exact_norms")
@every
def test_outputs_and_all_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    agree(name, tmp_path / "m", 1e-10)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "T5EncoderModel"])
def test_transformers_as_it_is_rounds_t5s_norms_to_float32(name: str, tmp_path: Path) -> None:
    agree(name, tmp_path / "m", 2e-6)
    model = made(name)
    out, _ = model(IDS, **inputs(name))
    import torch

    expected = in_transformers(model, tmp_path / "m")(
        input_ids=torch.tensor(IDS), **{k: torch.tensor(v) for k, v in inputs(name).items()}
    )[0]
    assert np.abs(out - expected.detach().numpy()).max() > 1e-10  # if not, the words above are wrong


@pytest.mark.peft
@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "BART"])
def test_the_loss_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """J1: labels shifted to the right go into the decoder; of sequence to sequence, and of span corruption."""
    import torch

    model = made(name)
    theirs = in_transformers(model, tmp_path / "m")
    c = model.config
    setting = objectives.Setting(
        pad_id=c.pad_token_id or 0, eos_id=c.eos_token_id, start_id=c.decoder_start_token_id, sentinel_id=28,
        encoder_decoder=True,
    )  # fmt: skip
    rows = [{"input_ids": [5, 6, 7, 9, 11, 1], "labels": [7, 8, 1]}, {"input_ids": [4, 9, 1], "labels": [9, 1]}]
    for objective in ("seq2seq", "span-corruption", "lm-adaptation"):
        goal = objectives.make(objective, setting)
        batch = goal.batch(rows, np.random.default_rng(0))
        out, _ = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=batch["decoder_input_ids"]
        )
        labels = torch.tensor(batch["labels"])
        expected = theirs(
            input_ids=torch.tensor(batch["input_ids"]),
            attention_mask=torch.tensor(batch["attention_mask"]),
            labels=labels,
        ).loss
        assert goal.loss(out, batch)[0] == pytest.approx(expected.item(), rel=1e-10)
        shifted = theirs.prepare_decoder_input_ids_from_labels(labels).numpy()
        np.testing.assert_array_equal(shifted, batch["decoder_input_ids"])


def test_shifting_to_the_right() -> None:
    assert shift_right(np.array([[7, 8, -100], [9, -100, -100]]), 2, 1).tolist() == [[2, 7, 8], [2, 9, 1]]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peft
@every
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    """What transformers writes of it is read as the same model, and written again as the same tensors."""
    model = made(name)
    theirs = in_transformers(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = refpeft.load(tmp_path / "theirs")
    assert again.config == model.config
    assert again.sites == model.sites
    assert again.params.keys() == model.params.keys()
    for n, v in model.params.items():
        np.testing.assert_array_equal(again.params[n], v)
    refpeft.save(again, tmp_path / "again")
    ours, back = (read(tmp_path / f / "model.safetensors") for f in ("ours", "again"))
    assert {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in back.items()}
    in_transformers(again, tmp_path / "again")


@pytest.mark.parametrize("name", ["BART", "T5"])
def test_a_head_that_is_no_longer_tied_is_saved_with_all_its_copies(name: str, tmp_path: Path) -> None:
    """And a T5 that scales what goes into a tied head goes on doing so."""
    model = made(name)
    adapter = refpeft.init("lora", {"r": 2, "target_modules": ["lm_head"], "init_lora_weights": False}, model)
    merged = refpeft.merge(model, adapter)
    refpeft.save(merged, tmp_path / "m")
    again = refpeft.load(tmp_path / "m")
    assert "lm_head.weight" in again.params
    given = inputs(name)
    near(again(IDS, **given)[0], model(IDS, adapter, **given)[0], 1e-12)


@pytest.mark.peft
@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("target", ["lm_head", "shared"])
@pytest.mark.parametrize("name", ["BART", "T5", "T5 v1.1"])
def test_a_head_that_is_no_longer_tied_is_read_by_transformers(name: str, target: str, tmp_path: Path) -> None:
    """And an adapted table is that of the encoder and of the decoder."""
    import torch

    model = made(name)
    adapter = refpeft.init("lora", {"r": 2, "target_modules": [target], "init_lora_weights": False}, model)
    theirs = in_transformers(refpeft.merge(model, adapter), tmp_path / "m")
    given = inputs(name)
    expected = theirs(input_ids=torch.tensor(IDS), **{k: torch.tensor(v) for k, v in given.items()})[0]
    near(model(IDS, adapter, **given)[0], expected.detach().numpy(), 1e-10)


@pytest.mark.peft
def test_bart_without_decoder_input_ids_reads_its_own_input_shifted(tmp_path: Path) -> None:
    import torch

    model = made("BART")
    expected = in_transformers(model, tmp_path / "m")(input_ids=torch.tensor(IDS))[0].detach().numpy()
    near(model(IDS)[0], expected, 1e-10)


# ── T5 in float64, from the paper ────────────────────────────────────────────────────────────────────────────────────


def bucket(r: int, n: int, longest: int, both: bool) -> int:
    """Raffel et al. 2020, §2.1, as T5's code has it: half of the buckets for single distances, half for their logs."""
    if both:
        return (n // 2 if r > 0 else 0) + bucket(-abs(r), n // 2, longest, False)
    d, e = max(-r, 0), n // 2
    return d if d < e else min(n - 1, e + int(np.log(d / e) / np.log(longest / e) * (n - e) + 1e-9))


def t5_oracle(model: Model, ids: Array, mask: Array, decoded: Array) -> Array:
    """Logits [s, v] of one row: a position at a time, a head at a time."""
    c, p = model.source, model.params
    h, e, d = c["num_heads"], c["d_kv"], c["d_model"]
    table = (c["relative_attention_num_buckets"], c["relative_attention_max_distance"])

    def norm(x: Array, name: str) -> Array:
        return p[name + ".weight"] * x / np.sqrt((x**2).sum(-1, keepdims=True) / d + c.get("layer_norm_epsilon", 1e-6))

    def times(x: Array, name: str) -> Array:
        return np.einsum("si,oi->so", x, p[name + ".weight"])

    def attended(at: str, x: Array, m: Array, seen: Any, stack: str | None) -> Array:
        q, k, v = (times(y, f"{at}.{name}").reshape(len(y), h, e) for name, y in (("q", x), ("k", m), ("v", m)))
        E = p[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] if stack else None
        a = np.zeros_like(q)
        for s, head in np.ndindex(len(x), h):
            ts = [t for t in range(len(m)) if seen(s, t)]
            score = [q[s, head] @ k[t, head] for t in ts]
            if E is not None:
                score = [w + E[bucket(t - s, *table, stack == "encoder"), head] for w, t in zip(score, ts, strict=True)]
            w = np.exp(np.array(score) - max(score))
            a[s, head] = sum((wt * v[t, head] for wt, t in zip(w / w.sum(), ts, strict=True)), np.zeros(e))
        return times(a.reshape(len(x), h * e), at + ".o")

    def fed(at: str, x: Array) -> Array:
        if c.get("feed_forward_proj", "relu") == "relu":
            return times(np.maximum(times(x, at + ".wi"), 0), at + ".wo")
        z = times(x, at + ".wi_0")
        gelu = z / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # ½ (1 + tanh u) = 1/(1 + e⁻²ᵘ)
        return times(gelu * times(x, at + ".wi_1"), at + ".wo")

    def stacked(stack: str, tokens: Array, layers: int, m: Array | None) -> Array:
        x = p["shared.weight"][tokens]
        for n in range(layers):
            at = f"{stack}.block.{n}.layer."
            y = norm(x, at + "0.layer_norm")
            own = (lambda s, t: t <= s) if stack == "decoder" else (lambda s, t: mask[t])
            x = x + attended(at + "0.SelfAttention", y, y, own, stack)
            if m is not None:
                y = norm(x, at + "1.layer_norm")
                x = x + attended(at + "1.EncDecAttention", y, m, lambda s, t: mask[t], None)
            last = f"{at}{1 if m is None else 2}."
            x = x + fed(last + "DenseReluDense", norm(x, last + "layer_norm"))
        return norm(x, f"{stack}.final_layer_norm")

    x = stacked("decoder", decoded, c["num_decoder_layers"], stacked("encoder", ids, c["num_layers"], None))
    if c.get("tie_word_embeddings", True):
        return np.einsum("sd,vd->sv", x / np.sqrt(d), p["shared.weight"])
    return np.einsum("sd,vd->sv", x, p["lm_head.weight"])


@pytest.mark.parametrize("name", ["T5", "T5 v1.1"])
def test_t5_equals_its_float64_oracle(name: str) -> None:
    model, rng = made(name), np.random.default_rng(4)
    ids, decoded, mask = rng.integers(2, 29, (2, 17)), rng.integers(2, 29, (2, 14)), np.ones((2, 17), int)
    mask[1, 12:] = 0
    out, _ = model(ids, attention_mask=mask, decoder_input_ids=decoded)
    for n in range(2):
        near(out[n], t5_oracle(model, ids[n], mask[n], decoded[n]), 1e-12)


@pytest.mark.peft
@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "BART"])
def test_what_is_written_word_by_word_is_what_transformers_writes(name: str, tmp_path: Path) -> None:
    """Greedily, with the keys and values of both kinds of attention kept, and padding in the encoder. (transformers
    5.24 makes T5's cache for as many layers as the encoder has, and fails if the decoder has more.)"""
    import torch
    from transformers import GenerationConfig

    family, architecture, config = ENCODER_DECODERS[name]
    more: dict[str, Any] = {"num_decoder_layers": 2, "seed": 7} if family == "t5" else {}  # of many words
    model = tiny(family, architecture, **config, **more)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    theirs, start = in_transformers(model, tmp_path / "m"), model.config.decoder_start_token_id
    how = GenerationConfig(max_new_tokens=9, do_sample=False, decoder_start_token_id=start, pad_token_id=0)
    expected = theirs.generate(torch.tensor(IDS), generation_config=how, attention_mask=torch.tensor(mask)).numpy()
    word, cache, found = np.full((2, 1), start), None, []
    for _ in range(expected.shape[1]):
        found.append(word)
        out, cache = model.decode(IDS, cache, attention_mask=mask, decoder_input_ids=word)
        word = out[:, -1:].argmax(-1)
    assert len(np.unique(expected)) > 3  # words, and not one for ever
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
