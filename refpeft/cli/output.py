"""What commands show while they work, and the files that they write."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from refpeft.conformance.report import Event

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON lines.")]


def writable(*paths: Path | None) -> None:
    """Better to hear it before the work than after."""
    for path in paths:
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
        if path and path.is_dir():
            raise ValueError(f"{path}: expected a file to write, found a folder")


def save(path: Path | None, rows: Sequence[Any]) -> None:
    if path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@contextmanager
def progress(total: int | None = None) -> Iterator[Callable[["Event | str"], None]]:
    """What is being done, on stderr, if someone is looking."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)

        def step(event: "Event | str") -> None:
            if isinstance(event, str):
                bar.update(task, advance=1, description=event)
            elif event["type"] == "header":
                bar.update(task, total=event.get("units"), description=f"checking {event['target']['name']}")
            elif event["type"] == "result":
                place = f"{event['level']} {event['method']} {event['property']}"
                bar.update(task, advance=1, description=place)

        yield step
