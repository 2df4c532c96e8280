"""`refpeft generate` from the command line: text as it comes, several prompts, and one sentence for each mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

import refpeft
from refpeft.cli import app
from refpeft.cli.generate import said, stream
from refpeft.export.program import export
from tests.export.adapters import made

runner = CliRunner()


def words() -> Tokenizer:
    """29 tokens: a few words, bytes of an emoji, letters."""
    emoji = ["ð", "Ł", "ĺ", "Ģ"]  # 😀, as byte-level tokenizers write it
    vocabulary = [*"abcdefghijklmnopqrs", "Ġ", "<end>", *emoji, *"tuvw"]
    made = Tokenizer(models.BPE({token: k for k, token in enumerate(vocabulary)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, adapter = made("lora", "gpt2")
    refpeft.save(model, tmp_path / "model")
    words().save(str(tmp_path / "model" / "tokenizer.json"))
    export(model, adapter, tmp_path / "out", "inputs", verify=False, source=tmp_path / "model", decode=True)
    return tmp_path


def generate(folder: Path, *words: str) -> Result:
    return runner.invoke(app, ["generate", str(folder / "out"), *words])


@pytest.mark.ort
def test_one_prompt(folder: Path) -> None:
    result = generate(folder, "abc def", "--json", str(folder / "result.json"), "-n", "9")
    assert result.exit_code == 0, result.output
    (found,) = json.loads((folder / "result.json").read_text("utf-8"))["results"]
    assert result.stdout == found["text"] + "\n"
    assert found["prompt_ids"] == [0, 1, 2, 19, 3, 4, 5]
    model, adapter = made("lora", "gpt2")
    ids = found["prompt_ids"]
    for _ in range(9):
        ids = [*ids, int(model(np.array([ids]), adapter)[0][0, -1].argmax())]
    assert found["ids"] == ids[7:]


@pytest.mark.ort
def test_several_prompts_and_what_can_be_chosen(folder: Path) -> None:
    options = ["--temperature", "2", "--top-k", "20", "--top-p", "0.99", "--device", "cpu", "--stop", "<end>"]
    first, again, other = (generate(folder, "abc", "d", *options, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout != other.stdout
    assert "abc\n" in first.stdout
    assert generate(folder, "abc", "--bare").stdout != generate(folder, "abc").stdout
    file = str(folder / "out" / "adapter.onnx_adapter")
    assert generate(folder, "abc", "--adapter", file).stdout == generate(folder, "abc").stdout


@pytest.mark.ort
def test_each_mistake_is_one_sentence(folder: Path) -> None:
    for options, message in {
        ("abc", "--stop", "zzz"): "--stop 'zzz' is no token",
        ("abc", "--adapter", "none"): "none: no such file",
        ("abc", "--adapter", "none", "--bare"): "--adapter and --bare exclude each other",
        ("abc", "--top-p", "2"): "top_p must be in (0, 1], found 2.0",
        ("abc", "--device", "tpu"): "device must be cpu or cuda, found 'tpu'",
        ("a" * 25,): "25 positions does not fit the model, which has 24",
        ("",): "at least one token",
    }.items():
        result = generate(folder, *options)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert message in result.stderr
    (folder / "out" / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in generate(folder, "abc").stderr


@pytest.mark.ort
def test_a_template_has_no_text(folder: Path) -> None:
    model, adapter = made("p_tuning", "gpt2", placement="template")
    export(model, adapter, folder / "t", "prompt", verify=False, source=folder / "model", decode=True)
    result = runner.invoke(app, ["generate", str(folder / "t"), "abc"])
    assert result.exit_code == 2
    assert "its prompt stands in a template" in result.stderr


def test_text_is_shown_when_it_is_whole() -> None:
    """A character of four tokens comes with the last of them; a space at the beginning is kept."""
    tokens = words()
    emoji = tokens.encode("😀").ids
    shown, seen = "", []
    for k in range(1, 6):
        shown = stream(said(tokens, [0], [*emoji, 1][:k]), shown)
        seen.append(shown)
    assert seen == ["", "", "", "😀", "😀b"]
    assert said(tokens, [0], [19, 1]) == " b"
