"""Templates, held-out lines and the optimiser's options in `refpeft train`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import templates
from tests.cli.test_train import data, failed, model, somewhere, train, trained

__all__ = ["somewhere"]  # a fixture
V = 29
QUESTION = ("--objective", "template", "--template", "[CLS][P*2] {text} [P] [MASK] [SEP]", "--words", "good=a,b",
            "--words", "bad=c")  # fmt: skip
LINES: list[Any] = [{"text": w, "label": "good" if w[0] in "abcde" else "bad"} for w in ("d e", "e d d", "m", "n m")]


@pytest.mark.parametrize("method", ["p_tuning", "prompt_tuning"])
def test_a_prompt_in_a_template_is_learned_and_read_back(method: str) -> None:
    """What was saved answers as the run says: the words of the right label have the higher mean at the [MASK]."""
    model("bert", "ForMaskedLM")
    data(*LINES)
    Path("held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    found = trained("-m", method, *QUESTION, "--steps", "150", "--lr", "0.05", "--batch", "4", "--eval", "held.jsonl")
    assert found["objective"] == "template"
    held = found["eval"]
    assert held["rows"] == 4
    assert held["loss"][1] < held["loss"][0]
    assert held["accuracy"][1] == 1

    base = refpeft.load("model")
    adapter = refpeft.load_adapter("out", base)
    assert (adapter.config.placement, adapter.config.num_virtual_tokens) == ("template", 3)
    ids = {line["text"]: [5 + ord(c) - ord("a") for c in line["text"].split()] for line in LINES}
    made = [2, V, V + 1, "text", V + 2, 4, 3]
    rows = templates.filled(made, [{"text": ids[line["text"]]} for line in LINES], mask_id=4)
    logits, _ = base(rows.ids, adapter, attention_mask=rows.attention_mask)
    z = logits[np.arange(4), rows.at]
    assert ((z[:, 5] + z[:, 6]) / 2 > z[:, 7]).tolist() == [line["label"] == "good" for line in LINES]


def test_a_model_that_reads_from_left_to_right_is_asked_at_the_end() -> None:
    model("gpt2", "LMHeadModel")
    data(*LINES)
    options = ("--objective", "template", "--words", "good=a", "--words", "bad=c", "--steps", "60", "--lr", "0.05")
    found = trained("--template", "{text} is [MASK]", *options)
    assert found["losses"][-1] < 0.3 * found["losses"][0]
    result = train("--template", "[MASK] is {text}", *options, out="new")
    assert result.exit_code == 2
    assert "--template must have one [MASK], at its end, found '[MASK] is {text}'" in result.stderr


def test_several_fields_as_text_and_as_ids() -> None:
    model("bert", "ForMaskedLM")
    data({"one": "a b", "two": [5, 6], "label": 0}, {"one": [8], "two": "c" * 30 + " c" * 30, "label": "bad"})
    found = trained(
        "--objective", "template", "--template", "{one} [MASK] {two}", "--words", "good=a", "--words", "bad=c",
        "--steps", "2", "--method", "lora",
    )  # fmt: skip
    assert (found["rows"], found["cut"]) == (2, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["objective 'template' needs --template, and --words LABEL=WORD for two labels or more"]),
        (["--template", "{text} [MASK]", "--words", "good=a"], ["for two labels or more"]),
        (["--template", "{text}", "--words", "good=a", "--words", "bad=c"], ["must have one [MASK] found '{text}'"]),
        (["--template", "{text} [MASK] [NO]", "--words", "good=a", "--words", "bad=c"], ["[NO] is no special token"]),
        (["--template", "{text} [MASK]", "--words", "good=a b", "--words", "bad=c"], ["'a b' must be one token", "2"]),
        (["--template", "{text} [MASK]", "--words", "good", "--words", "bad=c"], ["--words: expected LABEL=WORD"]),
        (["--template", "{text} [MASK]", "--words", "x=a", "--words", "x=c"], ["each label once, found 'x=c'"]),
        (["--template", "{it} [MASK]", "--words", "good=a", "--words", "bad=c"], ["line 1: expected it, label, found"]),
        (["--template", "{text} [MASK]", "--words", "yes=a", "--words", "no=c"], ["label must be one of 'yes', 'no'"]),
        (["--template", "[P]{text} [MASK]", "--words", "good=a", "--words", "bad=c"], ["lora does not learn"]),
        (["-m", "p_tuning", "--set", "num_virtual_tokens=3", "--template", "[P]{text} [MASK]", "--words", "good=a",
          "--words", "bad=c"], ["--set num_virtual_tokens: the template says 1, found 3"]),
        (["--objective", "masked", "--template", "{text} [MASK]"], ["are of objective 'template', found 'masked'"]),
        (["--template", "{text} [MASK]" + " a" * 30, "--words", "good=a", "--words", "bad=c"],
         ["line 1: template: 31 tokens without its fields do not fit max_length 24"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_question_that_cannot_be_asked(options: list[str], words: list[str]) -> None:
    model("bert", "ForMaskedLM")
    data(*LINES)
    failed(train("--objective", "template", *options), *words)


def test_held_out_lines_have_a_loss_and_are_not_trained_on() -> None:
    model("gpt2", words=False)
    data({"input_ids": [1, 2, 3, 4]})
    Path("held.jsonl").write_text('{"input_ids": [1, 2, 3, 4]}\n{"input_ids": [9, 8]}\n')
    found = trained("--steps", "5", "--eval", "held.jsonl")
    assert found["losses"] == trained("--steps", "5", out="again")["losses"]
    before, after = found["eval"]["loss"]
    assert found["eval"]["accuracy"] == [None, None]
    base = refpeft.load("model")
    one, _ = base(np.array([[1, 2, 3, 4]]))
    two, _ = base(np.array([[9, 8]]))
    logp = [np.log(np.exp(z) / np.exp(z).sum(-1, keepdims=True)) for z in (one[0].astype(float), two[0].astype(float))]
    terms = [logp[0][0, 2], logp[0][1, 3], logp[0][2, 4], logp[1][0, 8]]
    assert abs(before + np.mean(terms)) < 1e-5
    assert after != before


def test_adafactors_own_step_and_other_options() -> None:
    """With relative_step the learning rate does not count; without it, it does."""
    model("gpt2", words=False)
    data({"input_ids": [1, 2, 3, 4]}, {"input_ids": [4, 5, 6]})
    own = ("--optimizer", "adafactor", "--steps", "4", "--optimizer-set", "relative_step=true")
    found = [trained(*own, "--lr", lr, out=f"lr{lr}")["losses"] for lr in ("0.001", "0.5")]
    assert found[0] == found[1]
    assert trained(*own, "--optimizer-set", "scale_parameter=true", out="scaled")["losses"] != found[0]
    plain = trained("--optimizer", "adafactor", "--steps", "4", "--lr", "0.5", out="plain")["losses"]
    assert plain != found[0]
    momentum = trained(
        "--optimizer", "adafactor", "--steps", "4", "--lr", "0.5", "--optimizer-set", "beta1=0.9", out="m"
    )
    assert momentum["losses"] != plain
    adam = [trained("--steps", "4", "--optimizer-set", f"betas=[0.5,{b}]", out=f"b{b}")["losses"] for b in (0.6, 0.9)]
    assert adam[0] != adam[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["betas=0.9"], ["betas must be two numbers from 0 to below 1, found 0.9"]),
        (["speed=1"], ["adamw has no option 'speed': there are betas, eps"]),
        (["eps=-1"], ["eps must be a number, 0 or more, found -1"]),
        (["weight_decay=1"], ["adamw has no option 'weight_decay'"]),
    ],
)
def test_options_that_the_optimizer_does_not_have(options: list[str], words: list[str]) -> None:
    model("gpt2", words=False)
    data({"input_ids": [1, 2, 3, 4]})
    failed(train(*(word for option in options for word in ("--optimizer-set", option))), *words)


def test_a_learning_rate_that_makes_itself_cannot_be_divided() -> None:
    model("gpt2", words=False)
    data({"input_ids": [1, 2, 3, 4]})
    options = ("--optimizer", "adafactor", "--optimizer-set", "relative_step=true", "--loraplus-ratio", "4")
    failed(train(*options), "relative_step makes its own learning rate")
