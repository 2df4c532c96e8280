"""`refpeft history`: does the suite find the bugs that shipped?"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refpeft.cli.output import Json, progress, save, writable

if TYPE_CHECKING:
    from refpeft.conformance.history import Bug, Result

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[BUG...]", help="Only these, as peft-1355.", show_default=False)
]
Where = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Keep the environments here.", show_default="~/.cache/refpeft/history"),
]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="Ask each release with N seeds.")]
List = Annotated[bool, typer.Option("--list", help="Say which bugs there are, and run nothing.")]


def history(
    names: Names = None, where: Where = None, seeds: Seeds = 3, list_: List = False, json_file: Json = None
) -> None:
    """Check the checker: does it find the bugs that shipped?

    Each bug is asked for in the release of a library that had it, where the
    property named must fail, and in the one that mended it, where it must pass.
    Environments for the releases are made with pip.

    One of them:
    [cyan]refpeft history peft-1355[/cyan]

    Exit code 0: all were caught. 1: one was missed, or is found where it is not.
    2: could not run.
    """
    from rich.console import Console

    from refpeft.conformance import history as past
    from refpeft.conformance import terminal
    from refpeft.conformance.targets import libraries

    console, bugs = Console(highlight=False), chosen(names)
    writable(json_file)
    if list_:
        terminal.show_bugs(bugs, console)
        return
    with progress(sum(1 + (bug.fixed is not None) for bug in bugs)) as step:
        results = list(past.history(bugs, where or libraries.folder().parent / "history", range(seeds), step=step))
    save(json_file, [row(result) for result in results])
    terminal.show_history(results, console)
    raise typer.Exit(0 if all(result.ok for result in results) else 1)


def chosen(names: Sequence[str] | None) -> "Sequence[Bug]":
    from refpeft.conformance.history import BUGS

    there = {bug.name: bug for bug in BUGS}
    for name in names or ():
        if name not in there:
            raise ValueError(f"unknown bug {name!r}: there are {', '.join(there)}")
    return [there[name] for name in names or there]


def row(result: "Result") -> dict[str, Any]:
    """One line of --json: what was asked of which releases, and what they said."""
    bug = asdict(result.bug)
    return {
        **{name: bug[name] for name in ("name", "library", "bad", "fixed", "place")},
        "verdict": result.verdict, "said_bad": asdict(result.bad),
        "said_fixed": asdict(result.fixed) if result.fixed else None,
    }  # fmt: skip
