"""Targets outside this process, and in it: what a wrong one does is a finding with a name, never a crash of ours."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refpeft.conformance import engine
from refpeft.conformance.case import Case
from refpeft.conformance.properties import PROPERTIES
from refpeft.conformance.targets import Skip, open_target
from refpeft.conformance.targets.program import BadAnswer, Program, ProgramDied, ProgramError, ProgramHung
from refpeft.conformance.targets.spec import Spec

EXAMPLES = Path(__file__).parents[2] / "examples" / "targets"
PYTHON = shlex.quote(sys.executable)
CASE = Case({"spec_version": "1", "level": "layer", "method": "lora", "property": "forward"}, {"x": np.arange(3.0)})
LOOP = """
import json, shutil, sys, time
for line in sys.stdin:
    message = json.loads(line)
    if "stop" in message:
        break
    if "start" in message:
        print(json.dumps({"name": "fake", "version": "1", "levels": ["layer"], "methods": ["lora"],
                          "dtypes": ["float32", "float64"], "features": ["forward", "grads", "merge"]}), flush=True)
        continue
"""
Make = Callable[[str], Program]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Make]:
    """A program that starts well and answers every case by running the given lines."""
    made = []

    def make(answer: str, loop: str = LOOP) -> Program:
        path = tmp_path / "fake.py"
        path.write_text(loop + "".join(f"    {line}\n" for line in answer.splitlines()))
        made.append(Program(f"{PYTHON} {shlex.quote(str(path))}", timeout=5))
        return made[-1]

    yield make
    for program in made:
        program.close()


COPY = "shutil.copy(message['run'], message['out']); print('{\"ok\": true}', flush=True)"


def test_arrays_go_there_and_back_in_one_process(fake: Make) -> None:
    program = fake(COPY)
    assert program.info()["name"] == "fake"
    for _ in range(3):
        assert (program.run(CASE)["x"] == CASE.arrays["x"]).all()
    assert program.process is not None
    first = program.process.popen.pid
    program.run(CASE)
    assert program.process.popen.pid == first


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        ("print('Loading…', flush=True)", BadAnswer, "expected a JSON object on one line, found 'Loading…'"),
        ("print('[1]', flush=True)", BadAnswer, "expected a JSON object"),
        ("print('{}', flush=True)", BadAnswer, "expected ok, skip or error"),
        ("print('{\"ok\": true}', flush=True)", BadAnswer, "wrote no file"),
        (
            "open(message['out'], 'w').write('junk'); print('{\"ok\": true}', flush=True)",
            BadAnswer,
            "the arrays it wrote",
        ),
        ("print('out of memory', file=sys.stderr); sys.exit(3)", ProgramDied, "exit code 3; on stderr: out of memory"),
        ('print(\'{"error": "no such layer"}\', flush=True)', ProgramError, "no such layer"),
        ('print(\'{"skip": "no GPU"}\', flush=True)', Skip, "no GPU"),
    ],
)
def test_a_wrong_answer_is_named_and_the_next_case_is_asked(fake: Make, answer: str, error: Any, sentence: str) -> None:
    program = fake(answer)
    for _ in range(2):
        with pytest.raises(error) as found:
            program.run(CASE)
        assert sentence in str(found.value)


def test_an_old_answer_is_not_taken_for_a_new_one(fake: Make) -> None:
    once = "count = globals().get('count', 0) + 1\nif count == 1: shutil.copy(message['run'], message['out'])\n"
    program = fake(once + "print('{\"ok\": true}', flush=True)")
    program.run(CASE)
    with pytest.raises(BadAnswer, match="wrote no file"):
        program.run(CASE)


def test_a_program_that_hangs_is_ended_and_started_anew(fake: Make) -> None:
    program = fake("time.sleep(1000)")
    program.info()
    program.timeout = 0.2
    assert program.process is not None
    popen, began = program.process.popen, time.perf_counter()
    with pytest.raises(ProgramHung, match="no answer within"):
        program.run(CASE)
    assert time.perf_counter() - began < 5
    assert popen.poll() is not None
    assert program.process is None


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("/nowhere/at-all", "cannot start program '/nowhere/at-all'"),
        (f"{PYTHON} -c 'raise SystemExit(\"no licence\")'", "exit code 1; on stderr: no licence"),
        (f"{PYTHON} -c 'print(1)'", "expected a JSON object"),
    ],
)
def test_a_program_that_does_not_start_is_said_in_a_sentence(command: str, sentence: str) -> None:
    program = Program(command)
    with pytest.raises(ValueError, match="program") as found:
        program.info()
    assert sentence in str(found.value)
    program.close()


def test_closing_ends_the_process_and_leaves_no_files(fake: Make) -> None:
    program = fake(COPY)
    program.run(CASE)
    assert program.process is not None
    popen, folder = program.process.popen, Path(program.folder.name)
    program.close()
    assert popen.poll() is not None
    assert not folder.exists()


# ── what the engine makes of them ────────────────────────────────────────────────────────────────────────────────────


def status(target: str, tmp_path: Path, name: str = "forward") -> Any:
    events = engine.check(target, ["lora"], ["layer"], [name], examples=4, folder=tmp_path / "cases")
    return next(event for event in events if event["type"] == "result")


@pytest.mark.parametrize(
    ("answer", "expected", "kind"),
    [
        (COPY, "fail", "names"),
        ("print('junk', flush=True)", "error", "error:BadAnswer"),
        ("sys.exit(1)", "error", "error:ProgramDied"),
        ('print(\'{"error": "bad"}\', flush=True)', "error", "error:ProgramError"),
        ('print(\'{"skip": "not today"}\', flush=True)', "skip", None),
    ],
)
def test_a_wrong_program_is_a_result(fake: Make, tmp_path: Path, answer: str, expected: str, kind: str | None) -> None:
    command = fake(answer).command
    row = status(f"program:{command}", tmp_path)
    assert (row["status"], row["kind"]) == (expected, kind)
    engine.opened(f"program:{command}").close()


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize(
    ("answer", "kind"), [("time.sleep(1000)", "error:ProgramHung"), ("sys.exit(1)", "error:ProgramDied")]
)
def test_a_program_that_hangs_or_dies_is_not_asked_for_something_smaller(
    fake: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, kind: str, corners: bool
) -> None:
    program, asked = fake(answer), list[Case]()
    program.info()
    program.timeout = 0.5
    prop = next(p for p in PROPERTIES if (p.level, p.name) == ("layer", "forward"))
    run = program.run
    monkeypatch.setattr(program, "run", lambda case: asked.append(case) or run(case))
    monkeypatch.setattr(engine, "opened", lambda name: program)
    monkeypatch.setattr(engine, "find", lambda unit: prop if corners else replace(prop, corners=lambda *_: []))
    row = engine.run_unit("fake", engine.Unit("lora", "layer", "forward"), engine.Options(folder=str(tmp_path)))
    assert (row["status"], row["kind"], len(asked)) == ("error", kind, 1)
    assert Case.read(row["case"]).meta["structure"] == asked[0].meta["structure"]


def test_what_is_not_declared_is_not_asked(fake: Make, tmp_path: Path) -> None:
    command = fake("sys.exit(1)").command
    assert status(f"program:{command}", tmp_path, "frozen")["status"] == "undeclared"
    engine.opened(f"program:{command}").close()


@pytest.mark.parametrize(
    "command",
    [
        f"{PYTHON} {shlex.quote(str(EXAMPLES / 'numpy_lora.py'))}",
        pytest.param(f"node {shlex.quote(str(EXAMPLES / 'lora.mjs'))}", marks=pytest.mark.node),
    ],
    ids=["python", "node"],
)
def test_the_examples_pass(command: str, tmp_path: Path) -> None:
    events = list(engine.check(f"program:{command}", ["lora"], ["layer"], seed=1, folder=tmp_path / "cases"))
    statuses = {event["property"]: event["status"] for event in events if event["type"] == "result"}
    asked = {name: status for name, status in statuses.items() if status != "undeclared"}
    assert asked == dict.fromkeys(("forward", "input-grad", "param-grads", "merge", "batch", "rejects"), "pass")
    engine.opened(f"program:{command}").close()


# ── python:package.module:object ─────────────────────────────────────────────────────────────────────────────────────


class Copy:
    def info(self) -> Any:
        return {"name": "copy", "version": "1", "levels": [], "methods": [], "dtypes": [], "features": []}

    def run(self, case: Case) -> Any:
        return case.arrays


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        made=Copy(), Made=Copy, make=lambda: Copy(), nothing=object(), inner=SimpleNamespace(made=Copy())
    )
    monkeypatch.setitem(sys.modules, "mine", found)  # type: ignore[arg-type]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["made", "Made", "make", "inner.made"])
def test_an_object_or_what_makes_one(name: str) -> None:
    target = open_target(f"python:mine:{name}")
    assert target.info()["name"] == "copy"
    assert (target.run(CASE)["x"] == CASE.arrays["x"]).all()
    target.close()


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("mine", "expected python:package.module:object"),
        ("mine:other", "'other' is not in 'mine'"),
        ("nowhere.at_all:x", "there is no module 'nowhere'"),
        ("mine:nothing", "found one without info()"),
    ],
)
def test_what_is_no_target_is_said_in_a_sentence(place: str, sentence: str) -> None:
    with pytest.raises(ValueError) as found:
        open_target(f"python:{place}")
    assert sentence in str(found.value)


def test_the_specification_as_an_object_of_yours() -> None:
    assert open_target("python:refpeft.conformance.targets.spec:Spec").info() == Spec().info()
