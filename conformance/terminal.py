"""A report on the terminal: the matrix, what differs, where the time went, and the verdict."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from refpeft.conformance.report import LEVELS, STATUSES, Event, Report

if TYPE_CHECKING:
    from refpeft.conformance.history import Answer, Bug, Result
    from refpeft.conformance.mutants import Kill
    from refpeft.conformance.site import Cell, Site

NBSP = "\u00a0"
COLOURS = {
    "pass": "green",
    "fail": "bold red",
    "error": "bold red",
    "unexpected-pass": "bold magenta",
    "known": "yellow",
    "skip": "cyan",
    "undeclared": "dim",
}


def show(report: Report, console: Console) -> None:
    console.print(heading(report, console.width))
    console.print()
    console.print(matrices(report, console.width))
    console.print(legend(report))
    for failure in report.failures:
        console.print()
        story(failure, console)
    console.print()
    if report.seconds:
        console.print(times(report))
    console.print(Text(report.verdict, style="bold green" if report.ok else "bold red"))


def heading(report: Report, width: int) -> Text:
    header = report.header
    text = Text.assemble((report.target, "bold"), " against the specification ", (f"v{header['spec_version']}", "bold"))
    versions = header.get("versions", {})
    model = [f"model {header['model']}"] if header.get("model") else []
    about = [*model, f"seed {header['seed']}", *(f"{name} {version}" for name, version in versions.items())]
    lines = textwrap.wrap(" · ".join(part.replace(" ", NBSP) for part in about), width)
    return text.append("\n" + "\n".join(lines).replace(NBSP, " "), style="dim")


# ── the matrix ───────────────────────────────────────────────────────────────────────────────────────────────────────


def matrices(report: Report, width: int) -> RenderableType:
    """One table a level, side by side as far as they fit; a level with too many methods is cut into several."""
    tables = []
    for level in report.levels:
        methods = report.methods(level)
        room = max(1, (width - 20) // (max(map(len, methods)) + 2))
        for start in range(0, len(methods), room):
            tables.append(Padding(table(report, level, methods[start : start + room]), (0, 3, 1, 0)))
    return Columns(tables)


def table(report: Report, level: str, methods: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(level, no_wrap=True)
    for method in methods:
        table.add_column(method, justify="center", no_wrap=True)
    for name in report.properties(level):
        row = report.row(level, name)
        cells = [row.get(method) for method in methods]
        table.add_row(Text(name, style=emphasis(cells)), *map(symbol, cells))
    return table


def symbol(result: Event | None) -> Text:
    """Nothing where the property does not apply to the method."""
    return Text(STATUSES[result["status"]][0], style=COLOURS[result["status"]]) if result else Text()


def emphasis(cells: Sequence[Event | None]) -> str:
    """What is only recommended is set dimmer."""
    return "" if any(cell and cell["required"] for cell in cells) else "dim"


def legend(report: Report) -> Text:
    parts = Text()
    for status in reversed(list(report.counts)):
        mark, meaning = STATUSES[status]
        parts.append("   " if parts else "").append(mark, style=COLOURS[status]).append(f" {meaning}", style="dim")
    return parts


# ── what differs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def story(result: Event, console: Console) -> None:
    """One result that is not as expected: what should hold, what was found, and how to see it again."""
    mark, _ = STATUSES[result["status"]]
    title = Text(
        f"{mark} {result['level']} · {result['method']} · {result['property']}", style=COLOURS[result["status"]]
    )
    title.append(f"   {result['status']}, {'required' if result['required'] else 'recommended'}", style="dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts(result):
        grid.add_row(label, Text(value))
    console.print(title, Padding(grid, (0, 0, 0, 2)), sep="\n")
    if result.get("replay"):
        console.print(Text("  replay  ", style="dim").append(result["replay"], style="cyan"), soft_wrap=True)


def facts(result: Event) -> Iterator[tuple[str, str]]:
    yield "should", result["statement"]
    if result.get("detail"):
        yield "found", result["detail"]
    if result.get("kind"):
        yield "kind", result["kind"]
    if result.get("ratio") is not None:
        yield (
            "ratio",
            f"{number(result['ratio'])}; a correct implementation stays below {number(result['limit'])}",
        )
    if result.get("case"):
        yield "case", result["case"]
    if result.get("script"):
        yield "script", f"{result['script']}, which needs the library alone"


def number(x: float) -> str:
    """Three figures: 0.812, 5, 3.1e+04."""
    return f"{x:.3g}"


def times(report: Report) -> Text:
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    where = " in processes side by side" if report.parallel else ""
    cases = sum(result.get("examples", 0) for result in report.results)
    share = report.seconds.get("target", 0.0) / (sum(report.seconds.values()) or 1)
    rate = f"{cases:,} cases, {cases / (report.wall or 1):.0f} a second, {share:.0%} of the time in the target"
    return Text(f"{report.wall:.1f} s: {parts}{where}\n{rate}", style="dim")


# ── several implementations ──────────────────────────────────────────────────────────────────────────────────────────


def show_site(site: "Site", console: Console) -> None:
    """Methods down, implementations across: the symbols of layer, model, lifecycle and export."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("method", style="cyan", no_wrap=True)
    for i in site.implementations:
        table.add_column(f"{i.name}\n{i.version}", no_wrap=True)
    for method in site.methods:
        cells = [i.cell(method) for i in site.implementations]
        table.add_row(method, *(marks(cell) for cell in cells))
    console.print(table)
    console.print(Text(f"\nThe marks of a cell: {', '.join(LEVELS)}.", style="dim"))
    for i in site.implementations:
        style = "green" if i.latest.ok else "red"
        console.print(Text.assemble((i.latest.target, "bold"), "  ", (i.latest.verdict, style)))
    console.print(Text(site.verdict, style="bold green" if site.ok else "bold red"))


def marks(cell: "Cell") -> Text:
    text = Text()
    for level in LEVELS:
        status = cell.worst(level)
        text.append(STATUSES[status][0] if cell.levels else "", style=COLOURS[status])
    return text


# ── the mutants ──────────────────────────────────────────────────────────────────────────────────────────────────────


def show_mutants(kills: Mapping[str, Sequence["Kill"]], console: Console) -> None:
    """Which property found each of them, on how many seeds."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("mutant", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    table.add_column("found by", style="dim")
    for name, found in kills.items():
        killed = [kill for kill in found if kill.by]
        by = ", ".join(dict.fromkeys(kill.by for kill in killed if kill.by)) or "nothing"
        table.add_row(name, f"{len(killed)}/{len(found)}", by, style=None if len(killed) == len(found) else "bold red")
    console.print(table)
    survivors = [name for name, found in kills.items() if not all(kill.by for kill in found)]
    verdict = f"Survived on some seed: {', '.join(survivors)}." if survivors else f"All {len(kills)} were found out."
    console.print(Text("\n" + verdict, style="bold red" if survivors else "bold green"))


# ── bugs that shipped ────────────────────────────────────────────────────────────────────────────────────────────────


def show_bugs(bugs: Sequence["Bug"], console: Console) -> None:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    for name in ("bug", "releases", "property", "what it did"):
        table.add_column(name, no_wrap=name != "what it did")
    for bug in bugs:
        table.add_row(bug.name, f"{bug.bad} → {bug.fixed or 'none'}", bug.place, Text(bug.symptom, style="dim"))
    console.print(table)


def show_history(results: Sequence["Result"], console: Console) -> None:
    """Each bug, what the property named said of the bad release and of the fixed one, and the verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("bug", "property", "release", "said", "verdict"):
        table.add_column(name, no_wrap=name in ("bug", "verdict"), overflow="fold")
    for result in results:
        bug, colour = result.bug, "green" if result.ok else "bold red"
        verdict = Text(result.verdict, style=colour)
        table.add_row(bug.name, bug.place, bug.bad, said(result.bad), verdict)
        table.add_row(Text(), Text(), bug.fixed or "none", said(result.fixed) if result.fixed else Text())
    console.print(table)
    counts = Counter(r.verdict for r in results)
    summary = "; ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    wrong = [r.bug.name for r in results if not r.ok]
    text = f"{len(results)} bug{'s' * (len(results) != 1)}: {summary}" + (f" ({', '.join(wrong)})." if wrong else ".")
    console.print(Text(f"\n{text}", style="bold red" if wrong else "bold green"))


def said(answer: "Answer") -> Text:
    if answer.status == "pass":
        return Text("passes", style="green")
    return Text(answer.detail or answer.status)
