"""All benchmarks, one after the other, then one table: what was to be reached, and what was measured.

    make bench        or        python -m bench

Ratios are ours/theirs, both measured here and now, taking turns; below 1 is faster, or smaller.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import fastfood, methods
from bench.figures import Figure, reached
from bench.step import LIMITS

HERE = Path(__file__).parent


def run(script: str) -> dict[str, Any]:
    """A benchmark prints its own table and leaves its figures in a file."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        done = subprocess.run([sys.executable, HERE / script, "--json", figures], check=False)
        if not figures.is_file():
            sys.exit(f"Not well: {script} did not finish (exit code {done.returncode}), see above.")
        found: dict[str, Any] = json.loads(figures.read_text())
        return found


def step_figures(found: dict[str, Any]) -> Iterator[Figure]:
    for shape, limit in LIMITS.items():
        measured = found[f"{shape}, peft"]
        yield Figure(f"training step, {shape}: time against transformers + peft", measured["ratio"], limit)
        yield Figure(f"training step, {shape}: peak memory", measured["a_mb"] / measured["b_mb"], 1.0)


def fastfood_figures(found: dict[str, Any]) -> Iterator[Figure]:
    for way in ("forward", "transpose"):
        at = f"fastfood, 2²² parameters, {way}"
        yield Figure(f"{at}: time against scipy.fft.dct", found[way]["ratio"], fastfood.LIMIT)
        yield Figure(f"{at}: memory", found[way]["vectors"], fastfood.LIMIT_VECTORS, " vectors")


def exporter_figures(found: dict[str, Any]) -> Iterator[Figure]:
    yield from (Figure(*row) for row in found["figures"])


def kind_figures(found: dict[str, Any]) -> Iterator[Figure]:
    for verdict in ("refused", "wrong"):
        kinds = [kind for kind, (what, _) in found["refpeft"].items() if what == verdict]
        yield Figure(f"export of {len(found['refpeft'])} kinds of adapters: {verdict}", len(kinds), 0)


def method_figures(found: dict[str, Any]) -> Iterator[Figure]:
    for row, r in found.items():
        yield Figure(f"training step, d=256, {row}: time against {methods.against(row)}", r["ratio"], methods.LIMIT)


def main() -> None:
    console = Console()
    figures: list[Figure] = []
    scripts = {
        "step.py": step_figures,
        "methods.py": method_figures,
        "exporters.py": exporter_figures,
        "seq2seq.py": exporter_figures,
        "peft_kinds.py": kind_figures,
        "fastfood.py": fastfood_figures,
    }
    for script, read in scripts.items():
        console.print(f"\n[bold]bench/{script}[/]")
        figures += read(run(script))
    console.print(reached(figures))
    left = sum(figure.missed() for figure in figures)
    if left:
        sys.exit(f"Not well: {left} of {len(figures)} figures missed.")
    console.print(f"All is well: none of {len(figures)} figures missed.")


if __name__ == "__main__":
    main()
