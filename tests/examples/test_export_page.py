"""What docs/export.md tells people to type works: all blocks, in order, in one folder."""

import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import refpeft
from refpeft.cli import app
from refpeft.export.forms import FORMS
from refpeft.export.program import export
from tests.export.adapters import made, moved
from tests.export.pairs import made as pair
from tests.export.test_generate_cli import words
from tests.models import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2", dtype=np.float32)
    refpeft.save(model, tmp_path / "my-model")
    words().save(str(tmp_path / "my-model" / "tokenizer.json"))
    made = {
        "my-adapter": ("lora", {"r": 2}),
        "my-other-adapter": ("rslora", {"r": 4}),
        "my-prompt": ("prompt_tuning", {"num_virtual_tokens": 3}),
        "my-prefix": ("prefix_tuning", {"num_virtual_tokens": 3}),
    }
    for seed, (name, (method, config)) in enumerate(made.items()):
        refpeft.save_adapter(moved(refpeft.init(method, config, model, seed), seed), tmp_path / name)
    t5, adapter = pair("lora", "T5")
    refpeft.save(t5, tmp_path / "my-t5")
    words().save(str(tmp_path / "my-t5" / "tokenizer.json"))
    refpeft.save_adapter(adapter, tmp_path / "my-t5-adapter")
    monkeypatch.chdir(tmp_path)


@pytest.mark.ort
@pytest.mark.usefixtures("folder")
def test_all_blocks_run() -> None:
    for language, block in BLOCK.findall(PAGE):
        if "from optimum" in block:  # tests/export/test_seq2seq_generate.py
            continue
        if language == "python":
            exec(compile(block, "docs/export.md", "exec"), {})
            continue
        for command in block.strip().splitlines():
            name, *arguments = shlex.split(command)
            assert name == "refpeft"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{command}\n{result.output}"


def test_every_form_has_a_section() -> None:
    assert set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)) == FORMS.keys()
    assert all(f"| `{name}` |" in PAGE for name in FORMS)


ROWS = {
    "LoRA": ["lora", "rslora", "dora"],
    "AdaLoRA": ["adalora"],
    "(IA)³": ["ia3", "vera"],
    "LoHa": ["loha", "lokr", "glora", "dylora", "oft", "boft"],
    "BitFit": ["bitfit", "ln_tuning", "trainable_tokens", "partial", "full"],
    "trained heads": ["head"],
    "prompt tuning": ["prompt_tuning", "p_tuning"],
    "prefix tuning": ["prefix_tuning"],
    "bottleneck": ["houlsby", "pfeiffer", "parallel"],
    "DID": ["did", "said"],
}


@pytest.mark.ort
@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_methods_is_true(row: str, tmp_path: Path) -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {row}"))
    said = dict(zip(FORMS, (cell.strip() == "✓" for cell in line.split("|")[2:-1]), strict=True))
    for method in ROWS[row]:
        head = {"modules_to_save": ["lm_head"], "r": 2} if method == "head" else {}
        model, adapter = made("lora" if head else method, "gpt2", **head)
        for form, possible in said.items():
            if form == "prompt" and row != "prompt tuning":
                continue  # it takes others beside a prompt
            refused = nullcontext() if possible else pytest.raises(ValueError)
            with refused:
                export(model, adapter, tmp_path / f"{method} {form}", form, verify=False)
            assert (tmp_path / f"{method} {form}").exists() == possible


PAIRS = {
    "LoRA": ["lora", "dora", "ln_tuning"],
    "AdaLoRA": ["adalora", "ia3", "vera", "loha", "lokr", "oft", "boft"],
    "DID": ["did", "said"],
    "prompt tuning": ["prompt_tuning", "p_tuning"],
    "prefix tuning": ["prefix_tuning"],
    "bottleneck": ["houlsby", "pfeiffer", "parallel"],
}


@pytest.mark.ort
@pytest.mark.parametrize("row", PAIRS)
def test_the_table_of_encoder_decoders_is_true(row: str, tmp_path: Path) -> None:
    lines = PAGE.partition("## Encoder-decoders")[2].splitlines()
    forms = [form for form in FORMS if form != "training"]
    assert f"| | {' | '.join(forms)} |" in lines
    line = next(line for line in lines if line.startswith(f"| {row}"))
    said = dict(zip(forms, (cell.strip() == "✓" for cell in line.split("|")[2:-1]), strict=True))
    for method in PAIRS[row]:
        model, adapter = pair(method, "T5", **({"d": 200} if method == "said" else {}))
        for form, possible in said.items():
            refused = nullcontext() if possible else pytest.raises(ValueError)
            with refused:
                export(model, adapter, tmp_path / f"{method} {form}", form, verify=False, decode=True)
            assert (tmp_path / f"{method} {form}").exists() == possible
