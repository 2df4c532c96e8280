"""`refpeft extend` from the command line: what it makes, that others read it, mistakes in one sentence."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner, Result

import refpeft
from refpeft.checkpoint import tokens
from refpeft.cli import app
from tests.models import tiny

OTHER = ["ломи ката навели толе", "ката толе ломика, сене навели", "сене ломи, толе ката"]
TEXT = "ката навели at last, сене ломика"


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bytelevel(texts: list[str] = ["the cat at last"], size: int = 262) -> Any:  # noqa: B006
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet, min_frequency=1)
    )
    return t


def model(family: str = "gpt2", rows: int = 262, **config: Any) -> refpeft.Model:
    """A folder with a tokenizer of 262 tokens, in files as HF has them."""
    made = tiny(family, dtype=np.float32, vocab_size=rows, **config)
    refpeft.save(made, "model")
    bytelevel().save("model/tokenizer.json")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 24}
    for name, content in (("tokenizer_config.json", about), ("generation_config.json", {"max_length": 7})):
        Path("model", name).write_text(json.dumps(content))
    Path("model/vocab.json").write_text("{}")  # of the old tokens alone
    return made


def words(*lines: str) -> None:
    Path("words.txt").write_text("\n".join(lines), encoding="utf-8")


def extend(*options: str, tokens: str = "words.txt", out: str = "out") -> Result:
    result = CliRunner().invoke(app, ["extend", "model", "--tokens", tokens, "--out", out, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def extended(*options: str, **more: str) -> dict[str, Any]:
    result = extend(*options, "--json", "r.json", **more)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(Path("r.json").read_text("utf-8"))
    return found


def failed(result: Result, *said: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in said), result.stderr
    assert not Path("out").exists()


def test_tokens_of_a_text_file() -> None:
    """The means of what they were made of, by the old tokenizer; old rows as they were."""
    base = model()
    words("ката", " навели", "at", "", "ката")
    found = extended("--init", "subword_mean", "--pad-to-multiple-of", "8")
    assert found["tokens"] == ["ката", " навели"]
    assert (found["first_id"], found["rows_before"], found["rows"], found["padding"]) == (262, 262, 264, 0)
    assert found["known_already"] == 1
    assert found["tables"] == ["transformer.wte.weight"]
    assert found["parameters"] == found["parameters_before"] + 2 * 16
    new, t = refpeft.load("out"), tokens.read("out")
    E, E1 = base.params["transformer.wte.weight"], new.params["transformer.wte.weight"]
    assert E1[:262].tobytes() == E.tobytes()
    for n, word in enumerate(["ката", " навели"]):
        pieces = bytelevel().encode(word).ids
        np.testing.assert_allclose(E1[262 + n], E[pieces].mean(0), rtol=1e-6, atol=1e-7)
    ids = t.encode(TEXT).ids
    assert ids[:2] == [262, 263]
    assert t.decode(ids) == TEXT
    assert new(np.array([ids[:24]]))[0].shape == (1, len(ids[:24]), 264)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(os.listdir("out")) == names


def test_a_tokenizer_is_merged() -> None:
    model("llama")
    other = bytelevel(OTHER, 300)
    other.save("other.json")
    found = extended(tokens="other.json", out="zh")
    t = tokens.read("zh")
    assert found["rows"] == 262 + len(found["tokens"]) == t.get_vocab_size()
    assert found["tables"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert t.encode(OTHER[0]).tokens == other.encode(OTHER[0]).tokens
    assert t.encode("the cat at last").ids == bytelevel().encode("the cat at last").ids


def test_the_table_says_what_came_of_it() -> None:
    model(rows=270)
    words("ката", "at")
    result = extend("--pad-to-multiple-of", "16")
    for said in ("1, ids 262 to 262 (1 more were there already)", "'ката'", "270 → 272, 9 of them of no token",
                 "transformer.wte.weight", "mean"):  # fmt: skip
        assert said in " ".join(result.stdout.split()), result.stdout


def test_single_words() -> None:
    model()
    words("tata")
    extended("--single-word")
    assert 262 not in tokens.read("out").encode("rotatable").ids
    assert 262 in tokens.read("out").encode("a tata table").ids


def test_what_is_drawn_depends_on_the_seed() -> None:
    model()
    words("ката", "сене")
    files = []
    for seed in ("1", "1", "2"):
        extended("--init", "normal", "--seed", seed, out=f"out{len(files)}")
        files.append(Path(f"out{len(files)}", "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["words.txt", "other.json"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers_reads_both(family: str, kind: str) -> None:
    import torch
    import transformers

    model(family)
    words("ката", " навели", "сене")
    bytelevel(OTHER, 300).save("other.json")
    extended("--init", "subword_mean", tokens=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        theirs = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float64).eval()
        t = transformers.AutoTokenizer.from_pretrained("out")
    ids = tokens.read("out").encode(TEXT).ids[:24]
    assert t(TEXT)["input_ids"][:24] == ids
    assert max(ids) >= 262
    ours = refpeft.load("out", dtype="float64")(np.array([ids]))[0]
    with torch.no_grad():
        said = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(said, ours, rtol=0, atol=(1e-10 if family == "gpt2" else 1e-6) * np.abs(ours).max())


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--init", "median"], ["init must be one of mean, subword_mean, normal, found 'median'"]),
        (["--tokens", "none.txt"], ["none.txt: there is no such file"]),
        (["--tokens", "known.txt"], ["known.txt: there is no token in it that the model does not have"]),
        (["--tokens", "bad.txt"], ["bad.txt: expected UTF-8"]),
        (["--tokens", "bad.json"], ["bad.json: not a tokenizer"]),
        (["--tokens", "other.json", "--single-word"], ["--single-word is for the tokens of a text file"]),
        (["--tokens", "unigram.json"], ["only BPE is merged with BPE, and the new one is Unigram"]),
        (["--json", "none/r.json"], ["there is no folder none"]),
        (["--out", "none/out"], ["none does not exist"]),
    ],
    ids=str,
)
def test_each_mistake_is_one_sentence(options: list[str], said: list[str]) -> None:
    model()
    words("ката")
    Path("known.txt").write_text("at\n\n")
    Path("bad.txt").write_bytes(b"\xff\xfe")
    Path("bad.json").write_text("[]")
    bytelevel(OTHER, 300).save("other.json")
    Tokenizer(models.Unigram([("a", -1.0)], 0, False)).save("unigram.json")
    before = sorted(os.listdir())
    failed(extend(*options), *said)
    assert sorted(os.listdir()) == before


def test_a_folder_that_exists_and_one_without_a_tokenizer() -> None:
    model()
    words("ката")
    Path("full").mkdir()
    Path("full/file").touch()
    failed(extend(out="full"), "full: exists already")
    Path("model/tokenizer.json").unlink()
    failed(extend(), "model: there is no tokenizer.json")


def test_a_tokenizer_of_another_model() -> None:
    model(rows=200)
    words("ката")
    failed(extend(), "the tokenizer has ids up to 261, but the model has 200 rows")


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["extend", "--help"])
    assert result.exit_code == 0
    for said in ("--pad-to-multiple-of", "refpeft extend llama --tokens words.txt", "merge --help"):
        assert said in result.stdout
