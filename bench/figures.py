"""What a benchmark ends in: figures that were measured here, beside what was to be reached."""

import math
from collections.abc import Sequence

from rich.table import Table

Figure = tuple[str, float, float, str]  # what, measured, at most (inf: nothing was to be reached), the unit of both


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        made.add_column(column, justify="right" if k else "left")
    for row in rows:
        made.add_row(*row)
    return made


def missed(figure: Figure) -> bool:
    return not figure[1] <= figure[2]


def reached(figures: Sequence[Figure]) -> Table:
    rows = []
    for figure in figures:
        what, x, limit, unit = figure
        most, verdict = (f"{limit:g}{unit}", "reached") if math.isfinite(limit) else ("–", "")
        rows.append((what, f"{x:.3g}{unit}", most, "[red]missed[/]" if missed(figure) else verdict))
    return table("What was to be reached", ("figure", "measured", "at most", ""), rows)
