"""`refpeft methods`: what the specification says, method by method."""

import re
import textwrap
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

GAP = re.compile(r" {5,}")  # what follows it on a formula's line is a note in the margin
NBSP = "\u00a0"


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to read all about it.", show_default=False)] = None,
) -> None:
    """List the methods, or read one: paper, formulae, claims, config fields, checkpoint keys.

    [cyan]refpeft methods lora[/cyan]
    """
    from rich.console import Console

    console = Console(highlight=False)
    if name is None:
        listing(console)
    else:
        detail(console, name)


def listing(console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from refpeft.conformance.docs import doc
    from refpeft.methods import METHODS

    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("method", style="bold cyan", no_wrap=True)
    table.add_column("formula")
    table.add_column("paper", style="dim", no_wrap=True)
    table.add_column("claims", justify="right")
    for name in METHODS:
        said = doc(name)
        formula = GAP.split(said.formulae.strip().splitlines()[0])[0]
        formula = textwrap.fill(clauses(formula), console.width - 42).replace(NBSP, " ")
        table.add_row(name, Text(formula), said.paper.split(", ")[0], str(len(said.claims)))
    console.print(table)
    console.print("\nrefpeft methods NAME reads one of them.", style="dim")


def detail(console: Any, name: str) -> None:
    from rich.text import Text

    from refpeft.conformance.docs import doc
    from refpeft.methods import METHODS

    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: expected one of {', '.join(METHODS)}")
    said = doc(name)
    console.print(Text(said.title, style="bold"))
    console.print(Text(said.paper, style="dim"))
    console.print(Text("\n" + readable(said.formulae, console.width)))
    heading(console, "Claims")
    console.print(rows((label, text) for label, text in said.claims.items()))
    for title, text in said.sections.items():
        heading(console, title)
        console.print(Text(readable(text, console.width)))
    heading(console, "Config fields")
    console.print(rows((f.name, default(f)) for f in fields(METHODS[name].Config)))
    heading(console, "Checkpoint keys")
    keys = METHODS[name].KEYS.items()
    console.print(rows((symbol, "  or  ".join(dict.fromkeys(filter(None, pair)))) for symbol, pair in keys))


def readable(text: str, width: int) -> str:
    """Set to the width: prose and list items refilled; a formula keeps its line, and loses its marginal note to the
    next one where both do not fit."""
    lines: list[str] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        follows = bool(lines) and lines[-1].strip() != "" and line.strip() != ""
        item = follows and lines[-1].lstrip().startswith("* ") and not line.lstrip().startswith("* ")
        if item or (follows and indent == 0 and not lines[-1].startswith(" ")):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return "\n".join(piece for line in lines for piece in fit(line, min(width, 120)))


def fit(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    formula, *note = GAP.split(line.strip(), maxsplit=1)
    item = formula.startswith("* ")
    hang = indent + ("  " if item else "    " if indent else "")
    if indent and not item:
        formula = clauses(formula)
    wrapped = textwrap.wrap(formula, width, initial_indent=indent, subsequent_indent=hang, break_long_words=False)
    return [line.replace(NBSP, " ") for line in wrapped] + [x for text in note for x in fit(hang + text.strip(), width)]


def clauses(formula: str) -> str:
    """Breakable between its equations, which stand three spaces apart, and nowhere else."""
    return re.sub(r"(?<! ) (?! )", NBSP, formula)


def heading(console: Any, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def rows(pairs: Any) -> Any:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for label, text in pairs:
        grid.add_row(label, Text(text))
    return Padding(grid, (0, 0, 0, 4))


def default(field: "Field[Any]") -> str:
    if field.default is not MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not MISSING else "required"
