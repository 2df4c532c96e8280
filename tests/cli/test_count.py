"""`refpeft count`: what it says, writes and refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import refpeft
from refpeft.cli import app
from refpeft.presets import PRESETS
from refpeft.tables import TABLES
from tests.models import tiny


@pytest.fixture(autouse=True)
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, ["count", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def counted(*words: str) -> dict[str, Any]:
    result = run(*words, "--json", "count.json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(Path("count.json").read_text("utf-8"))
    return found


def test_a_method_in_a_model_is_counted() -> None:
    """LoRA of rank 16 on q and v of LLaMA-2 7B: 32 layers × 2 × (16 · 4096 + 4096 · 16)."""
    result = run("llama2-7b", "--set", "r=16")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    q, v = (next(line for line in lines if f"self_attn.{x}_proj" in line) for x in "qv")
    for line in (q, v):
        assert re.search(
            r"model\.layers\.\*\.self_attn\.\w_proj +32 .*lora_A\.weight \[16 × 4096\].* 4,194,304 +0\.0622 %$", line
        )
    assert "8,388,608 trained, 0.124 % of the model's 6,738,415,616" in result.stdout
    assert re.search(r"^adapter +33\.57 MB +16\.79 MB +16\.79 MB", result.stdout, re.M)
    assert re.search(r"^model +26\.95 GB +13\.48 GB +13\.48 GB", result.stdout, re.M)


def test_the_json_says_the_same_and_more() -> None:
    found = counted("llama2-7b", "-m", "dora", "-s", "r=16", "-s", "target_modules=q_proj,up_proj")
    trained = 32 * (16 * 8192 + 4096 + 16 * (4096 + 11008) + 11008)
    assert found["parameters"] == {"model": 6_738_415_616, "trained": trained, "companions": 0}
    assert found["share"] == trained / 6_738_415_616
    assert found["share_of_model_and_adapter"] == trained / (6_738_415_616 + trained)
    assert found["config"]["target_modules"] == ["q_proj", "up_proj"]
    assert [m["parameters"] for m in found["modules"]] == [32 * (16 * 8192 + 4096), 32 * (16 * 15104 + 11008)]
    assert found["modules"][0] == {
        "module": "model.layers.*.self_attn.q_proj",
        "tensors": {"lora_A.weight": [16, 4096], "lora_B.weight": [4096, 16], "lora_magnitude_vector": [4096]},
        "modules": 32,
        "parameters": 32 * (16 * 8192 + 4096),
    }
    for dtype, itemsize in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        sizes = found["bytes"][dtype]
        assert 0 < sizes["adapter"] - itemsize * trained < 30_000  # the header
        assert 0 < sizes["model"] - itemsize * 6_738_415_616 < 50_000


def test_a_folder_is_counted_without_its_weights() -> None:
    """By its config.json, or by the folder that holds it; the sizes are those of the files."""
    model = tiny("bert", "ForSequenceClassification", dtype=np.float32)
    refpeft.save(model, "folder")
    size = Path("folder/model.safetensors").stat().st_size
    Path("folder/model.safetensors").unlink()
    adapter = refpeft.init("houlsby", {"reduction_factor": 4}, model)
    refpeft.save_adapter(adapter, "adapter")
    for name in ("folder", "folder/config.json"):
        found = counted(name, "-m", "houlsby", "-s", "reduction_factor=4")
        assert found["parameters"]["trained"] == sum(a.size for a in adapter.params.values())
        files = {"adapter": Path("adapter/adapter.safetensors").stat().st_size, "model": size}
        assert found["bytes"]["float32"] == files


def test_another_head_can_be_asked_for() -> None:
    found = counted("roberta-base", "-m", "p_tuning_v2", "--architecture", "RobertaForSequenceClassification")
    head = 768 * 768 + 768 + 2 * 768 + 2
    assert found["parameters"]["trained"] == 10 * 2 * 12 * 768 + head
    assert [m["module"] for m in found["modules"]] == ["", "classifier.dense", "classifier.out_proj"]


def test_what_is_never_trained_is_told_apart() -> None:
    result = run("bert-base", "-m", "did", "-s", "d=1000", "-s", 'target_modules=["0.attention.self.query.bias"]')
    assert "1,000 trained, 0.000913 % of the model's 109,514,298" in result.stdout
    assert "and 3,072 entries of arrays that are kept beside them and never trained" in result.stdout  # 3 of 1024


def test_a_file_that_no_format_can_hold_has_no_size() -> None:
    found = counted("gpt2", "-m", "prefix_tuning", "-s", "leave_out=[0]")
    assert [sizes["adapter"] for sizes in found["bytes"].values()] == [None] * 3
    assert "no format" in run("gpt2", "-m", "prefix_tuning", "-s", "leave_out=[0]").stdout


def test_gpt3_is_counted() -> None:
    result = run("gpt3")
    assert "37,748,736 trained, 0.0216 % of the model's 174,604,259,328" in result.stdout


@pytest.mark.parametrize("width", ["80", "200"])
def test_it_fits_the_terminal(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for words in (("bert-base", "-m", "houlsby"), ("--table", "lora-gpt3")):
        result = run(*words)
        assert max(map(len, result.stdout.splitlines())) <= int(width)
        assert "…" not in result.stdout


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_shown_row_by_row(name: str) -> None:
    result = run("--table", name)
    assert result.exit_code == 0
    assert TABLES[name].source in result.stdout
    lines = iter(result.stdout.splitlines())
    for row in TABLES[name].rows:
        line = next(line for line in lines if line.strip().startswith(row.label + " ") and row.published in line)
        noted = re.search(r"\((\d+)\)", line.replace(row.how, ""))
        assert bool(noted) == bool(row.why)
        if noted:
            assert f"({noted[1]}) {row.why[:40]}" in result.stdout
    agree = sum(not row.why for row in TABLES[name].rows)
    assert f"{agree} of {len(TABLES[name].rows)} agree, rounded as they were published." in result.stdout


def test_a_table_is_written_as_json() -> None:
    found = counted("--table", "lora-gpt3")
    assert found["table"] == "lora-gpt3"
    assert "2106.09685" in found["source"]
    rows = {(row["method"], row["published"]): row for row in found["rows"]}
    lora, full = rows["LoRA", "4.7M"], rows["FT", "175,255.8M"]
    assert (lora["derived"], lora["unit"], lora["agrees"], lora["why"]) == (4.718592, "M", True, "")
    assert full["derived"] == 174604.259328
    assert full["difference"] == pytest.approx(-651.54, abs=0.01)
    assert not full["agrees"]
    assert full["why"]


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a MODEL, or --table NAME, and not both"),
        (["gpt2", "--table", "dora"], "expected a MODEL, or --table NAME, and not both"),
        (["gpt5"], f"gpt5: neither a folder with a config.json nor a known model: {', '.join(PRESETS)}"),
        (["."], ".: neither a folder with a config.json nor a known model"),
        (["broken.json"], "broken.json: not JSON in UTF-8"),
        (["other.json"], "config.json: model_type must be one of gpt2, llama"),
        (["--table", "lora-glu"], "--table: there is no 'lora-glu', but lora-glue, lora-gpt2"),
        (["gpt2", "-m", "loar"], "unknown method 'loar': there are lora, rslora"),
        (["gpt2", "-s", "rank=3"], "lora has no config field 'rank'"),
        (["gpt2", "-s", "r"], "--set: expected FIELD=VALUE, found 'r'"),
        (["gpt2", "-s", "r=0"], "r must be a positive integer, found 0"),
        (["gpt2", "-s", "target_modules=q_proj"], "matches no module of the model, which has c_attn"),
        (["gpt2", "--architecture", "GPT2Nothing"], "config.json: the architecture must end in one of Model"),
        (["llama-7b", "-m", "bitfit"], "a llama model has no biases for BitFit to train"),
        (["roberta-base", "-m", "p_tuning_v2"], "modules_to_save"),
    ],
)
def test_an_error_is_one_sentence(words: list[str], message: str) -> None:
    Path("broken.json").write_text("{", "utf-8")
    Path("other.json").write_text('{"model_type": "mamba"}', "utf-8")
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
