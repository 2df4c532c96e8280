"""The command line: what each command says, writes and returns."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import refpeft
from refpeft.cli import app
from refpeft.conformance import engine, mutants
from refpeft.conformance.case import Case
from refpeft.conformance.report import read
from refpeft.conformance.targets import Skip
from refpeft.conformance.targets.spec import Spec

ROOT = Path(__file__).parents[2]


class Right(Spec):
    def info(self) -> Any:
        return {**super().info(), "name": "right"}


class Wrong(Right):
    """Forgets the scale in the merge."""

    def run(self, case: Case) -> Any:
        return {name: 2 * a if name == "W_merged" else a for name, a in super().run(case).items()}


class Broken(Right):
    def run(self, case: Case) -> Any:
        raise RuntimeError("out of\nmemory")


class Lazy(Right):
    def run(self, case: Case) -> Any:
        raise Skip("not today")


class Less(Right):
    def info(self) -> Any:
        return {**super().info(), "methods": ["dora"]}


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and the targets above as module `fakes`."""
    fakes = SimpleNamespace(Right=Right, Wrong=Wrong, Broken=Broken, Lazy=Lazy, Less=Less)
    monkeypatch.setitem(sys.modules, "fakes", fakes)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    engine.opened.cache_clear()
    return tmp_path


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def checked(name: str, *words: str) -> Result:
    return run("check", f"python:fakes:{name}", "-m", "lora", "-l", "layer", "--examples", "6", *words)


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "code", "mark", "verdict"),
    [
        ("Right", 0, "✓", "All as expected: 1 pass."),
        ("Wrong", 1, "✗", "Not as expected: 1 fail."),
        ("Broken", 1, "!", "Not as expected: 1 error."),
        ("Lazy", 1, "·", "Nothing was shown to be right: 1 skip."),
        ("Less", 1, "–", "Nothing was shown to be right: 1 undeclared."),
    ],
)
def test_the_verdict_and_the_exit_code(name: str, code: int, mark: str, verdict: str) -> None:
    result = checked(name, "-p", "merge")
    assert result.exit_code == code
    assert mark in next(line for line in result.stdout.splitlines() if line.startswith("merge"))
    assert result.stdout.rstrip().endswith(verdict)


def test_a_failure_comes_with_a_case_that_fails_again_and_that_the_specification_passes() -> None:
    assert checked("Wrong", "-p", "merge", "--json", "r.jsonl").exit_code == 1
    (failure,) = read(Path("r.jsonl")).failures
    assert (failure["status"], failure["kind"]) == ("fail", "value")
    assert "W_merged" in failure["detail"]
    again = run(*failure["replay"].split()[1:])
    assert again.exit_code == 1
    assert "W_merged" in again.stdout
    assert run("replay", failure["case"], "spec", "--json", "one.jsonl").exit_code == 0
    assert json.loads(Path("one.jsonl").read_text())["status"] == "pass"


def test_what_a_target_throws_is_told_in_one_line() -> None:
    result = checked("Broken", "-p", "forward")
    assert "RuntimeError: out of memory" in result.stdout
    assert "Traceback" not in result.output


def test_every_view_is_written() -> None:
    result = checked(
        "Right", "-p", "forward", "--json", "r.jsonl", "--html", "r.html", "--junit", "r.xml", "--svg", "r.svg"
    )
    assert result.exit_code == 0
    for name, start in {"r.html": "<!doctype html>", "r.xml": "<?xml", "r.svg": "<svg"}.items():
        assert Path(name).read_text(encoding="utf-8").startswith(start)
        assert name in result.stdout
    assert [json.loads(line)["type"] for line in Path("r.jsonl").read_text().splitlines()] == [
        "header",
        "result",
        "footer",
    ]


def test_shards_join_to_the_whole() -> None:
    checked("Right", "--json", "whole.jsonl")
    for i in (1, 2, 3):
        checked("Right", "--shard", f"{i}/3", "--json", f"part{i}.jsonl")
    result = run("report", "part3.jsonl", "part1.jsonl", "part2.jsonl", "--badge", "b.svg")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-2] == run("report", "whole.jsonl").stdout.splitlines()[-1]
    assert "as specified" in Path("b.svg").read_text()
    assert run("report", "part3.jsonl", "part1.jsonl").exit_code == 1


def test_two_processes_say_what_one_says() -> None:
    words = ("check", "spec", "-m", "lora", "-p", "forward", "-p", "merge", "-l", "layer", "--examples", "3")
    one, two = run(*words, "--json", "one.jsonl"), run(*words, "--workers", "2", "--json", "two.jsonl")
    assert (one.exit_code, two.exit_code) == (0, 0)
    rows = [
        sorted((r["property"], r["status"], r["ratio"]) for r in read(Path(f)).results)
        for f in ("one.jsonl", "two.jsonl")
    ]
    assert rows[0] == rows[1]


def test_an_interrupted_check_ends_quietly_and_its_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        yield {"type": "header", "target": {"name": "x"}, "spec_version": "1", "seed": 0}
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "check", interrupted)
    result = checked("Right", "--json", "r.jsonl")
    assert result.exit_code == 130
    assert result.stderr == "refpeft: interrupted\n"
    assert not read(Path("r.jsonl")).complete


def test_known_failures_are_written_met_and_missed_when_they_are_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ("-p", "merge", "-p", "forward", "--known", "known/wrong.json")
    Path("known").mkdir()
    assert checked("Wrong", *known, "--update").exit_code == 1
    (entry,) = json.loads(Path("known/wrong.json").read_text())
    assert (entry["property"], entry["kind"], entry["class"]) == ("merge", "value", "bug")
    assert Path("known", entry["case"]).is_file()
    engine.opened.cache_clear()
    monkeypatch.setattr(Wrong, "info", Right.info)
    met = checked("Wrong", *known, "--json", "met.jsonl")
    assert read(Path("met.jsonl")).counts == {"known": 1, "pass": 1}, met.stdout
    assert met.exit_code == 0
    monkeypatch.setattr(Wrong, "run", Right.run)
    mended = checked("Wrong", *known, "--update")
    assert mended.exit_code == 1
    assert "1 unexpected-pass" in mended.stdout
    assert "0 added, 1 removed" in mended.stderr
    assert json.loads(Path("known/wrong.json").read_text()) == []
    assert not list(Path("known/wrong").iterdir())


def test_ctrl_c_ends_a_check_with_workers_at_once(somewhere: Path) -> None:
    words = [sys.executable, "-m", "refpeft", "check", "spec", "--workers", "2", "--json", str(somewhere / "r.jsonl")]
    check = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (somewhere / "r.jsonl").exists() or len((somewhere / "r.jsonl").read_text().splitlines()) < 2:
        assert check.poll() is None
        time.sleep(0.05)
    os.killpg(check.pid, signal.SIGINT)
    assert check.communicate(timeout=20)[1] == "refpeft: interrupted\n"
    assert check.returncode == 130
    assert not read(somewhere / "r.jsonl").complete


# ── what cannot be run: one sentence, exit code 2 ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("check", "nothing"), "unknown target 'nothing'"),
        (("check", "python:nowhere:x"), "there is no module 'nowhere'"),
        (("check", "program:/nowhere/prog"), "cannot start program '/nowhere/prog': No such file or directory"),
        (("check", "spec", "-m", "lara"), "unknown method 'lara'"),
        (("check", "spec", "-l", "roof"), "unknown level 'roof'"),
        (("check", "spec", "-p", "beauty"), "unknown property 'beauty'"),
        (("check", "spec", "--shard", "3/2"), "--shard: expected I/N with 1 ≤ I ≤ N, found '3/2'"),
        (("check", "spec", "--html", "no/where.html"), "no/where.html: there is no folder no"),
        (("check", "spec", "--json", "."), "expected a file to write, found a folder"),
        (("check", "spec", "--update"), "--update needs --known FILE"),
        (("report", "missing.jsonl"), "missing.jsonl: No such file or directory"),
        (("replay", "missing.safetensors", "spec"), "missing.safetensors: no such file"),
        (("mutants", "lara"), "unknown mutant 'lara'"),
        (("methods", "lara"), "unknown method 'lara': expected one of lora"),
    ],
)
def test_a_mistake_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("refpeft: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed

    def check(*args: Any, **kwargs: Any) -> Any:
        import onnxruntime

        yield onnxruntime

    monkeypatch.setattr(engine, "check", check)
    result = checked("Right")
    assert result.exit_code == 2
    assert result.stderr == "refpeft: this needs onnxruntime: pip install 'refpeft[cpu]'\n"


def test_debug_shows_the_error_itself() -> None:
    with pytest.raises(ValueError, match="unknown target"):
        run("--debug", "check", "nothing")


# ── the other commands ───────────────────────────────────────────────────────────────────────────────────────────────


def test_methods_are_listed_and_read() -> None:
    assert all(name in run("methods").stdout for name in refpeft.METHODS)
    text = run("methods", "lora").stdout
    for said in (
        "W′ = W + s B A",
        "arXiv 2106.09685",
        "L1",
        "Where implementations differ",
        "lora_alpha",
        "lora_A.weight",
    ):
        assert said in text


def test_mutants_are_found_out_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("mutants", "scale-forgotten-in-merge", "base-trained-too", "--seeds", "2", "--json", "m.jsonl")
    assert found.exit_code == 0
    assert "scale-forgotten-in-merge     2/2   lora/layer/merge" in found.stdout
    assert found.stdout.rstrip().endswith("All 2 were found out.")
    assert len(Path("m.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr(mutants, "mutants", lambda *_: iter([mutants.Kill("base-trained-too", 0, None)]))
    survived = run("mutants", "base-trained-too", "--seeds", "1")
    assert survived.exit_code == 1
    assert "Survived on some seed: base-trained-too." in survived.stdout


def test_targets_are_listed() -> None:
    assert run("targets", "--json", "t.jsonl").exit_code == 0
    rows = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    assert {"spec", "peft", "onnxruntime", "program:", "python:"} <= {row["name"] for row in rows}
    assert all(row["ready"] for row in rows if row["name"] in ("spec", "program:", "python:"))


def test_the_version() -> None:
    assert run("--version").stdout == f"refpeft {refpeft.__version__}\n"


@pytest.mark.parametrize(
    "command", ["check", "replay", "report", "targets", "mutants", "history", "methods", "audit", "export", "generate"]
)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage: refpeft" in " ".join(result.stdout.split()) or f"{command} [OPTIONS]" in result.stdout


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'onnx', 'torch', 'hypothesis', 'jinja2', 'onnxruntime', 'tokenizers'}"
    code = f"import sys; import refpeft.cli; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"
