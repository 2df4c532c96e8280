"""`refpeft check` and `replay`: the conformance suite from the command line, and who does the work."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refpeft.cli.output import Json, progress, save, writable
from refpeft.cli.report import Html, Junit, Svg, finish

if TYPE_CHECKING:
    from refpeft.conformance.case import Case
    from refpeft.conformance.engine import Outcome
    from refpeft.conformance.report import Event

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
