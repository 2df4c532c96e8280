"""`refpeft check`, `replay`, `report`, `targets`, `mutants`: the conformance suite from the command line."""

import json
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refpeft.cli.errors import missing

if TYPE_CHECKING:
    from refpeft.conformance.case import Case
    from refpeft.conformance.engine import Outcome
    from refpeft.conformance.report import Event, Report
    from refpeft.conformance.site import Site

Target = Annotated[str, typer.Argument(metavar="TARGET", help="What to check; see [bold]refpeft targets[/bold].")]
Names = list[str] | None
Methods = Annotated[Names, typer.Option("--method", "-m", metavar="NAME", help="Only this method (repeatable).")]
Levels = Annotated[
    Names,
    typer.Option("--level", "-l", metavar="LEVEL", help="Only layer, model, lifecycle, story or export (repeatable)."),
]
Properties = Annotated[Names, typer.Option("--property", "-p", metavar="NAME", help="Only this property (repeatable).")]
Model = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="On the weights in this HF model folder, in place of tiny models."),
]
Examples = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Drawn examples for each property.",
        show_default="12 for a layer, 2 or 3 for a model, 1 with --model",
    ),
]  # fmt: skip
Seed = Annotated[int, typer.Option(metavar="S", help="What the drawn examples depend on.")]
Shard = Annotated[str, typer.Option(metavar="I/N", help="Do part I of N; [bold]refpeft report[/bold] joins the parts.")]
Workers = Annotated[int, typer.Option(min=1, metavar="N", help="Processes to work in.")]
Dask = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Work on the Dask cluster at this address instead.")]
Known = Annotated[Path | None, typer.Option(metavar="FILE", help="Known failures, instead of those shipped.")]
Update = Annotated[
    bool, typer.Option("--update", help="Write what fails into the file of --known, and take out what no longer does.")
]
Database = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Try first what failed before, as Hypothesis keeps it here; draw anew each time."),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON lines.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write the report as JUnit XML.")]
Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the matrix as a picture.")]
Badge = Annotated[Path | None, typer.Option("--badge", metavar="FILE", help="Write a badge (SVG).")]
Reports = Annotated[list[Path], typer.Argument(metavar="REPORT...", help="What check --json wrote.")]
CaseFile = Annotated[Path, typer.Argument(metavar="CASE", help="A case that a check stored (.safetensors).")]


Python = Annotated[
    str | None,
    typer.Option(
        "--python",
        metavar="PATH",
        help="Run the target by this python, which has its library and refpeft.",
    ),
]


def check(
    target: Target,
    method: Methods = None,
    level: Levels = None,
    property: Properties = None,
    model: Model = None,
    examples: Examples = None,
    seed: Seed = 0,
    shard: Shard = "1/1",
    workers: Workers = 1,
    dask: Dask = None,
    python: Python = None,
    known: Known = None,
    update: Update = False,
    database: Database = None,
    json_file: Json = None,
    html: Html = None,
    junit: Junit = None,
    svg: Svg = None,
) -> None:
    """Is this implementation right, and where not?

    Every property that the target declares is tried on drawn examples. One that
    fails is made as small as possible and stored, to be looked at and replayed.

    The installed HF peft, everything:
    [cyan]refpeft check peft[/cyan]

    One method on one level, with a page to read:
    [cyan]refpeft check peft -m dora -l layer --html report.html[/cyan]

    A program of your own, in any language:
    [cyan]refpeft check "program:node my_lora.mjs" -m lora[/cyan]

    A library that lives in an environment of its own:
    [cyan]refpeft targets --install lycoris && refpeft check lycoris[/cyan]
    [cyan]refpeft check adapters --python ../adapters/bin/python[/cyan]

    An eighth of the work:
    [cyan]refpeft check peft --shard 2/8 --json part2.jsonl[/cyan]

    Exit code 0: as expected. 1: something differs, or fails no longer.
    2: could not run.
    """
    from refpeft.conformance import engine
    from refpeft.conformance import known as knowledge
    from refpeft.conformance.report import build, writer

    if update and not known:
        raise ValueError("--update needs --known FILE, the file to write")
    if update and known and not known.exists():
        known.write_text("[]\n", encoding="utf-8")
    views = {"html": html, "junit": junit, "svg": svg}
    writable(json_file, known, *views.values())
    options: dict[str, Any] = {
        "examples": examples, "seed": seed, "shard": part(shard), "known": known, "database": database,
    }  # fmt: skip
    if model:
        options["model"] = model
    seen: list[Event] = []
    with (
        executor(workers, dask, elsewhere(target, python)) as pool,
        progress() as step,
        writer(json_file) as write,
        interrupts() as unless_interrupted,
    ):
        for event in engine.check(elsewhere(target, python), method, level, property, executor=pool, **options):
            for use in (seen.append, write, step):
                use(event)
            unless_interrupted()
    if update and known:
        came, went = knowledge.update(
            known, str(seen[0]["target"]["version"]), [e for e in seen if e["type"] == "result"]
        )
        typer.echo(f"{known}: {came} added, {went} removed", err=True)
    finish(build(seen), views)


def elsewhere(target: str, python: str | None) -> str:
    """The target as a program of another python: the one given, or that of the environment made for it."""
    from refpeft.conformance.targets import libraries

    python = python or libraries.elsewhere(target)
    return libraries.served(target, python) if python else target


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


def writable(*paths: Path | None) -> None:
    """Better to hear it before the work than after."""
    for path in paths:
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
        if path and path.is_dir():
            raise ValueError(f"{path}: expected a file to write, found a folder")


def part(shard: str) -> tuple[int, int]:
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--shard: expected I/N with 1 ≤ I ≤ N, found {shard!r}")
    return int(i), int(n)


@contextmanager
def executor(workers: int, dask: str | None, target: str | None = None) -> Iterator[Executor | None]:
    """Who does the work. Processes of this machine begin as copies of one that has imported the target already."""
    if dask:
        try:
            from distributed import Client  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ValueError("--dask needs distributed: pip install 'refpeft[dask]'") from None
        with Client(dask) as client:  # type: ignore[no-untyped-call, unused-ignore]
            yield client.get_executor()
    elif workers > 1:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import active_children, get_all_start_methods, get_context

        from refpeft.conformance.targets import place

        context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
        context.set_forkserver_preload(["refpeft.conformance.engine", *([place(target)[0]] if target else [])])
        pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_DFL))
        try:
            yield pool
        except BaseException:
            for worker in active_children():  # or the wait below would be for the work that they have begun
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    else:
        yield None


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C ends the work even where Python drops the exception, as it does in callbacks of the garbage collector
    (Hypothesis has one): what is yielded raises it again."""
    pressed: list[int] = []

    def handle(number: int, frame: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


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


Script = Annotated[
    Path | None,
    typer.Option("--script", metavar="FILE", help="Write the story as a script that needs the library alone."),
]


def replay(
    case: CaseFile, target: Target, python: Python = None, json_file: Json = None, script: Script = None
) -> None:
    """Put one stored case to a target again.

    [cyan]refpeft replay .refpeft/cases/peft-dora-layer-merge.safetensors peft[/cyan]

    A story as a script for a bug report, which imports nothing of refpeft:
    [cyan]refpeft replay .refpeft/cases/peft-lora-story-files.safetensors peft --script story.py[/cyan]

    Exit code 0: the answer is as specified. 1: it is not, or it is skipped.
    2: could not run.
    """
    from rich.console import Console

    from refpeft.conformance import engine, terminal
    from refpeft.conformance.case import Case

    writable(json_file, script)
    if script:
        from refpeft.conformance import script as scripts

        script.write_text(scripts.script(Case.read(case), target), encoding="utf-8")
    result = answered(Case.read(case), str(case), engine.replay(case, elsewhere(target, python)))
    terminal.story(result, Console(highlight=False))
    save(json_file, [result])
    raise typer.Exit(0 if result["status"] == "pass" else 1)


def answered(case: "Case", path: str, outcome: "Outcome") -> "Event":
    """The result of one case, in the form of those of a whole check."""
    from refpeft.conformance.properties import PROPERTIES
    from refpeft.conformance.yardstick import LIMIT

    place = {"level": case.level, "method": case.method, "property": case.meta["property"]}
    found = [p for p in PROPERTIES if (p.level, p.name) == (case.level, case.meta["property"])]
    verdict = outcome.verdict
    kind = verdict.kind or ""
    status = "skip" if outcome.skipped else "error" if kind.startswith("error") else "fail" if kind else "pass"
    return place | {
        "type": "result", "required": not found or found[0].required, "status": status,
        "statement": found[0].statement if found else "The answer is that of the specification.",
        "ratio": verdict.ratio, "limit": LIMIT[case.level], "kind": verdict.kind,
        "detail": outcome.skipped or verdict.detail, "case": path, "replay": None,
        "claims": case.meta.get("claims", []),
    }  # fmt: skip


def save(path: Path | None, rows: Sequence[Any]) -> None:
    if path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


NEEDS = {"peft": "peft", "onnxruntime": "onnxruntime"}  # target → the package that it drives


Install = Annotated[
    Names,
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
