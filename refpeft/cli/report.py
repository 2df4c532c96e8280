"""`refpeft report`, and how a report is shown and written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refpeft.cli.output import writable

if TYPE_CHECKING:
    from refpeft.conformance.report import Report
    from refpeft.conformance.site import Site

Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write the report as JUnit XML.")]
Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the matrix as a picture.")]
Badge = Annotated[Path | None, typer.Option("--badge", metavar="FILE", help="Write a badge (SVG).")]
Reports = Annotated[list[Path], typer.Argument(metavar="REPORT...", help="What check --json wrote.")]


def report(files: Reports, html: Html = None, junit: Junit = None, svg: Svg = None, badge: Badge = None) -> None:
    """Show a report again, join the shards of one run, or see several implementations side by side.

    [cyan]refpeft report run.jsonl --html report.html[/cyan]
    [cyan]refpeft report part*.jsonl[/cyan]
    [cyan]refpeft report peft.jsonl adapters.jsonl lycoris.jsonl --html who.html --svg who.svg[/cyan]

    Older runs of an implementation, given too, are its history.
    """
    from refpeft.conformance.site import gathered, read_runs

    writable(html, junit, svg, badge)
    runs = read_runs(files)
    if len(runs) == 1:
        finish(runs[0], {"html": html, "junit": junit, "svg": svg, "badge": badge})
    if junit or badge:
        raise ValueError(f"--{'junit' if junit else 'badge'} is of one run, and these are {len(runs)}")
    side_by_side(gathered(runs), html, svg)


def side_by_side(site: "Site", html: Path | None, svg: Path | None) -> None:
    """Several implementations: a table, a page, a picture."""
    from rich.console import Console

    from refpeft.conformance import render, terminal

    console = Console(highlight=False)
    terminal.show_site(site, console)
    for name, path, make in (("html", html, render.site_html), ("svg", svg, render.site_svg)):
        if path:
            path.write_text(make(site), encoding="utf-8")
            console.print(f"[dim]{name:5}  {path}[/dim]", soft_wrap=True)
    raise typer.Exit(0 if site.ok else 1)


def finish(report: "Report", views: dict[str, Path | None]) -> None:
    """Show a report, write its views, exit 0 or 1."""
    from rich.console import Console

    from refpeft.conformance import render, terminal

    console = Console(highlight=False)
    terminal.show(report, console)
    for name, path in views.items():
        if path:
            path.write_text(getattr(render, name)(report), encoding="utf-8")
            console.print(f"[dim]{name:5}  {path}[/dim]", soft_wrap=True)
    raise typer.Exit(0 if report.ok else 1)
