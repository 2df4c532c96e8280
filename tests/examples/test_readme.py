"""What README.md tells people to type works: every block of a section, in order, in a folder with a small model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import refpeft
from tests.models import tiny

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in README.split("\n## ")[1:])
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)
NEEDS = {
    "Is an implementation right?": [pytest.mark.peft],
    "Export": [pytest.mark.ort],
    "The specification as a library": [],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """my-model and my-adapter, and examples/ as seen from the root of the repository."""
    model = tiny("gpt2", dtype=np.float32)
    adapter = refpeft.init("lora", {"r": 2, "init_lora_weights": False}, model, seed=0)
    refpeft.save(model, tmp_path / "my-model")
    refpeft.save_adapter(adapter, tmp_path / "my-adapter")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return tmp_path


def test_every_section_with_something_to_run_is_run() -> None:
    assert {name for name, text in SECTIONS.items() if BLOCK.search(text)} == NEEDS.keys()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("section", [pytest.param(name, marks=marks) for name, marks in NEEDS.items()])
def test_the_blocks_of_a_section_run(section: str) -> None:
    for language, block in BLOCK.findall(SECTIONS[section]):
        if language == "python":
            exec(compile(block, f"README.md, {section}", "exec"), {})
            continue
        for command in block.strip().splitlines():
            name, *words = shlex.split(command, comments=True)
            assert name == "refpeft"
            done = subprocess.run(
                [sys.executable, "-m", "refpeft", *words], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_files_that_are_linked_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
