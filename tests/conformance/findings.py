"""Pages of docs/findings: their scripts print what the pages say."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from refpeft.conformance.targets import libraries

FINDINGS = Path(__file__).parents[2] / "docs" / "findings"


def pages(names: Sequence[str]) -> list[Any]:
    """(name, page), a parameter each, with the mark of the library that it is about."""
    found = [(name, page) for name in names for page in sorted(FINDINGS.glob(f"{name}-*.md"))]
    return [pytest.param(name, page, marks=getattr(pytest.mark, name), id=page.stem) for name, page in found]


def prints_what_it_says(name: str, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    python = libraries.elsewhere(name) or sys.executable
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip()
        assert [line for line in run.stdout.splitlines() if line not in text] == []
