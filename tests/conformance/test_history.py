"""Bugs that shipped: the table can be run, and the machinery tells the release that has a bug from the other."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from refpeft.cli import app
from refpeft.conformance import history as past
from refpeft.conformance.history import BUGS, Answer, Bug, Result, replay
from refpeft.conformance.properties import PROPERTIES
from refpeft.conformance.targets import TARGETS

# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_bug_has_a_name_of_its_own() -> None:
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+-[a-z0-9-]+", name) for name in names)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_asked_for(bug: Bug) -> None:
    """Its property is one of the suite, its releases can be installed, and what they run with is said."""
    method, level, name = bug.place.split("/")
    found = [p for p in PROPERTIES if (p.level, p.name) == (level, name)]
    assert len(found) == 1
    assert found[0].applies(method)
    assert bug.target in TARGETS
    releases = [bug.bad] + ([bug.fixed] if bug.fixed else [])
    assert [Version(r) for r in releases] == sorted(Version(r) for r in releases)
    for release in releases:
        assert Requirement(bug.beside[release][0]).name not in (bug.library, "torch")
    assert bug.issue.startswith("https://")
    assert bug.symptom
    assert re.fullmatch("value|shape|dtype|names|error:[A-Za-z]+", bug.kind)
    re.compile(bug.shows)


# ── the machinery ────────────────────────────────────────────────────────────────────────────────────────────────────

LIBRARY = """
from refpeft.conformance.targets.spec import Spec

class Library(Spec):
    def info(self):
        return {**super().info(), "name": "transposing", "version": VERSION, "levels": ["layer"]}

    def run(self, case):
        found, W = super().run(case), case.arrays["W"]
        if "W_merged" in found and VERSION == "1.0":
            found["W_merged"] = W + (found["W_merged"] - W).T.reshape(W.shape)
        return found
"""
TRANSPOSING = Bug(
    "transposing-1", "transposing", "https://example.org/1", "1.0", "1.1", "merges the transpose",
    "lora/layer/merge", {"1.0": (), "1.1": ()}, target="python:transposing:Library", shows="W_merged",
)  # fmt: skip


class Pip:
    """Writes the library where pip would, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, words: Sequence[str]) -> None:
        python, last = Path(words[words.index("--python") + 1]), words[-1]
        self.asked.append(last)
        name, _, version = last.partition("==")
        if name == "transposing":
            text = f"VERSION = {version!r}\n{LIBRARY}"
            (replay.packages(python) / "transposing.py").write_text(text, encoding="utf-8")


def test_a_bug_is_caught_in_the_release_that_has_it_only(tmp_path: Path) -> None:
    pip, steps = Pip(), list[str]()
    (result,) = past.history([TRANSPOSING], tmp_path, [0], pip, steps.append)
    assert steps == ["transposing-1 in transposing 1.0", "transposing-1 in transposing 1.1"]
    assert (result.bad.status, result.bad.kind, result.bad.seed) == ("fail", "value", 0)
    assert "W_merged" in result.bad.detail
    assert result.fixed is not None
    assert (result.fixed.status, result.verdict) == ("pass", "caught")
    assert pip.asked[1:] == ["transposing==1.0", "transposing==1.1"]  # after what both run with, once

    again = list(past.history([replace(TRANSPOSING, bad="1.1", fixed=None)], tmp_path, [0], pip))
    assert [r.verdict for r in again] == ["missed"]
    assert len(pip.asked) == 3  # the environments are kept


def test_a_property_that_a_release_cannot_be_asked_is_a_miss(tmp_path: Path) -> None:
    bug = replace(TRANSPOSING, place="lora/export/onnx", fixed=None)
    (result,) = past.history([bug], tmp_path, [0], Pip())
    assert (result.bad.status, result.verdict) == ("absent", "missed")


def test_a_library_that_does_not_start_is_a_miss_with_its_reason(tmp_path: Path) -> None:
    bug = replace(TRANSPOSING, target="python:elsewhere:Library", fixed=None)
    (result,) = past.history([bug], tmp_path, [0], Pip())
    assert (result.bad.status, result.verdict) == ("absent", "missed")
    assert "there is no module 'elsewhere'" in result.bad.detail


def test_an_environment_that_was_not_completed_is_made_again(tmp_path: Path) -> None:
    def broken(words: Sequence[str]) -> None:
        raise ValueError("the network is down")

    with pytest.raises(ValueError, match="the network is down"):
        replay.environment(TRANSPOSING, "1.0", tmp_path, broken)
    assert not list(tmp_path.iterdir())  # nothing half made is left, into which another could install
    pip = Pip()
    python = replay.environment(TRANSPOSING, "1.0", tmp_path, pip)
    assert python.is_file()
    assert (replay.packages(python) / "transposing.py").is_file()
    assert len(pip.asked) == 2


def test_pip_says_why_it_failed() -> None:
    fails = "import sys; print('ERROR: no such release', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ValueError, match="exit code 3: ERROR: no such release"):
        replay.pip([sys.executable, "-c", fails])


# ── verdicts, and the command ────────────────────────────────────────────────────────────────────────────────────────

PASS, SAME = Answer("pass"), Answer("fail", "value", "W_merged: off by 0.5 of its size", 0)
OTHER = Answer("error", "error:TypeError", "TypeError: no such argument", 0)


@pytest.mark.parametrize(
    ("bad", "fixed", "verdict"),
    [
        (SAME, PASS, "caught"),
        (SAME, None, "caught"),
        (SAME, OTHER, "caught, not alone"),
        (SAME, Answer("absent"), "unproven"),
        (SAME, Answer("skip"), "unproven"),
        (SAME, SAME, "false alarm"),
        (PASS, PASS, "missed"),
        (OTHER, PASS, "missed"),
        (Answer("absent"), None, "missed"),
        (replace(SAME, detail="y_merged: off by 0.5 of its size"), PASS, "missed"),
    ],
)
def test_verdicts(
    bad: Answer, fixed: Answer | None, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only a failure of the kind and with the words of the bug is that bug; the exit code is 1 if one was missed."""
    result = Result(TRANSPOSING, bad, fixed)
    assert result.verdict == verdict
    monkeypatch.setattr(past, "history", lambda *words, **more: iter([result]))
    file = tmp_path / "rows.jsonl"
    ran = CliRunner().invoke(app, ["history", "peft-1355", "--json", str(file)])
    assert ran.exit_code == (0 if verdict.startswith("caught") else 1)
    assert f"1 bug: 1 {verdict}" in ran.stdout
    assert f'"verdict": "{verdict}"' in file.read_text(encoding="utf-8")


def test_the_list_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "history", None)
    ran = CliRunner().invoke(app, ["history", "--list"])
    assert ran.exit_code == 0
    assert all(bug.name in ran.stdout for bug in BUGS)


def test_a_bug_that_is_not_there() -> None:
    ran = CliRunner().invoke(app, ["history", "peft-0"])
    assert ran.exit_code == 2
    assert ran.stderr.startswith("refpeft: unknown bug 'peft-0': there are peft-")
