"""What a benchmark ends in: figures that were measured here, beside what was to be reached."""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table


class Figure(NamedTuple):
    """What was measured, and what it was to be `at_most` (inf: nothing). `error`: of the median, by how much it differs
    from process to process: within it nobody can say which is smaller."""

    what: str
    measured: float
    at_most: float
    unit: str = ""
    error: float = 0.0

    @classmethod
    def of(cls, what: str, ratio: tuple[float, float], at_most: float) -> "Figure":
        """A ratio and its error."""
        return cls(what, ratio[0], at_most, error=ratio[1])

    def missed(self) -> bool:
        return not self.measured - self.error <= self.at_most

    def verdict(self) -> str:
        if math.isinf(self.at_most):
            return ""
        return "[red]missed[/]" if self.missed() else "reached" if self.measured <= self.at_most else "tied"

    def shown(self) -> str:
        return f"{self.measured:.3g}{self.unit}" + (f" ± {self.error:.1g}" if self.error else "")

    def limit(self) -> str:
        return f"{self.at_most:g}{self.unit}" if math.isfinite(self.at_most) else "–"


def middle(ratios: Sequence[float], processes: int) -> tuple[float, float]:
    """The median of ratios from so many processes, as many from each, and its error: that of a median of as many
    normal numbers as there are processes."""
    rounds = len(ratios) // processes
    each = [statistics.median(ratios[k * rounds : (k + 1) * rounds]) for k in range(processes)]
    error = math.sqrt(math.pi / 2 / processes) * statistics.stdev(each) if processes > 1 else 0.0
    return statistics.median(ratios), error


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        made.add_column(column, justify="right" if k else "left")
    for row in rows:
        made.add_row(*row)
    return made


NAMED = re.compile(r"([\w-]+), (\w+)( [\d×]+)?(.*?(?:the best of the others)?)(?:, \w+)?")
MARK = "<!-- figures -->\n"


def summary(figures: Sequence[Figure]) -> str:
    """Markdown: what was to be reached, how far, and the numbers of each shape, all cases of one kind in a cell."""
    shapes: dict[str, None] = {}
    rows: dict[str, dict[str, list[str]]] = {}
    for figure in figures:
        named = NAMED.fullmatch(figure.what)
        assert named, figure.what
        shape, kind, _, rest = named.groups()
        shapes[shape] = None
        row = rows.setdefault(kind + rest, {"": [figure.limit()]})
        row.setdefault(shape, []).append(figure.shown() + " **missed**" * figure.missed())
    body = [[what, *(", ".join(row.get(shape, ())) for shape in ("", *shapes))] for what, row in rows.items()]
    return markdown(["", "at most", *shapes], body)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *body])


def rewrite(page: Path, mark: str, text: str) -> None:
    """The part of a page between two marks."""
    before, _, after = page.read_text("utf-8").split(mark)
    page.write_text(mark.join([before, text, after]), "utf-8")


def reached(figures: Sequence[Figure]) -> Table:
    rows = [(f.what, f.shown(), f.limit(), f.verdict()) for f in figures]
    return table("What was to be reached", ("figure", "measured", "at most", ""), rows)
