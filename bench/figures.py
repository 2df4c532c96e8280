"""What a benchmark ends in: figures that were measured here, beside what was to be reached."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

Figure = tuple[str, float, float, str]  # what, measured, at most (inf: nothing was to be reached), the unit of both


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
    for what, x, limit, unit in figures:
        named = NAMED.fullmatch(what)
        assert named, what
        shape, kind, _, rest = named.groups()
        shapes[shape] = None
        row = rows.setdefault(kind + rest, {"": [f"{limit:g}{unit}" if math.isfinite(limit) else "–"]})
        row.setdefault(shape, []).append(f"{x:.3g}{unit}")
    head = [["", "at most", *shapes], ["---"] * (2 + len(shapes))]
    body = [[what, *(", ".join(row.get(shape, ())) for shape in ("", *shapes))] for what, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in head + body)


def rewrite(page: Path, text: str) -> None:
    """The part of a page between two marks."""
    before, _, after = page.read_text("utf-8").split(MARK)
    page.write_text(MARK.join([before, text, after]), "utf-8")


def missed(figure: Figure) -> bool:
    return not figure[1] <= figure[2]


def reached(figures: Sequence[Figure]) -> Table:
    rows = []
    for figure in figures:
        what, x, limit, unit = figure
        most, verdict = (f"{limit:g}{unit}", "reached") if math.isfinite(limit) else ("–", "")
        rows.append((what, f"{x:.3g}{unit}", most, "[red]missed[/]" if missed(figure) else verdict))
    return table("What was to be reached", ("figure", "measured", "at most", ""), rows)
