"""The table of engines on the terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refpeft.conformance.engines.table import Row
from refpeft.conformance.engines.variants import VARIANTS
from refpeft.conformance.engines.verdict import Verdict

STYLES = {"right": "green", "refused": "yellow", "silently wrong": "bold red", "no answer": "bold red"}


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("engine", "version", *VARIANTS):
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(row.engine, row.version or "", *[cell(row.verdicts[name]) for name in VARIANTS])
    console.print(table)
    for row in rows:
        for name, v in row.verdicts.items():
            if v.detail:
                console.print(Text(f"{row.engine}, {name}: {v.verdict}: {v.detail}", STYLES.get(v.verdict, "")))
    counts = Counter(v.verdict for row in rows for v in row.verdicts.values())
    said = ", ".join(f"{n} {what}" for what, n in counts.items())
    wrong = counts["silently wrong"] + counts["no answer"]
    console.print(Text(f"\n{said}.", style="bold red" if wrong else "bold green"))


def cell(v: Verdict) -> Text:
    words = {"silently wrong": "wrong", "not installed": "–"}.get(v.verdict, v.verdict)
    return Text(words if v.off is None else f"{words} {v.off:.0e}", STYLES.get(v.verdict, ""))
