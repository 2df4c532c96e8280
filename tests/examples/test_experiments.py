"""The experiments run at a small size. What they claim they assert themselves; here it is seen that they can fail."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPERIMENTS = {  # program → what its table names
    "digits": ("full", "BitFit", "LoRA, r = 16"),
    "methods_on_text": ("lora", "said", "trainable_tokens", "standard error"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_runs_and_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("COLUMNS", "100")
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in EXPERIMENTS[name]:
        assert word in done.stdout
    (picture,) = tmp_path.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, done.stdout.splitlines())) <= 100
