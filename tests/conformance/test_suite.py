"""`suite(MyTarget())`: the suite in other people's tests, with ids, -k, workers and JUnit as pytest has them."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from examples.my_lora import Mine
from refpeft.conformance import suite
from refpeft.conformance.engine import Options, Unit, run_unit

ROOT = Path(__file__).parents[2]
TestMine = suite(Mine(), examples=2, folder=None)  # this very file has tests made so
MODULE = """
from refpeft.conformance import suite
from examples.my_lora import Mine

class Wrong(Mine):
    def run(self, case):
        answers = super().run(case)
        return {name: 2 * a if name == "W_merged" else a for name, a in answers.items()}

TestMine = suite(Mine(), examples=2)
TestWrong = suite(Wrong(), examples=2)
"""


def run(folder: Path, *words: str, code: int) -> str:
    (folder / "test_mine.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *words, "test_mine.py"]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_ids_reasons_and_junit(tmp_path: Path) -> None:
    said = run(tmp_path, "--junit-xml", "junit.xml", code=1)
    assert "test_mine.py::TestMine::test[lora-layer-forward]" in said
    assert "FAILED test_mine.py::TestWrong::test[lora-layer-merge]" in said
    assert "lora, layer, merge (required): Merged weights are W′ and b′ of the method" in said
    assert "smallest case: .refpeft/cases/" in said
    assert "Traceback" not in said
    cases = list(ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None]
    assert "test[lora-layer-merge]" in bad
    assert all("TestWrong" in str(case.get("classname")) for case in cases if case.find("failure") is not None)


def test_k_and_workers(tmp_path: Path) -> None:
    said = run(tmp_path, "-n", "2", "-k", "TestMine and forward", code=0)
    assert "1 passed" in said


def test_a_target_that_declares_nothing_is_an_error() -> None:
    class Nothing(Mine):
        def info(self) -> dict[str, object]:
            return {**super().info(), "methods": []}

    with pytest.raises(ValueError, match="Nothing declares nothing that the suite asks"):
        suite(Nothing())
    with pytest.raises(ValueError, match="unknown method 'magic'"):
        suite(Mine(), methods=["magic"])


def test_skips_and_known_failures_are_not_passes(tmp_path: Path) -> None:
    from refpeft.conformance.testing import judged

    row = {"status": "known", "detail": "why", "ratio": None}
    with pytest.raises(pytest.xfail.Exception, match="why"):
        judged(row)
    with pytest.raises(pytest.skip.Exception, match="no such layer"):
        judged({"status": "skip", "detail": "no such layer"})


def test_what_failed_is_remembered_and_tried_first(tmp_path: Path) -> None:
    """With one example more than the corners nothing is left to chance: it is the remembered one."""

    class Wrong(Mine):
        def run(self, case):  # type: ignore[no-untyped-def]
            answers = super().run(case)
            big = case.arrays["W"].shape == (7, 7)  # no corner is
            return {name: a + big for name, a in answers.items()}

    unit = Unit("lora", "layer", "forward")
    many = Options(examples=2000, folder=str(tmp_path / "cases"), database=str(tmp_path / "memory"))
    assert run_unit(Wrong(), unit, many)["status"] == "fail"
    once = Options(examples=1, folder=str(tmp_path / "cases"))
    assert run_unit(Wrong(), unit, once)["status"] == "pass"
    again = Options(examples=1, folder=str(tmp_path / "cases"), database=str(tmp_path / "memory"))
    assert run_unit(Wrong(), unit, again)["status"] == "fail"
