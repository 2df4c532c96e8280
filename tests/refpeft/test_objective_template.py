"""The objective `template`: a question with a gap is what a language model is asked anyway."""

import numpy as np
import pytest

from refpeft.check import check_op
from refpeft.objectives import IGNORE, Setting, make
from refpeft.templates import Question
from tests.models import tiny

V, MASK = 29, 4
FIELDS = [{"fields": {"x": [20, 21, 22]}, "label": 7}, {"fields": {"x": [23]}, "label": 9}]
EVERY_WORD = tuple((w,) for w in range(V))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_filled_template_with_its_labels() -> None:
    q = Question((2, "x", MASK, 3), ((5, 6), (7,)), MASK)
    batch = make("template", Setting(question=q)).batch([FIELDS[0] | {"label": 1}, FIELDS[1] | {"label": 0}], rng())
    assert {name: a.tolist() for name, a in batch.items()} == {
        "input_ids": [[2, 20, 21, 22, 4, 3], [2, 23, 4, 3, 0, 0]],
        "attention_mask": [[1] * 6, [1, 1, 1, 1, 0, 0]],
        "at": [4, 2],
        "labels": [1, 0],
    }


@pytest.mark.parametrize("kind", ["masked", "causal"])
@pytest.mark.parametrize("prompt", [0, 3])
def test_j5_with_every_word_a_label_of_its_own_it_is_the_models_own_objective(kind: str, prompt: int) -> None:
    """The loss of `masked` at the [MASK], or of `causal` behind the text, and the same gradient. Rows of a prompt
    before the text move the place."""
    masked = kind == "masked"
    q = Question((2, "x", MASK, 3) if masked else (2, "x"), EVERY_WORD, MASK if masked else None)
    objective = make("template", Setting(question=q))
    batch = objective.batch(FIELDS, rng())
    b, s = batch["input_ids"].shape
    logits = rng().normal(size=(b, prompt + s, V))
    labels = np.full((b, s + 1), IGNORE)
    for row, at in enumerate([4, 2]):
        labels[row, at] = FIELDS[row]["label"]
    plain = make(kind, Setting(mask_id=MASK, vocab=V))
    wide = logits if masked else np.concatenate([logits, logits[:, -1:]], axis=1)  # `causal` needs a next place
    L, d, n = plain.loss(wide, {"labels": labels[:, :s] if masked else labels})
    own, down, count = objective.loss(logits, batch)
    np.testing.assert_allclose(own, L, rtol=1e-14)
    np.testing.assert_allclose(down, d[:, : prompt + s], rtol=1e-13, atol=1e-16)
    assert (int(n), int(count)) == (2, 2)


def test_the_gradient_of_words_that_share_labels() -> None:
    """L and dL/dlogits by the complex step."""
    q = Question((2, "x", MASK, 3), ((5, 6), (7,), (8, 5, 9)), MASK)
    objective = make("template", Setting(question=q))
    batch = objective.batch([row | {"label": n + 1} for n, row in enumerate(FIELDS)], rng())
    logits = rng().normal(size=(2, 6, V))

    def loss(x: np.ndarray) -> object:
        L, d, _ = objective.loss(x, batch)
        return L, lambda dL: (lambda: d * dL,)

    assert check_op(loss, logits) <= 1e-12
    assert objective.scores is not None
    y = objective.scores(logits, batch)
    z = logits[[0, 1], [4, 2]]
    np.testing.assert_allclose(y, np.stack([z[:, [5, 6]].mean(1), z[:, 7], z[:, [5, 8, 9]].mean(1)], 1), rtol=1e-14)


def test_a_template_needs_a_question() -> None:
    with pytest.raises(ValueError, match="objective 'template' needs question, which is not set"):
        make("template", Setting())


@pytest.mark.parametrize(("family", "architecture"), [("bert", "ForMaskedLM"), ("gpt2", "LMHeadModel")])
def test_it_fits_language_models_without_a_decoder(family: str, architecture: str) -> None:
    from refpeft.train import fitting

    assert "template" in fitting(tiny(family, architecture))
    assert "template" not in fitting(tiny("t5", "ForConditionalGeneration"))
    assert "template" not in fitting(tiny("bert", "ForSequenceClassification"))
