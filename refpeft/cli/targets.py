"""`refpeft targets`: what can be checked, and what brings it."""

import shlex
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from refpeft.cli.errors import missing
from refpeft.cli.output import Json, save

NEEDS = {"peft": "peft", "onnxruntime": "onnxruntime"}  # target → the package that it drives


Install = Annotated[
    list[str] | None,
    typer.Option("--install", metavar="NAME", help="Make the environment of this library, with pip (repeatable)."),
]
Where = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Make it in this folder.", show_default="~/.cache/refpeft/targets"),
]


def targets(install: Install = None, where: Where = None, json_file: Json = None) -> None:
    """List what can be checked, and whether it is installed; then tools that our tests run.

    Libraries that are no part of refpeft get environments of their own:
    [cyan]refpeft targets --install loralib[/cyan]
    [cyan]refpeft check loralib[/cyan]
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from refpeft.conformance.targets import TARGETS, libraries

    if where and not install:
        raise ValueError("--dir needs --install NAME, what to make there")
    for name in install or ():
        python = libraries.install(name, where)
        if name in libraries.TOOLS:
            typer.echo(f"{(where or libraries.folder()) / name}: {libraries.TOOLS[name].requires[0]}", err=True)
            continue
        there = f" --python {shlex.quote(str(python))}" if where else ""
        typer.echo(f"{python.parents[1]}: refpeft check {name}{there}", err=True)
    if install:
        return
    about = {name: about for name, (about, _) in TARGETS.items()}
    about |= {name: tool.about for name, tool in libraries.TOOLS.items()}
    rows = [{"name": name, "about": text, **installed(name)} for name, text in about.items()]
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("target", style="bold cyan", no_wrap=True)
    table.add_column("what it is")
    table.add_column("here", style="dim")
    for row in rows:
        table.add_row(row["name"] + "…" * row["name"].endswith(":"), row["about"], escape(row["here"]))
    Console(highlight=False).print(table)
    save(json_file, rows)


def installed(target: str) -> dict[str, Any]:
    """Is what the target drives there, in which version, and if not, which extra brings it?"""
    from refpeft.conformance.targets import libraries

    if target in libraries.EVERY:
        version = libraries.version(target)
        return {"ready": version is not None, "here": version or f"refpeft targets --install {target}"}
    package = NEEDS.get(target)
    if package is None:
        return {"ready": True, "here": "ready"}
    try:
        return {"ready": True, "here": f"{package} {metadata.version(package)}"}
    except metadata.PackageNotFoundError:
        return {"ready": False, "here": missing(package)}
