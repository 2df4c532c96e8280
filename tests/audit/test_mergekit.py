"""Merges made by mergekit, in an environment of its own, audited. A merge is its YAML, which is JSON too."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refpeft.conformance.targets import libraries
from tests.audit.test_audit import DTYPES, Folders, audit, findings, made

pytestmark = [pytest.mark.mergekit]


def merged(folders: Folders, recipe: dict[str, Any]) -> Path:
    where = folders["base"].parent
    (where / "recipe.yml").write_text(json.dumps(recipe))
    python = libraries.elsewhere("mergekit")
    program = Path(python).with_name("mergekit-yaml") if python else Path("mergekit-yaml")
    words = [str(program), "recipe.yml", "merged", "--lora-merge-cache", "cache"]
    run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=where)
    assert run.returncode == 0, run.stderr[-2000:]
    return where / "merged"


def tuned(folders: Folders) -> list[str]:
    """`base+adapter`, as mergekit writes it."""
    return [f"{folders['base']}+{folder}" for name, folder in folders.items() if name != "base"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_base_plus_adapter_holds(method: str, dtype: str, tmp_path: Path) -> None:
    folders = made(tmp_path, "llama", DTYPES[dtype], (method,))
    (one,) = tuned(folders)
    result = audit(
        merged(folders, {"merge_method": "passthrough", "dtype": dtype, "models": [{"model": one}]}), folders
    )
    assert result.exit_code == 0, result.output


def test_task_arithmetic_of_two_holds(tmp_path: Path) -> None:
    folders = made(tmp_path, "llama", DTYPES["float32"], ("lora", "rslora"))
    models = [{"model": model, "parameters": {"weight": 1.0}} for model in tuned(folders)]
    recipe = {"merge_method": "task_arithmetic", "dtype": "float32", "base_model": str(folders["base"])}
    result = audit(merged(folders, {**recipe, "models": models}), folders)
    assert result.exit_code == 0, result.output


def test_the_mean_of_two_is_half_of_each(tmp_path: Path) -> None:
    """Right for what it was told, and the audit says what it is: k = 0.5 for both."""
    folders = made(tmp_path, "llama", DTYPES["float32"], ("lora", "rslora"))
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in tuned(folders)]
    folder = merged(folders, {"merge_method": "linear", "dtype": "float32", "models": models})
    result = audit(folder, folders)
    assert result.exit_code == 1
    scaled = [f for f in findings(folder) if f["verdict"] not in ("equal", "rounding")]
    assert {f["verdict"] for f in scaled} == {"scaled"}
    assert {k for f in scaled for k in np.round(f["k"], 5)} == {0.5}
