"""`refpeft vectors`: golden vectors, made or checked."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refpeft.cli.check import Methods
from refpeft.cli.output import progress

if TYPE_CHECKING:
    from refpeft.conformance.golden import Checked


def vectors(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to make, which must not exist; with --check, to compare.")
    ],
    check: Annotated[bool, typer.Option("--check", help="Make them again and compare with those in DIR.")] = False,
    method: Methods = None,
) -> None:
    """Golden vectors: inputs and right answers in files, to test an implementation in any language without refpeft.

    For every method about a dozen small cases, each chosen for a kind of bug
    that it says in words: a safetensors file with inputs, outputs, gradients
    and merged weights, and how far another answer may be off. index.json lists
    them. Small integers must come out equal; elsewhere the limit is a number of
    units, a unit being what rounding the inputs explains.

    [cyan]refpeft vectors my-vectors[/cyan]
    [cyan]refpeft vectors my-vectors --method dora[/cyan]

    Does this version, on this machine, still say the same? Questions must be
    equal bit for bit, and answers too where they are exact; others that differ
    by rounding, as on another processor, are counted.
    [cyan]refpeft vectors my-vectors --check[/cyan]

    How to read them, with programs in C, JavaScript and Rust that do:
    docs/vectors.md and examples/vectors.

    Exit code 0: made, or as they should be. 1: something differs.
    2: could not run.
    """
    from rich.console import Console

    from refpeft.conformance import golden

    methods = chosen(method)
    console, total = Console(highlight=False, soft_wrap=True), sum(len(golden.chosen(m)) for m in methods)
    with progress(total) as step:
        if check:
            found = list(golden.check(folder, methods if method else (), step))
        else:
            golden.write(folder, methods, step)
    if check:
        say(found, console)
        raise typer.Exit(0 if all(f.status != "differs" for f in found) else 1)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    console.print(f"{total} vectors of {count(methods)} in {folder} ({size / 1e6:.1f} MB), listed in {golden.INDEX}.",
                  markup=False)  # fmt: skip


def chosen(method: Sequence[str] | None) -> list[str]:
    """The methods asked for, in the order in which they are always made."""
    from refpeft.conformance.traits import known

    there = known()
    for name in method or ():
        if name not in there:
            raise ValueError(f"unknown method {name!r}: there are {', '.join(there)}")
    return [name for name in there if not method or name in method]


def count(methods: Sequence[str]) -> str:
    return f"{len(methods)} methods" if len(methods) > 1 else methods[0]


def say(found: "Sequence[Checked]", console: object) -> None:
    """A line for each that differs, and how many are what."""
    from rich.console import Console
    from rich.text import Text

    assert isinstance(console, Console)
    for f in found:
        if f.status == "differs":
            console.print(Text("✗ ", style="red").append(f"{f.id}: ", style="bold").append(f.detail, style="not bold"))
    n, worst = Counter(f.status for f in found), max((f.units for f in found), default=0.0)
    said = [f"{n['same']} the same byte for byte"]
    if n["rounding"]:
        said.append(f"{n['rounding']} with answers that differ by rounding ({worst:.2g} units at most)")
    if n["differs"]:
        said.append(f"{n['differs']} that differ")
    console.print(f"{len(found)} vectors: {', '.join(said)}.", markup=False)
