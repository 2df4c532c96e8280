"""Objectives: batches against HF's collators and small integers, losses against HF's models, and what chance may do."""

import math
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from refpeft import objectives
from refpeft.check import check_op
from refpeft.objectives import IGNORE, Objective, Setting, make
from tests.models import config_json, tiny

ROWS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
T5 = Setting(pad_id=0, eos_id=1, start_id=0, sentinel_id=99, encoder_decoder=True)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def lists(batch: Any) -> dict[str, Any]:
    return {name: a.tolist() for name, a in batch.items()}


# ── batches, by hand ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_causal_predicts_all_of_a_text() -> None:
    assert lists(make("causal", Setting(pad_id=3)).batch(ROWS, rng())) == {
        "input_ids": [[5, 6, 7, 8], [9, 10, 3, 3]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[5, 6, 7, 8], [9, 10, IGNORE, IGNORE]],
    }


def test_causal_keeps_the_end_of_text_though_padding_has_the_same_id() -> None:
    batch = make("causal", Setting(pad_id=2)).batch([{"input_ids": [7, 2]}, {"input_ids": [7, 8, 9, 2]}], rng())
    assert batch["labels"].tolist() == [[7, 2, IGNORE, IGNORE], [7, 8, 9, 2]]


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_a_pair_in_a_decoder_only_model_is_one_text_with_labels_on_the_target(name: str) -> None:
    rows = [{"input_ids": [5, 6], "labels": [7, 8, 9]}, {"input_ids": [4], "labels": [3]}]
    assert lists(make(name, Setting()).batch(rows, rng())) == {
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[IGNORE, IGNORE, 7, 8, 9], [IGNORE, 3, IGNORE, IGNORE, IGNORE]],
    }


def test_seq2seq_shifts_the_target_to_the_right() -> None:
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 8, 1]}, {"input_ids": [4, 1], "labels": [1]}]
    assert lists(make("seq2seq", T5).batch(rows, rng())) == {
        "input_ids": [[5, 6, 1], [4, 1, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[7, 8, 1], [1, IGNORE, IGNORE]],
        "decoder_input_ids": [[0, 7, 8], [0, 1, 0]],
    }


def test_a_sentinel_stands_before_the_targets() -> None:
    batch = make("span-corruption-sentinel", T5).batch([{"input_ids": [5, 1], "labels": [7, 1]}], rng())
    assert batch["labels"].tolist() == [[99, 7, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 99, 7]]


def test_the_example_of_the_t5_paper() -> None:
    """Figure 2: 'Thank you <X> me to your party <Y> week.' and '<X> for inviting <Y> last <Z>'."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    noise = np.array([w in ("for", "inviting", "last") for w in words])
    x, y = objectives.corrupt(range(len(words)), noise, 99)
    said = dict(enumerate(words)) | {99: "<X>", 98: "<Y>", 97: "<Z>"}
    assert " ".join(said[n] for n in x) == "Thank you <X> me to your party <Y> week ."
    assert " ".join(said[n] for n in y) == "<X> for inviting <Y> last <Z>"
    assert objectives.corrupt(range(len(words)), noise, 99, final=False) == (x, y[:-1])


def test_j3_nothing_is_lost_by_span_corruption() -> None:
    for seed in range(30):
        ids = list(range(2, 2 + 3 + seed))
        x, y = objectives.span_corruption(ids, rng(seed), T5)
        assert x[-1] == y[-1] == T5.eos_id
        spans: dict[int, list[int]] = {}
        for token in y[:-1]:
            spans.setdefault(token, []) if token > 50 else spans[next(reversed(spans))].append(token)
        back = [t for token in x[:-1] for t in (spans[token] if token > 50 else [token])]
        assert back == ids
        assert list(spans) == [99 - k for k in range(len(spans))]
        assert spans[99 - len(spans) + 1] == []  # the final sentinel


def test_lm_adaptation_splits_uniformly_into_two_parts_that_are_not_empty() -> None:
    ids, r = [5, 6, 7, 8], rng()
    seen = Counter()
    for _ in range(3000):
        x, y = objectives.lm_adaptation(ids, r, T5)
        assert [*x[:-1], *y[:-1]] == ids
        assert x[-1] == y[-1] == 1
        seen[len(x) - 1] += 1
    assert set(seen) == {1, 2, 3}
    assert all(abs(count - 1000) < 130 for count in seen.values())  # 5 standard deviations
    x, y = objectives.lm_adaptation(ids, r, Setting())
    assert [*x, *y] == ids


# ── noise masks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def runs(mask: Any) -> list[int]:
    """The lengths of the pieces of equal values, which begin with False."""
    return np.diff(np.flatnonzero(np.diff([-1, *mask.astype(int), 2]))).tolist()


@pytest.mark.parametrize(("length", "density", "mean"), [(10, 0.3, 1.5), (9, 0.5, 2.0), (8, 0.25, 1.0)])
def test_j4_every_mask_with_its_numbers_is_equally_likely(length: int, density: float, mean: float) -> None:
    n = round(length * density)
    k = round(n / mean)
    ways = math.comb(n - 1, k - 1) * math.comb(length - n - 1, k - 1)  # cut both into k pieces
    r, draws = rng(), 400 * ways
    seen = Counter(tuple(objectives.noise_mask(r, length, density, mean).tolist()) for _ in range(draws))
    assert len(seen) == ways
    assert all(sum(mask) == n and len(runs(np.array(mask))) == 2 * k and not mask[0] for mask in seen)
    assert all(abs(count - 400) < 5 * math.sqrt(400) for count in seen.values())


@pytest.mark.parametrize("length", [1, 2, 3, 5, 40, 512])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.9, 1.0), (0.5, 1.0), (0.01, 30.0)])
def test_noise_masks_at_the_borders(length: int, density: float, mean: float) -> None:
    mask = objectives.noise_mask(rng(length), length, density, mean)
    assert mask.shape == (length,)
    assert not mask[0]
    assert mask.sum() == (min(max(round(length * density), 1), length - 1) if length > 1 else 0)


def test_t5s_numbers() -> None:
    """Of 512 tokens 77 are noise, in 26 spans: 15 % in spans of 3."""
    mask = objectives.noise_mask(rng(), 512)
    assert mask.sum() == 77
    assert len(runs(mask)) == 2 * 26


def test_pieces_are_all_compositions() -> None:
    r = rng()
    seen = {tuple(objectives.pieces(r, 6, 3).tolist()) for _ in range(500)}
    assert seen == {(a, b - a, 6 - b) for a, b in combinations(range(1, 6), 2)}


# ── masked language models ───────────────────────────────────────────────────────────────────────────────────────────


def test_masks_are_an_argument() -> None:
    on = [[0, 1, 1, 1, 0]]
    draws = objectives.Draws(
        np.array(on) == 1,
        np.array([[0, 1, 0, 0, 0]]) == 1,
        np.array([[0, 0, 1, 0, 0]]) == 1,
        np.array([[0, 0, 77, 0, 0]]),
    )
    corrupted, labels = objectives.mask_tokens(np.array([[5, 6, 7, 8, 9]]), draws, mask_id=4)
    assert corrupted.tolist() == [[5, 4, 77, 8, 9]]
    assert labels.tolist() == [[IGNORE, 6, 7, 8, IGNORE]]


def test_the_shares_are_15_and_80_10_10_percent() -> None:
    n = 200_000
    draws = objectives.draw(rng(), np.ones((1, n), bool), vocab=50)
    share = draws.chosen.mean()
    assert abs(share - 0.15) < 5 * math.sqrt(0.15 * 0.85 / n)
    m = draws.chosen.sum()
    for part, p in ((draws.masked, 0.8), (draws.random, 0.1)):
        assert not (part & ~draws.chosen).any()
        assert abs(part.sum() / m - p) < 5 * math.sqrt(p * (1 - p) / m)
    assert not (draws.masked & draws.random).any()
    assert set(draws.words[draws.random].tolist()) == set(range(50))


def test_special_tokens_and_padding_are_never_chosen() -> None:
    s = Setting(pad_id=0, mask_id=4, vocab=29, special_ids=(2, 3), mask_probability=0.99)
    rows = [{"input_ids": [2, 9, 10, 3]}, {"input_ids": [2, 11, 3]}]
    batch = make("masked", s).batch(rows, rng())
    assert batch["labels"].tolist() == [[IGNORE, 9, 10, IGNORE], [IGNORE, 11, IGNORE, IGNORE]]
    assert batch["input_ids"][:, 0].tolist() == [2, 2]


def words(size: int) -> Any:
    """A tokenizer of transformers with `size` ids: 0 [PAD], 1 [MASK], 2 [CLS], 3 [SEP], and words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(4, size))]
    t = Tokenizer(models.WordLevel({w: n for n, w in enumerate(names)}, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.mark.peft
def test_masked_batches_are_those_of_transformers_collator_for_the_same_seed() -> None:
    from transformers import DataCollatorForLanguageModeling

    r = rng(5)
    rows = [{"input_ids": [2, *r.integers(4, 40, n).tolist(), 3]} for n in (30, 12, 25, 1)]
    theirs = DataCollatorForLanguageModeling(words(40), mlm=True, seed=11, return_tensors="np")
    ours = make("masked", Setting(pad_id=0, mask_id=1, vocab=40, special_ids=(0, 1, 2, 3)))
    generator = np.random.default_rng(11)
    for _ in range(3):
        found, expected = ours.batch(rows, generator), theirs([dict(row) for row in rows])
        for name in ("input_ids", "attention_mask", "labels"):
            assert np.array_equal(found[name], expected[name]), name


@pytest.mark.peft
def test_causal_and_seq2seq_batches_are_those_of_transformers_collators() -> None:
    import transformers as t

    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11]}]
    theirs = t.DataCollatorForLanguageModeling(words(40), mlm=False, return_tensors="np")(rows)
    found = make("causal", Setting(pad_id=0)).batch(rows, rng())
    assert all(np.array_equal(found[name], theirs[name]) for name in found)

    model = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=40, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    pairs = [{"input_ids": [5, 6], "labels": [7, 8, 1]}, {"input_ids": [4], "labels": [1]}]
    seq2seq = t.DataCollatorForSeq2Seq(words(40), model=model)([dict(row) for row in pairs])
    found = make("seq2seq", T5).batch(pairs, rng())
    assert all(np.array_equal(found[name], seq2seq[name].numpy()) for name in found)


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_op(objective: Objective, batch: Any) -> Any:
    """The loss as an op of the logits, for the complex step."""

    def op(logits: Any) -> Any:
        L, dlogits, _ = objective.loss(logits, batch)
        return L, lambda dL: (lambda: dL * dlogits,)

    return op


@pytest.mark.parametrize("positions", [4, 6])  # 6: two virtual tokens stand before them
def test_gradients_of_losses_are_the_complex_steps(positions: int) -> None:
    logits = rng().normal(size=(2, positions, 12))
    for objective, batch in (
        (make("causal", Setting()), make("causal", Setting()).batch(ROWS, rng())),
        (make("seq2seq", T5), {"labels": np.array([[3, 4, 5, 6], [7, IGNORE, IGNORE, IGNORE]])}),
    ):
        assert check_op(as_op(objective, batch), logits) < 1e-12


def test_gradients_of_the_classification_losses() -> None:
    objective = make("classification", Setting())
    classes = objective.batch([{"input_ids": [1], "label": 2}, {"input_ids": [1, 2], "label": 0}], rng())
    numbers = objective.batch([{"input_ids": [1], "label": 2.5}, {"input_ids": [1, 2], "label": -1.0}], rng())
    assert check_op(as_op(objective, classes), rng().normal(size=(2, 3))) < 1e-12
    assert check_op(as_op(objective, numbers), rng().normal(size=(2, 1))) < 1e-12
    L, dy, n = objective.loss(np.array([[1.5], [1.0]]), numbers)
    assert n == 2
    assert L == (1 + 4) / 2
    assert dy.tolist() == [[-1.0], [2.0]]


def test_virtual_tokens_predict_the_first_token_and_nothing_else() -> None:
    """Logits of a prompt of two: position 1, the last virtual one, is asked for the first label."""
    objective = make("causal", Setting())
    logits = rng().normal(size=(1, 4, 9))
    _, dlogits, n = objective.loss(logits, {"labels": np.array([[5, 6]])})
    assert n == 2
    assert [bool(d.any()) for d in dlogits[0]] == [False, True, True, False]


def test_j2_padding_changes_nothing() -> None:
    model = tiny("gpt2")
    objective = make("causal", Setting(pad_id=0))

    def total(rows: Any) -> float:
        batch = objective.batch(rows, rng())
        out, _ = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        L, _, n = objective.loss(out, batch)
        assert n == sum(len(row["input_ids"]) - 1 for row in rows)
        return float(L) * n

    assert math.isclose(total(ROWS), sum(total([row]) for row in ROWS), rel_tol=1e-13)


@pytest.mark.peft
@pytest.mark.parametrize(
    ("family", "architecture", "name"),
    [
        ("gpt2", "LMHeadModel", "causal"),
        ("bert", "ForMaskedLM", "masked"),
        ("bert", "ForSequenceClassification", "classification"),
        ("gpt2", "ForSequenceClassification", "classification"),
        ("bert", "ForSequenceClassification", "regression"),
    ],
)
def test_j1_losses_are_those_of_transformers(family: str, architecture: str, name: str) -> None:
    import torch
    import transformers

    import refpeft

    extra: dict[str, Any] = {"num_labels": 1} if name == "regression" else {}
    base = tiny(family, architecture, **extra)
    objective = make(
        name.replace("regression", "classification"), Setting(pad_id=0, mask_id=4, vocab=29, mask_probability=0.6)
    )
    labels = [1.5, -0.5] if name == "regression" else [2, 0]
    rows = [dict(row, label=n) for row, n in zip(ROWS, labels, strict=True)]
    batch = objective.batch(rows, rng(3))
    out, _ = base(batch["input_ids"], attention_mask=batch["attention_mask"])
    L, _, _ = objective.loss(out, batch)

    source = config_json(family, architecture, **extra)
    theirs = getattr(transformers, source["architectures"][0])
    config = theirs.config_class(**{k: v for k, v in source.items() if k not in ("model_type", "architectures")})
    model = theirs(config).double().eval()
    state = {
        n: torch.tensor(np.ascontiguousarray(a)) for n, a in refpeft.checkpoint.models.planned_tensors(base).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in n or "decoder" in n or "position_ids" in n for n in missing)
    model.tie_weights()
    given = {n: torch.tensor(a) for n, a in batch.items()}
    if name == "regression":
        given["labels"] = given["labels"].double()
    said = model(**given)
    # transformers computes the loss of causal models in float32 whatever their dtype
    assert math.isclose(float(L), said.loss.item(), rel_tol=1e-6 if name == "causal" else 1e-12)
    if name == "causal":
        logits, targets = said.logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten()
        assert math.isclose(float(L), torch.nn.functional.cross_entropy(logits, targets).item(), rel_tol=1e-12)


# ── what is missing ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("masked", Setting(vocab=29), "objective 'masked' needs mask_id"),
        ("span-corruption", Setting(), "needs sentinel_id"),
        ("seq2seq", Setting(encoder_decoder=True), "needs start_id"),
        ("dreaming", Setting(), "unknown objective 'dreaming': there are causal"),
    ],
)
def test_what_an_objective_needs(name: str, setting: Setting, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(name, setting)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"noise_density must lie between 0 and 1, found 1\.5"):
        Setting(noise_density=1.5)
    with pytest.raises(ValueError, match="mean_span must be at least 1"):
        Setting(mean_span=0.5)
