"""What docs/testing.md shows works, and so does the example repository, as its readers run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
REPOSITORY = ROOT / "examples" / "repository"


def test_all_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/testing.md", "exec"), {"__name__": "page"})


def test_its_tables_say_what_there_is() -> None:
    import inspect

    from refpeft import strategies
    from refpeft.conformance import testing

    options = set(inspect.signature(testing.make).parameters) - {"target"}
    names = set(re.findall(r"`(\w+)`", re.search(r"\| option \|.*?\n\n", PAGE, re.DOTALL)[0]))  # type: ignore[index]
    assert names == options
    for name, arguments in re.findall(r"\| `(\w+)\((.*?)\)` \|", PAGE):
        there = inspect.signature(getattr(strategies, name)).parameters
        assert set(arguments.split(", ")) <= set(there), name


def test_the_example_repository(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-rA"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED tests/test_conformance.py::TestTinyLoRA::test[rslora-layer-merge]" in done.stdout
    wrong = tmp_path / "tinylora" / "__init__.py"
    wrong.parent.mkdir()
    code = (REPOSITORY / "tinylora" / "__init__.py").read_text()
    assert code.count("self.W + self.scale * self.A @ self.B") == 1
    wrong.write_text(code.replace("self.W + self.scale * self.A @ self.B", "self.W + self.A @ self.B"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_conformance.py").write_text((REPOSITORY / "tests/test_conformance.py").read_text())
    (tmp_path / "pyproject.toml").write_text((REPOSITORY / "pyproject.toml").read_text())
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED tests/test_conformance.py::TestTinyLoRA::test[lora-layer-merge]" in done.stdout
