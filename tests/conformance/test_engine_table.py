"""`refpeft engines`: what is written for all engines, how an answer is judged, and the table."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import refpeft
from refpeft.cli import app
from refpeft.conformance.engines import ENGINES, table, variants
from refpeft.conformance.engines.variants import VARIANTS
from refpeft.conformance.engines.verdict import Judge, Verdict, law
from refpeft.conformance.targets.libraries import EVERY
from refpeft.ops import Array

MODEL = variants.model()
JUDGE = Judge(MODEL, variants.prompt())
DOCS = Path(__file__).parents[2] / "docs"


def said(adapter: "refpeft.Adapter | None") -> Array:
    """What an engine that computes in float32 says."""
    given = [] if adapter is None else [adapter]
    return law(np.asarray(MODEL(variants.prompt()[None], given)[0][0]))


def part(y: Array) -> Array:
    """The 20 likeliest after the last token, and nothing else."""
    found = np.full_like(y, np.nan)
    top = np.argsort(-y[-1])[:20]
    found[-1, top] = y[-1, top]
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_the_specification_is_right_in_all_that_it_says(name: str) -> None:
    adapter = variants.adapter(name, MODEL)
    for answer in (said(adapter), part(said(adapter))):
        v = JUDGE.verdict(name, adapter, law(answer))
        assert v.verdict == "right"
        assert v.off is not None
        assert v.off < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_mistake_is_recognised_by_name(name: str) -> None:
    adapter = variants.adapter(name, MODEL)
    for what, other in variants.mistakes(name, adapter, MODEL).items():
        v = JUDGE.verdict(name, adapter, said(other))
        assert (v.verdict, v.detail) == ("silently wrong", what)
        assert v.off is not None
        assert v.off > 0.1


def test_an_answer_that_is_nothing_known_is_said_to_be_that() -> None:
    adapter = variants.adapter("plain", MODEL)
    doubled = adapter.replace(params={n: 2 * a for n, a in adapter.params.items()})
    assert JUDGE.verdict("plain", adapter, said(doubled)).detail == "something else, which is not recognised"
    assert JUDGE.verdict("plain", adapter, np.full((12, 160), np.nan)).verdict == "no answer"
    assert JUDGE.verdict("plain", adapter, np.zeros((1, 160))).detail == "an answer of shape [1, 160], not [12, 160]"


def test_the_folders_hold_what_is_asked(tmp_path: Path) -> None:
    variants.write(tmp_path)
    base = refpeft.load(tmp_path / "model")
    for name in VARIANTS:
        read, made = refpeft.load_adapter(tmp_path / name, base), variants.adapter(name, MODEL)
        assert read.method == made.method
        assert {n: a.tobytes() for n, a in read.params.items()} == {n: a.tobytes() for n, a in made.params.items()}
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]["t007"] == 7


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ort
def test_our_own_export_is_right(tmp_path: Path) -> None:
    page, rows = tmp_path / "engines.md", tmp_path / "rows.jsonl"
    asked = ["engines", "onnxruntime", "--markdown", str(page), "--json", str(rows), "--keep", str(tmp_path / "kept")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    row = json.loads(rows.read_text(encoding="utf-8"))
    assert {v["verdict"] for v in row["adapters"].values()} == {"right"}
    assert page.read_text(encoding="utf-8").count("right ") >= len(VARIANTS)
    assert (tmp_path / "kept" / "answers" / "onnxruntime" / "dora.npy").is_file()


@pytest.mark.peft
def test_transformers_loads_no_magnitudes_and_peft_does(tmp_path: Path) -> None:
    peft, transformers = table.rows(["peft", "transformers"], folder=tmp_path)
    assert {v.verdict for v in peft.verdicts.values()} == {"right"}
    assert transformers.verdicts["plain"].verdict == "right"
    if transformers.version == "5.24.0":
        assert transformers.verdicts["dora"].detail.startswith("DoRA with magnitudes as they start")


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFPEFT_TARGETS", str(tmp_path))
    monkeypatch.setattr("refpeft.conformance.targets.libraries.find_spec", lambda module: None)
    result = CliRunner().invoke(app, ["engines", "vllm", "llamacpp"])
    assert result.exit_code == 0
    assert "12 not installed." in result.output


def test_an_engine_that_takes_no_adapter_at_all_has_given_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "answers" / "peft"
    out.mkdir(parents=True)
    for name in VARIANTS:
        (out / f"{name}.txt").write_text("no such thing", encoding="utf-8")
    monkeypatch.setattr(table, "there", lambda about: ("python", "1.0"))
    monkeypatch.setattr(table, "ask", lambda name, python, folder: "")
    row = table.row("peft", tmp_path, JUDGE)
    assert set(row.verdicts.values()) == {Verdict("no answer", None, "no such thing")}
    (out / "plain.txt").unlink()
    np.save(out / "plain.npy", said(variants.adapter("plain", MODEL)))
    row = table.row("peft", tmp_path, JUDGE)
    assert row.verdicts["dora"] == Verdict("refused", None, "no such thing")
    assert "| **wrong**" not in table.markdown([row])


def test_an_unknown_engine_is_one_sentence() -> None:
    result = CliRunner().invoke(app, ["engines", "nosuch"])
    assert result.exit_code == 2
    assert result.output.startswith("refpeft: unknown engine 'nosuch': there are peft, transformers, ")


def test_every_engine_is_installable_and_on_the_page() -> None:
    page = (DOCS / "engines.md").read_text(encoding="utf-8")
    for about in ENGINES.values():
        assert about.library is None or about.library in EVERY
        assert f"| {about.what} " in page
