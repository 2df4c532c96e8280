"""`refpeft train` from the command line: what it saves, that it goes on to the bit, mistakes in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner, Result

import refpeft
from refpeft.cli import app
from tests.models import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwx"]  # 29, as the models have


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(family: str, architecture: str | None = None, words: bool = True, **config: Any) -> Path:
    folder = Path("model")
    refpeft.save(tiny(family, architecture, dtype=np.float32, **config), folder)
    if words:
        t = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
        t.pre_tokenizer = pre_tokenizers.Whitespace()
        t.add_special_tokens(WORDS[:5])
        if family == "bert":
            t.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
        t.save(str(folder / "tokenizer.json"))
    return folder


def data(*lines: Any) -> Path:
    path = Path("data.jsonl")
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def counting(count: int = 12) -> list[Any]:
    rng = np.random.default_rng(0)
    return [{"input_ids": [int(s + k) % 29 for k in range(rng.integers(3, 9))]} for s in rng.integers(0, 29, count)]


def train(*words: str, out: str = "out") -> Result:
    result = CliRunner().invoke(app, ["train", "model", "--data", "data.jsonl", "--out", out, *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def trained(*words: str, out: str = "out") -> dict[str, Any]:
    result = train(*words, "--json", f"{out}.json", out=out)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(Path(f"{out}.json").read_text())
    return found


def failed(result: Result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert not Path("out").exists()


# ── what comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_language_model_learns_and_a_table_says_how(somewhere: Path) -> None:
    model("gpt2", words=False)
    data(*counting())
    result = train(
        "--steps", "40", "--lr", "0.02", "--set", "r=4", "--set", "target_modules=c_attn,c_fc", "--json", "r.json"
    )
    assert result.exit_code == 0, result.output
    for words in ("out: lora, causal", "steps", "40", "trained parameters", "bytes"):
        assert words in result.stdout
    found = json.loads(Path("r.json").read_text())
    assert found["loss_last"] < 0.7 * found["loss_first"]
    assert found["losses"][0] == found["loss_first"]
    assert found["trained"] == 2 * (4 * 16 + 48 * 4) + 2 * (4 * 16 + 64 * 4)
    assert found["bytes"] == Path("out/adapter_model.safetensors").stat().st_size
    assert not Path("out.training").exists()
    adapter = refpeft.load_adapter("out", refpeft.load("model"))
    assert adapter.config.r == 4
    assert {p.dtype for p in adapter.params.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("family", "architecture", "line", "objective", "options"),
    [
        ("gpt2", "LMHeadModel", {"text": "a b c d"}, "causal", []),
        ("llama", "ForCausalLM", {"input": "a b", "target": "c d"}, "causal", ["-m", "dora"]),
        ("gpt2", "LMHeadModel", {"input": "a b", "target": "c d"}, "seq2seq", ["--objective", "seq2seq"]),
        ("gpt2", "LMHeadModel", {"text": "a b c d"}, "lm-adaptation", ["--objective", "lm-adaptation"]),
        ("bert", "ForMaskedLM", {"text": "a b c d"}, "masked", ["--objective-set", "mask_probability=0.5"]),
        ("bert", "ForSequenceClassification", {"text": "a b c d", "label": 2}, "classification", []),
        ("gpt2", "ForSequenceClassification", {"text": "a b c d", "label": 2}, "classification", ["-m", "rslora"]),
        ("t5", "ForConditionalGeneration", {"input": "a b", "target": "c d"}, "seq2seq", []),
        ("t5", "ForConditionalGeneration", {"text": "a b c d e"}, "span-corruption",
         ["--objective", "span-corruption", "--objective-set", "sentinel_id=28", "-m", "prompt_tuning"]),
        ("t5", "ForConditionalGeneration", {"input": "a b", "target": "c d"}, "span-corruption-sentinel",
         ["--objective", "span-corruption-sentinel", "--objective-set", "sentinel_id=28", "-m", "ln_tuning"]),
        ("bart", "ForConditionalGeneration", {"text": "a b c d"}, "lm-adaptation",
         ["--objective", "lm-adaptation", "--set", "lora_dropout=0.1"]),
        ("bart", "ForConditionalGeneration", {"input": "a b", "target": "c d"}, "seq2seq", ["-m", "dora"]),
    ],
)  # fmt: skip
def test_every_objective_on_text(family: str, architecture: str, line: Any, objective: str, options: list[str]) -> None:
    model(family, architecture)
    data(line, line | ({"text": "e f"} if "text" in line else {"input": "e"}))
    found = trained("--steps", "25", "--lr", "0.05", "--batch", "2", *options)
    assert found["objective"] == objective
    assert np.mean(found["losses"][-5:]) < np.mean(found["losses"][:5])


def test_a_classifiers_head_is_trained_and_saved() -> None:
    model("bert", "ForSequenceClassification", label2id={"bad": 0, "good": 1, "odd": 2}, id2label={"0": "bad", "1": "good", "2": "odd"})  # noqa: E501  # fmt: skip
    data({"text": "a a", "label": "bad"}, {"text": "b b", "label": "good"}, {"text": "c c", "label": "odd"})
    trained("--steps", "60", "--lr", "0.05", "--batch", "3")
    base = refpeft.load("model")
    adapter = refpeft.load_adapter("out", base)
    assert adapter.config.modules_to_save == ["classifier"]
    ids = np.array([[2, 5, 5, 3], [2, 6, 6, 3], [2, 7, 7, 3]])
    assert base(ids, adapter)[0].argmax(1).tolist() == [0, 1, 2]


def test_an_encoder_decoder_is_trained_from_its_own_start_token_and_padding() -> None:
    """T5 starts at decoder_start_token_id, which it must have; the lengths of input and target are bounded apart."""
    model("t5", "ForConditionalGeneration", words=False, decoder_start_token_id=None)
    data({"input_ids": [5, 6, 1], "labels": [7, 1]}, {"input_ids": [4] * 30, "labels": [9] * 26 + [1]})
    failed(train(), "objective 'seq2seq' needs start_id, which is not set")
    found = trained("--steps", "2", "--objective-set", "start_id=0", "--max-length", "25")
    assert found["cut"] == 1
    assert found["objective"] == "seq2seq"


def test_a_classifier_that_reads_the_end_of_text() -> None:
    """BART's, whose head has another name than others'."""
    model("bart", "ForSequenceClassification")  # [CLS] is its end of text here
    data({"text": "a a [CLS]", "label": 0}, {"text": "b b b [CLS]", "label": 1}, {"text": "c [CLS]", "label": 2})
    found = trained("--steps", "60", "--lr", "0.05", "--batch", "3", "--set", "lora_dropout=0.1")
    assert found["loss_last"] < 0.1 * found["loss_first"]
    assert refpeft.load_adapter("out", refpeft.load("model")).config.modules_to_save == ["classification_head"]
    data({"text": "a a", "label": 0})
    result = train(out="new")
    assert result.exit_code == 2
    assert "every row of ids must hold eos_token_id 2" in result.stderr


def test_one_output_is_a_number() -> None:
    model("bert", "ForSequenceClassification", num_labels=1)
    data({"text": "a a", "label": 0.5}, {"text": "b b", "label": -1})
    found = trained("--steps", "60", "--lr", "0.02")
    assert found["loss_last"] < 0.05


def test_the_end_of_text_is_learnt() -> None:
    """[SEP] is the end here: after a text it comes, and after ids it is the writer's own affair."""
    from refpeft.cli.data import Reading, read_rows

    def encode(text: str, special: bool) -> list[int]:
        return [WORDS.index(w) for w in text.split()]

    data({"text": "a b"}, {"input_ids": [5, 6]}, {"input": "a", "target": "b"})
    rows, cut = read_rows(Path("data.jsonl"), Reading("causal", 29, None, 3, None, False, encode))
    assert [row["input_ids"] for row in rows] == [[5, 6, 3], [5, 6], [5]]
    assert rows[2]["labels"] == [6, 3]
    assert cut == 0


def test_long_rows_are_cut_and_counted() -> None:
    model("gpt2", words=False)
    data({"input_ids": [1] * 40}, {"input_ids": [1, 2, 3]}, {"input_ids": [1] * 20, "labels": [2] * 20})
    assert trained("--steps", "1")["cut"] == 2
    data({"input_ids": [1] * 40}, {"input_ids": [1, 2]})
    assert trained("--steps", "1", "--max-length", "2", out="short")["cut"] == 1
    assert "1 of them cut to the length" in train("--steps", "1", out="again").stdout


@pytest.mark.peft
def test_peft_loads_what_was_trained() -> None:
    import torch
    import transformers
    from peft import PeftModel

    model("gpt2", words=False)
    data(*counting())
    trained("--steps", "10", "--lr", "0.05", "--method", "dora", "--dtype", "float64")
    base = refpeft.load("model", dtype="float64")
    ids = np.array([[3, 4, 5, 6, 7]])
    ours, _ = base(ids, refpeft.load_adapter("out", base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64)
    before = theirs(torch.tensor(ids)).logits.detach().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about each other
        tuned = PeftModel.from_pretrained(theirs, "out")
    said = tuned(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(said, ours, rtol=1e-10, atol=1e-10)
    assert np.abs(said - before).max() > 0.1


# ── stopping and going on ────────────────────────────────────────────────────────────────────────────────────────────

RUN = ("--steps", "30", "--lr", "0.02", "--batch", "3", "--accumulate", "2", "--set", "lora_dropout=0.1", "--schedule",
       "cosine", "--warmup", "3", "--clip", "1", "--save-every", "4", "--loraplus-ratio", "2")  # fmt: skip


def started(*words: str) -> "subprocess.Popen[str]":
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "refpeft", "train", "model", "--data", "data.jsonl", "--out", "out", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def after(step: int) -> None:
    """Wait until the state of this step, or a later one, is there."""
    until = time.monotonic() + 60
    while not any(int(p.name[5:]) >= step for p in Path("out.training").glob("step-*")):
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_killed_goes_on_to_the_bit(number: signal.Signals) -> None:
    model("gpt2", words=False)
    data(*counting(40))
    long = (*RUN[2:], "--steps", "400")
    process = started(*long)
    after(8)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert not Path("out").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert "--resume goes on from out.training" in said
        assert said.count("\n") == 1
    failed(train(*long), "out.training: a run was stopped here", "--resume")
    resumed = trained(*long, "--resume")
    assert 8 <= resumed["resumed_at"] < 400
    whole = trained(*long, out="whole")
    assert resumed["losses"] == whole["losses"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    assert not Path("out.training").exists()


def stopped(*words: str) -> None:
    """A run that leaves a state behind."""
    process = started(*RUN, "--steps", "4000", *words)
    after(4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_going_on_under_other_conditions_is_refused() -> None:
    model("gpt2", words=False)
    data(*counting())
    stopped()
    same = (*RUN, "--steps", "4000", "--resume")
    failed(train(*same, "--lr", "0.5"), "began with plan", "cannot go on with")
    failed(train(*same, "--set", "r=2"), "began with config")
    data(*counting(13))
    failed(train(*same), "began with data")


def test_without_a_state_there_is_nothing_to_go_on_from() -> None:
    model("gpt2", words=False)
    data(*counting())
    failed(train("--resume"), "out.training: there is no training state")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", ["expected a JSON object in UTF-8", "not json"]),
        ("[1, 2]", ["expected a JSON object, found [1, 2]"]),
        ("{}", ["expected text, or input and target, found an empty object"]),
        ({"words": "a"}, ["expected text, or input and target, found 'words'"]),
        ({"input": "a"}, ["expected text, or input and target, found 'input'"]),
        ({"text": 3}, ["text must be a string, found 3"]),
        ({"text": ""}, ["there is no token in it"]),
        ({"input_ids": [1, 99]}, ["input_ids must lie between 0 and 28, found 99"]),
        ({"input_ids": "abc"}, ["input_ids must be a list of integers"]),
        ({"input_ids": [1, True]}, ["input_ids must be a list of integers"]),
        ({"input_ids": [1] * 30, "labels": [1]}, ["the input alone has 30 tokens, which leaves none of 24"]),
    ],
    ids=str,
)
def test_a_bad_line_is_named_by_its_number(line: Any, words: list[str]) -> None:
    model("gpt2")
    data({"text": "a b c"}, "", line)
    failed(train(), "data.jsonl, line 3: ", *words)


def test_labels_that_the_model_does_not_have() -> None:
    model("bert", "ForSequenceClassification")
    data({"text": "a", "label": 3})
    failed(train(), "line 1: label must be an integer from 0 to 2, found 3")
    data({"text": "a"})
    failed(train(), "line 1: expected text and label, found 'text'")


def test_text_needs_a_tokenizer() -> None:
    folder = model("gpt2", words=False)
    data({"text": "a b"})
    failed(train(), "line 1: text needs a tokenizer.json in the model's folder; without one give input_ids")
    (folder / "tokenizer.json").write_text("{}")
    failed(train(), "tokenizer.json: not a tokenizer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective", "masked"], ["objective 'masked' does not fit GPT2LMHeadModel: expected causal or"]),
        (["--objective", "dream"], ["unknown objective 'dream': there are causal"]),
        (["--method", "magic"], ["unknown method 'magic'"]),
        (["--set", "r"], ["--set: expected FIELD=VALUE, found 'r'"]),
        (["--set", "rank=4"], ["lora has no config field 'rank'"]),
        (["--set", "r=four"], ["r must be int, found 'four'"]),
        (["--set", "r=10000000000000"], ["there is not enough memory: unable to allocate"]),
        (["--set", "target_modules=nothing"], ["matches no module of the model"]),
        (["--objective-set", "speed=3"], ["--objective-set: there is no 'speed'"]),
        (["--objective-set", "mean_span=long"], ["--objective-set mean_span: expected float, found 'long'"]),
        (["--steps", "0"], ["steps must be at least 1, found 0"]),
        (["--optimizer", "lion"], ["optimizer must be one of sgd"]),
        (["--dtype", "int8"], ["dtype must be float32 or float64, found 'int8'"]),
        (["--max-length", "99"], ["--max-length must be at most 24"]),
        (["--json", "none/r.json"], ["there is no folder none"]),
        (["--data", "none.jsonl"], ["none.jsonl: there is no such file"]),
    ],
    ids=str,
)
def test_each_mistake_is_one_sentence(options: list[str], words: list[str]) -> None:
    model("gpt2", words=False)
    data(*counting())
    failed(train(*options), *words)
    assert sorted(os.listdir()) == ["data.jsonl", "model"]


@pytest.mark.parametrize("architecture", ["EncoderModel", "Model"])
def test_a_t5_without_a_head(architecture: str) -> None:
    model("t5", architecture, words=False)
    data(*counting())
    failed(train(), f"T5{architecture} has no head to train with")


def test_what_cannot_be_saved_is_refused_before_the_work() -> None:
    model("t5", "ForConditionalGeneration", words=False)
    data({"input_ids": [5, 6, 1], "labels": [7, 1]})
    failed(train("-m", "prefix_tuning"), "HF peft no prefixes of an encoder-decoder", "set position_shift=False")
    found = trained("-m", "prefix_tuning", "--set", "position_shift=false", "--steps", "2", out="prefix")
    adapter = refpeft.load_adapter("prefix", refpeft.load("model"))
    assert found["trained"] == sum(p.size for p in adapter.params.values())
    failed(
        train("--objective", "causal"), "objective 'causal' does not fit T5ForConditionalGeneration: expected seq2seq"
    )


def test_a_model_without_a_head_and_a_folder_that_exists() -> None:
    model("bert")
    data({"text": "a"})
    failed(train(), "BertModel has no head to train with")
    Path("full").mkdir()
    Path("full/file").touch()
    result = train(out="full")
    assert result.exit_code == 2
    assert "exists already" in result.stderr


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_no_number_ends_with_exit_code_1() -> None:
    model("gpt2", words=False)
    data(*counting())
    failed(train("--lr", "1e30", "--optimizer", "sgd", "--schedule", "constant"), "the loss is nan", code=1)


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    for words in ("--resume", "refpeft train gpt2 --data poems.jsonl", '{"text": "…"}'):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("loha", ["r=2"]),
        ("glora", ["r=2"]),
        ("dylora", ["r=4", "rank=2"]),
        ("lokr", ["r=1", "decompose_both=true"]),
        ("oft", ["oft_block_size=4"]),
        ("boft", []),
    ],
)
def test_products_and_rotations_are_trained(method: str, words: list[str]) -> None:
    """From nothing, by the command; saved, read again, and no longer what they began as."""
    folder = model("llama")
    data(*counting())
    options = [word for one in words for word in ("--set", one)]
    result = train("-m", method, *options, "--steps", "3", "--lr", "0.01")
    assert result.exit_code == 0, result.output
    base = refpeft.load(folder)
    adapter = refpeft.load_adapter("out", base)
    assert adapter.method == method
    fresh = refpeft.init(method, adapter.config, base)
    assert sum(not np.array_equal(v, fresh.params[n]) for n, v in adapter.params.items()) >= 4
    ids = np.array([[3, 1, 4]])
    assert np.abs(base(ids, adapter)[0] - base(ids)[0]).max() > 0
