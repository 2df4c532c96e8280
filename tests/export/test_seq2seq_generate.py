"""`refpeft generate` with encoder-decoders: the tokens of transformers and peft, and of programs that load them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import refpeft
from refpeft.cli import app
from refpeft.conformance.targets import libraries
from refpeft.export.card import digest
from refpeft.export.generation import open_writer
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from tests.export.adapters import moved
from tests.export.pairs import NAMES, PROMPTS, Rows, base, made, specified, written
from tests.export.test_generate_cli import words

HERE = Path(__file__).parent / "clients"
NEW = 8
CASES = {
    "merged": "lora", "unmerged": "rslora", "inputs": "dora", "unmerged prompt": "prompt_tuning",
    "prompt": "prompt_tuning",
}  # fmt: skip


def padded(prompts: Rows) -> dict[str, Rows]:
    """On the right."""
    s = max(map(len, prompts))
    mask = [[1] * len(p) + [0] * (s - len(p)) for p in prompts]
    return {"input_ids": [p + [0] * (s - len(p)) for p in prompts], "attention_mask": mask}


def folders(root: Path, name: str, case: str) -> Any:
    """The base model, the adapter and the export, a fast or a portable one, without a token that ends a text."""
    model, adapter = made(CASES[case], name)
    refpeft.save(model, root / "model")
    settings = {"eos_token_id": None, "decoder_start_token_id": model.config.decoder_start_token_id, "pad_token_id": 0}
    (root / "model" / "generation_config.json").write_text(json.dumps(settings))
    refpeft.save_adapter(adapter, root / "adapter")
    adapter = refpeft.load_adapter(root / "adapter", model)
    how: dict[str, Any] = {"decode": True, "verify": False, "source": root / "model"}
    export(model, adapter, root / "out", case.split()[0], graph="fast" if case == "unmerged" else "portable", **how)
    return model, adapter


def of_transformers(root: Path, adapter: bool = True, **options: Any) -> Rows:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    model: Any = AutoModelForSeq2SeqLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, str(root / "adapter")).eval() if adapter else model
    feeds = {name: torch.tensor(rows) for name, rows in padded(PROMPTS).items()}
    rows: Rows = model.generate(**feeds, **{"max_new_tokens": NEW, "do_sample": False, **options}).tolist()
    return [row[1:] for row in rows]


@pytest.mark.peft
@pytest.mark.ort
@pytest.mark.filterwarnings("ignore")  # of what transformers and peft say to each other
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_that_of_transformers_and_peft(name: str, case: str, tmp_path: Path) -> None:
    folders(tmp_path, name, case)
    found = written(tmp_path / "out", PROMPTS)
    assert found == of_transformers(tmp_path)
    assert len({token for row in found for token in row}) > 1


@pytest.mark.peft
@pytest.mark.ort
@pytest.mark.filterwarnings("ignore")
def test_it_begins_and_ends_as_the_settings_say(tmp_path: Path) -> None:
    """With what generation_config.json has, rather than config.json: the token before all, the first one, the last one
    if the text is cut, those that end it."""
    model = base("BART", eos_token_id=9, forced_eos_token_id=8)
    refpeft.save(model, tmp_path / "model")
    export(model, None, tmp_path / "plain", decode=True, verify=False, source=tmp_path / "model")
    writer = open_writer(tmp_path / "plain")
    assert (writer.start, writer.forced, writer.stop) == (2, (None, 8), [9])
    assert [row[-1] for row in written(tmp_path / "plain", PROMPTS)] == [8, 8, 8]
    free = written(tmp_path / "plain", PROMPTS, max_new_tokens=12)
    settings = {"forced_bos_token_id": 21, "forced_eos_token_id": 11, "decoder_start_token_id": 5, "pad_token_id": 1}
    settings["eos_token_id"] = free[0][1]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    export(model, None, tmp_path / "out", decode=True, verify=False, source=tmp_path / "model")
    writer = open_writer(tmp_path / "out")
    assert (writer.start, writer.forced, writer.stop) == (5, (21, 11), [settings["eos_token_id"]])
    found = written(tmp_path / "out", PROMPTS)
    assert {row[0] for row in found} == {21}
    expected = of_transformers(tmp_path, adapter=False)
    assert [row + [1] * (NEW - len(row)) for row in found] == [row + [1] * (NEW - len(row)) for row in expected]


@pytest.mark.ort
def test_draws_do_not_depend_on_the_neighbours(tmp_path: Path) -> None:
    folders(tmp_path, "T5 v1.1", "merged")
    hot = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "seed": 1}
    alone = written(tmp_path / "out", PROMPTS[:1], **hot)
    assert written(tmp_path / "out", PROMPTS, **hot)[0] == alone[0]
    assert written(tmp_path / "out", PROMPTS[:1], **{**hot, "seed": 2}) != alone
    stop = alone[0][2]
    assert written(tmp_path / "out", PROMPTS[:1], stop=[stop], **hot)[0] == alone[0][: alone[0].index(stop) + 1]


@pytest.mark.ort
def test_another_adapter_by_file(tmp_path: Path) -> None:
    """Of another rank, made from the folder alone: what either graph needs is in one of the two."""
    model, _ = folders(tmp_path, "T5", "inputs")
    other = moved(refpeft.init("lora", {"r": 4, "target_modules": ["q", "v"]}, model), 4)
    refpeft.save_adapter(other, tmp_path / "other")
    adapter_only(tmp_path / "out", [tmp_path / "other"], tmp_path / "file")
    assert written(tmp_path / "out", PROMPTS, tmp_path / "file") == specified(model, [other] * 3, PROMPTS)
    assert written(tmp_path / "out", PROMPTS, bare=True) == specified(model, [None] * 3, PROMPTS)


@pytest.mark.ort
def test_what_does_not_fit(tmp_path: Path) -> None:
    folders(tmp_path, "BART", "merged")
    for prompts, message in (
        ([[]], "at least one token"), ([[29]], "has the token 29, and the model 29 tokens"),
        ([[1] * 25], "25 positions does not fit the model, which has 24"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            written(tmp_path / "out", prompts)
    assert len(written(tmp_path / "out", [[3] * 24], max_new_tokens=30)[0]) == 24
    starting(tmp_path / "out", 29)
    with pytest.raises(ValueError, match=r"onnxruntime cannot run it: .*idx=29"):
        written(tmp_path / "out", PROMPTS)
    starting(tmp_path / "out", [2])
    with pytest.raises(ValueError, match="decoder_start_token_id must be an integer, found"):
        written(tmp_path / "out", PROMPTS)
    (tmp_path / "out" / "encoder_model.onnx").unlink()
    with pytest.raises(ValueError, match=r"encoder_model\.onnx is missing, which was exported"):
        written(tmp_path / "out", PROMPTS)


def starting(out: Path, token: Any) -> None:
    """As if the folder had been exported with this decoder_start_token_id."""
    path, card = out / "generation_config.json", json.loads((out / "refpeft.json").read_text())
    path.write_text(json.dumps({"decoder_start_token_id": token}))
    card["files"][path.name] = digest(path)
    (out / "refpeft.json").write_text(json.dumps(card))


@pytest.mark.ort
def test_the_command(tmp_path: Path) -> None:
    """From a checkpoint to a text, which begins anew: nothing of the prompt is in it."""
    model, adapter = made("lora", "BART")
    refpeft.save(model, tmp_path / "model")
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    words().save(str(tmp_path / "model" / "tokenizer.json"))
    run = CliRunner().invoke
    made_of = [str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter"), "--decode", "--out"]
    shown = run(app, ["export", *made_of, str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "last_hidden_state" in shown.output
    result = run(app, ["generate", str(tmp_path / "out"), "abc def", "--json", str(tmp_path / "json"), "-n", "6"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "json").read_text("utf-8"))["results"]
    assert found["prompt_ids"] == [0, 1, 2, 19, 3, 4, 5]
    expected = specified(model, [adapter], [found["prompt_ids"]], 6)[0]
    ends = [k for k, token in enumerate(expected) if token == 2]
    assert found["ids"] == expected[: ends[0] + 1 if ends else 6]
    assert found["text"] == words().decode(found["ids"])
    assert result.stdout == found["text"] + "\n"


# ── other programs ───────────────────────────────────────────────────────────────────────────────────────────────────


def asked(command: list[str], roots: list[Path]) -> list[Rows]:
    questions = [{"folder": str(root / "out"), "new": NEW, "feeds": padded(PROMPTS)} for root in roots]
    run = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found: list[Rows] = json.loads(run.stdout.splitlines()[-1])
    return found


def answered(command: list[str], root: Path) -> None:
    """It writes what `refpeft generate` writes: the adapter where it is inside, the base model where it is not."""
    cases = [(name, case) for name in NAMES for case in ("merged", "unmerged", "inputs", "unmerged prompt")]
    roots = [root / f"{name}-{case}".replace(" ", "-") for name, case in cases]
    for (name, case), at in zip(cases, roots, strict=True):
        at.mkdir()
        folders(at, name, case)
    expected = [written(at / "out", PROMPTS, bare=True) for at in roots]
    assert [[row[1:] for row in rows] for rows in asked(command, roots)] == expected
    assert len({tuple(row) for rows in expected for row in rows}) > len(cases)


@pytest.mark.ort
@pytest.mark.optimum
def test_optimum_loads_it_unchanged(tmp_path: Path) -> None:
    answered([libraries.elsewhere("optimum") or sys.executable, str(HERE / "seq2seq_in_optimum.py")], tmp_path)


@pytest.mark.ort
@pytest.mark.node
@pytest.mark.transformersjs
@pytest.mark.parametrize("build", ["node", "web"])
def test_transformers_js_loads_it_unchanged(build: str, tmp_path: Path) -> None:
    """Its build for browsers has to be told where the weights are."""
    home = str(libraries.package_of("transformersjs"))
    node = ["node", "--liftoff-only"]  # which does not spend a minute on optimising wasm that runs for a second
    answered([*node, str(HERE / "seq2seq_in_transformers.mjs"), home, build, str(tmp_path)], tmp_path)
