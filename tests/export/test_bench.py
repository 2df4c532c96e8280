"""The table of figures in README.md is the one that bench/exporters.py writes, and says what was missed."""

import math
from pathlib import Path

import numpy as np
import pytest

from bench.exporters import CASES, EXPORT_LIMITS, OURS, SHAPES, against_best, beside, export_figures, latency_figures
from bench.figures import MARK, Figure, middle, rewrite, summary

ROOT = Path(__file__).parents[2]
PEERS = ("torch", "transformers", "optimum", "genai", "mobius")


def cells(table: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.strip().splitlines() if line[:1] == "|"]


def test_the_readme_has_every_figure_and_says_which_were_missed() -> None:
    seconds = {
        name: (1.0, 1.0) for other in EXPORT_LIMITS for name in (*OURS, other, *(beside(n, other) for n in OURS))
    }
    times = {case: {name: [1.0] for name in (*OURS, *PEERS)} for case in CASES}
    figures = [f for shape in SHAPES for f in (*export_figures(shape, seconds), *latency_figures(shape, times, 1))]
    wanted, found = cells(summary(figures)), cells((ROOT / "README.md").read_text("utf-8").split(MARK)[1])
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    assert found[0] == wanted[0]
    for what, limit, *measured in found[2:]:
        numbers = [n for cell in measured for n in cell.replace(" MB", "").split(", ")]
        assert len(numbers) == len(SHAPES) * (1 if "export" in what else 2), what
        for n in numbers if limit != "–" else ():
            x, *error = n.removesuffix(" **missed**").split(" ± ")
            tied = float(x) - sum(map(float, error)) <= float(limit.split()[0])
            assert tied != n.endswith(" **missed**"), what


def test_the_best_is_not_the_luckiest() -> None:
    """Two that tie, each lucky in one process: neither is compared with in the process in which it was chosen."""
    case = {"ours": [1.0, 1.0, 1.0, 1.0], "a": [0.9, 0.9, 1.1, 1.1], "b": [1.1, 1.1, 0.9, 0.9]}
    assert against_best(case, "ours", ["a", "b"], 2)[0] == pytest.approx(1 / 1.1)
    case["b"] = [2.0] * 4
    assert against_best(case, "ours", ["a", "b"], 2)[0] == pytest.approx((1 / 0.9 + 1 / 1.1) / 2)


def test_the_error_is_that_of_the_median_over_processes() -> None:
    """Of many runs of a measurement that is known to be 1: its spread is what each says its error is."""
    rng = np.random.default_rng(0)
    luck = 1 + 0.05 * rng.standard_normal((2000, 8, 1)) + 0.001 * rng.standard_normal((2000, 8, 5))
    said = [middle(run.ravel().tolist(), 8) for run in luck]
    spread = np.std([x for x, _ in said])
    assert np.sqrt(np.mean([e**2 for _, e in said])) == pytest.approx(spread, rel=0.15)
    assert middle([1.0, 2.0, 3.0], 1) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("measured", "at_most", "error", "verdict"),
    [(0.9, 1, 0.2, "reached"), (1.01, 1, 0.02, "tied"), (1.03, 1, 0.02, "missed"), (math.nan, 1, 0.0, "missed")],
)
def test_verdicts(measured: float, at_most: float, error: float, verdict: str) -> None:
    assert verdict in Figure("what", measured, at_most, error=error).verdict()
    assert Figure("what", measured, math.inf).verdict() == ""


def test_only_what_is_between_the_marks_is_written_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARK}old\n{MARK}after\n", "utf-8")
    rewrite(page, MARK, "new\n")
    assert page.read_text("utf-8") == f"before\n{MARK}new\n{MARK}after\n"
