"""`refpeft mutants`: is the checker any good?"""

from dataclasses import asdict
from typing import Annotated

import typer

from refpeft.cli.check import Dask, Names, Workers, executor, interrupts
from refpeft.cli.output import Json, progress, save, writable

Mutant = Annotated[Names, typer.Argument(metavar="[NAME...]", help="Only these mutants.", show_default=False)]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="Try each with N seeds.")]


def mutants(
    names: Mutant = None, seeds: Seeds = 20, workers: Workers = 1, dask: Dask = None, json_file: Json = None
) -> None:
    """Check the checker: every deliberately wrong implementation must be found out.

    Each mutant is the specification with one mistake, named after the kind of real
    bug that it imitates. Exit code 1: one of them survived.

    [cyan]refpeft mutants --seeds 3 --workers 2[/cyan]
    """
    from rich.console import Console

    from refpeft.conformance import mutants as bench
    from refpeft.conformance import terminal

    for name in names or ():
        bench.target(name)
    writable(json_file)
    kills: dict[str, list[bench.Kill]] = {name: [] for name in names or bench.MUTANTS}
    with executor(workers, dask) as pool, progress(len(kills) * seeds) as step, interrupts() as unless_interrupted:
        for kill in bench.mutants(seeds, names, pool):
            kills[kill.mutant].append(kill)
            step(kill.mutant)
            unless_interrupted()
    save(json_file, [asdict(kill) for found in kills.values() for kill in found])
    terminal.show_mutants(kills, Console(highlight=False))
    raise typer.Exit(0 if all(kill.by for found in kills.values() for kill in found) else 1)
