"""`refpeft methods`: what the specification says, method by method."""

import re
import textwrap
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

GAP = re.compile(r" {5,}")  # what follows it on a formula's line is a note in the margin
NBSP = "\u00a0"
NARROWEST = 24  # column of formulae: the papers make room for it


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

    said = {name: doc(name) for name in METHODS}
    papers = {name: authors(d.paper) for name, d in said.items()}
    rest = max(map(len, METHODS)) + len("claims") + 6
    paper = max(map(len, papers.values())) + 3
    room = console.width - rest - paper
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("method", style="bold cyan", no_wrap=True)
    table.add_column("formula", no_wrap=True)
    if room >= NARROWEST:
        table.add_column("paper", style="dim", no_wrap=True)
    table.add_column("claims", justify="right")
    for name, d in said.items():
        formula = GAP.split(d.formulae.strip().splitlines()[0])[0]
        lines = broken(formula, room if room >= NARROWEST else max(console.width - rest, NARROWEST))
        table.add_row(name, Text("\n".join(lines)), *([papers[name]] if room >= NARROWEST else []), str(len(d.claims)))
    console.print(table)
    console.print("\nrefpeft methods NAME reads one of them.", style="dim")


def authors(paper: str) -> str:
    """Who and when, in short: 'Lee et al. 2019' for three and more."""
    found = re.match(r"(?:The baseline of )?(.*?)( \d{4})", paper)
    if not found:
        return paper.split(",")[0]
    first, *others = re.split(r", | & ", found[1])
    return (f"{first} et al." if len(others) > 1 else found[1]) + found[2]


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
    console.print(rows([(f.name, default(f)) for f in fields(METHODS[name].Config)] or [("none", "")]))
    heading(console, "Checkpoint keys")
    console.print(rows(keys(METHODS[name])))


def keys(method: Any) -> list[tuple[str, str]]:
    """The parameters' names in the formulae and in checkpoints: those of all modules first, then those of each."""
    shared = {name: key + "…" * key.endswith(".") for name, key in getattr(method, "SHARED", {}).items()}
    stacks = dict.fromkeys(name.rpartition(".")[0] + "." for name in shared if "." in name)
    found = {name: key for name, key in shared.items() if "." not in name}
    if stacks:
        found[", ".join(stack + "…" for stack in stacks)] = "the same for an encoder-decoder's other attentions"
    for name, pair in method.KEYS.items():
        key = "  or  ".join(dict.fromkeys(filter(None, pair)))
        still = "  (never trained)" if name in method.FROZEN else ""
        found.setdefault(name, ("" if key in shared.values() else "<module>.") + key + still)
    if not found:
        return [("φ", "the model's own tensors, by their own names")]
    return list(found.items())


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
    own = broken(formula, width, indent, hang) if indent and not item else wrap(formula, width, indent, hang)
    return own + [x for text in note for x in fit(hang + text.strip(), width)]


def wrap(text: str, width: int, indent: str = "", hang: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def broken(formula: str, width: int, indent: str = "", hang: str = "") -> list[str]:
    """In lines of this width, broken between equations, and elsewhere only where one equation is too long."""
    lines = [line.replace(NBSP, " ") for line in wrap(clauses(formula), width, indent, hang)]
    if lines and any(len(line) > width for line in lines):
        return [x for line in lines for x in wrap(line.strip(), width, line[: len(line) - len(line.lstrip())], hang)]
    return lines


def clauses(formula: str) -> str:
    """Breakable between its equations, which stand three spaces apart, and nowhere else."""
    return re.sub(r"(?<! ) (?! )", NBSP, formula)


def heading(console: Any, text: str) -> None:
    from rich.text import Text

    console.print(Text("\n" + text, style="bold"))


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
