"""`refpeft engines`: one adapter folder, every engine."""

from pathlib import Path
from typing import Annotated

import typer

from refpeft.cli.output import Json, progress, save, writable

Names = Annotated[list[str] | None, typer.Argument(metavar="[ENGINE...]", help="Only these.", show_default=False)]
Keep = Annotated[
    Path | None,
    typer.Option("--keep", metavar="DIR", help="Keep the folders and the answers here.", show_default=False),
]
Page = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table as a page.", show_default=False)
]


def engines(names: Names = None, keep: Keep = None, page: Page = None, json_file: Json = None) -> None:
    """Give the same adapter folders to every engine that is installed.

    A tiny LLaMA and one LoRA of each kind are written as HF peft writes them:
    plain, rsLoRA, with patterns, with a bias, DoRA. Each engine runs them
    through its own reader, and is right, refuses, or is silently wrong.

    Those in an environment of their own: [cyan]refpeft targets --install vllm[/cyan]

    Exit code 0: none was silently wrong. 1: one was. 2: could not run.
    """
    from rich.console import Console

    from refpeft.conformance.engines import ENGINES, table
    from refpeft.conformance.engines.show import show

    for file in (json_file, page):
        writable(file)
    if keep and keep.exists():
        raise ValueError(f"{keep}: exists already; expected a folder to be made")
    with progress(len(names or ENGINES)) as step:
        found = list(table.rows(names, step, keep))
    save(json_file, [table.as_json(row) for row in found])
    if page:
        page.write_text(table.markdown(found), encoding="utf-8")
    show(found, Console(highlight=False))
    wrong = any(v.verdict == "silently wrong" for row in found for v in row.verdicts.values())
    raise typer.Exit(1 if wrong else 0)
