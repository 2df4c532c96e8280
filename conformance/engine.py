"""The engine: which properties apply to a target, many drawn cases of each, and events for the report.

Work is cut into units (method, level, property), each independent of the others, so that any `concurrent.futures`
executor can run them: a process pool, or Dask's `Client.get_executor()`.
"""

import datetime
import importlib.metadata
import platform
import re
import shlex
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase
from hypothesis.errors import Flaky

from refpeft import SPEC_VERSION
from refpeft.conformance import known as knowledge
from refpeft.conformance import refusals
from refpeft.conformance import script as scripts
from refpeft.conformance.build import about
from refpeft.conformance.case import Case
from refpeft.conformance.properties import PROPERTIES, Property
from refpeft.conformance.targets import Skip, Target, open_target
from refpeft.conformance.targets.spec_stories import settled
from refpeft.conformance.traits import TRAITS, known
from refpeft.conformance.yardstick import LIMIT, Verdict, Yardstick

EXAMPLES = {"layer": 12, "model": 3, "lifecycle": 2, "story": 25, "export": 2}  # drawn, beside the corners
ON_REAL_WEIGHTS = 1  # instead, on the model in a folder: one there costs as much as many tiny ones
LEVELS = tuple(EXAMPLES)
CASES = ".refpeft/cases"
COSTLY = ("error:ProgramHung", "error:ProgramDied")  # reported as met, never made smaller
PARTS = ("spec", "target", "engine")  # of the seconds that each unit takes, in whatever process
Event = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    method: str
    level: str
    property: str


@dataclass(frozen=True)
class Options:
    seed: int = 0
    examples: int | None = None
    model: str | None = None  # a model folder, for the level model, in place of tiny models
    folder: str | None = CASES  # where a case that fails is stored; None: nowhere
    shrink: bool = True
    known: str | None = None  # path of a file of known failures; None: the one shipped for the target, if any
    database: str | None = None  # a folder for Hypothesis to remember what failed


@dataclass
class Clock:
    """Seconds of one unit spent in the specification and in the target; the rest is the engine's own."""

    began: float = field(default_factory=time.perf_counter)
    spec: float = 0.0
    target: float = 0.0

    def read(self) -> dict[str, float]:
        engine = time.perf_counter() - self.began - self.spec - self.target
        return {f"{part}_seconds": round(s, 4) for part, s in zip(PARTS, (self.spec, self.target, engine), strict=True)}


class Wrong(Exception):  # noqa: N818 - what Hypothesis shrinks
    pass


class Gone(BaseException):  # Hypothesis shrinks what is an Exception, and lets this pass
    """The target's program hung or died: each smaller case might cost as much again."""


@dataclass(frozen=True)
class Outcome:
    verdict: Verdict
    skipped: str = ""


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check(
    target: str | Target,
    methods: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
    model: str | Path | None = None,
    examples: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (1, 1),
    executor: Executor | None = None,
    known: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
    folder: str | Path = CASES,
    database: str | Path | None = None,
) -> Iterator[Event]:
    """The events of a run: a header, one result for each method, level and property, a footer.

    `database`: a folder in which Hypothesis keeps what failed, to be tried first by the next run; what is drawn then is
    new in every run."""
    info = dict(executor.submit(info_of, target).result() if executor else info_of(target))
    options = Options(seed, examples, text(model), str(folder), known=text(known), database=text(database))
    units = chosen(info, methods, ["model"] if model else levels, properties)
    units = [u for u in units if not model or find(u).fits(u.method, about(str(model)))][shard[0] - 1 :: shard[1]]
    knowledge.load(info, options.known)  # better to hear of a mistake in it now
    began, counts, seconds = time.perf_counter(), Counter[str](), dict.fromkeys(PARTS, 0.0)

    def emit(event: Event) -> Event:
        if progress:
            progress(event)
        return event

    yield emit(header(named(target), info, options, shard) | {"units": len(units)})
    for row in results(target, units, options, executor):
        counts[row["status"]] += 1
        seconds = {part: s + row[f"{part}_seconds"] for part, s in seconds.items()}
        yield emit(row)
    wall = time.perf_counter() - began
    ok = not any(counts[s] for s in ("fail", "error", "unexpected-pass"))
    rounded = {k: round(v, 3) for k, v in {**seconds, "wall": wall}.items()}
    yield emit({"type": "footer", "counts": dict(counts), "seconds": rounded, "ok": ok})


def text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def header(target: str, info: Mapping[str, Any], options: Options, shard: tuple[int, int]) -> Event:
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("numpy", "hypothesis")}
    return {
        "type": "header",
        "target": {**info, "spec": target},
        "spec_version": SPEC_VERSION,
        "seed": options.seed,
        "examples": options.examples,
        "model": options.model,
        "shard": list(shard),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions | dict(info.get("versions", {})),
    }


def chosen(
    info: Mapping[str, Any],
    methods: Sequence[str] | None,
    levels: Sequence[str] | None,
    properties: Sequence[str] | None,
) -> list[Unit]:
    """The units asked for; a name that does not exist is an error, not an empty run."""
    names = sorted({p.name for p in PROPERTIES})
    for what, given_, there in (
        ("method", methods, known()),
        ("level", levels, list(LEVELS)),
        ("property", properties, names),
    ):
        unknown = [name for name in given_ or () if name not in there]
        if unknown:
            raise ValueError(f"unknown {what} {unknown[0]!r}: there are {', '.join(there)}")
    return [
        Unit(method, p.level, p.name)
        for p in PROPERTIES
        for method in methods or known()
        if p.applies(method) and p.level in (levels or LEVELS) and p.name in (properties or names)
    ]


def results(
    target: str | Target, units: Sequence[Unit], options: Options, executor: Executor | None
) -> Iterator[Event]:
    if executor is None:
        for unit in units:
            yield run_unit(target, unit, options)
        return
    futures: list[Future[Event]] = [executor.submit(run_unit, target, unit, options) for unit in units]
    for future in as_completed(futures):
        yield future.result()


def here(target: str | Target) -> Target:
    """The target, or the one of this name."""
    return opened(target) if isinstance(target, str) else target


def info_of(target: str | Target) -> Mapping[str, Any]:
    return here(target).info()


def named(target: str | Target) -> str:
    return target if isinstance(target, str) else f"{type(target).__module__}:{type(target).__qualname__}"


@cache
def opened(target: str) -> Target:
    """One instance of a target in each process."""
    return open_target(target)


# ── one unit ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def find(unit: Unit) -> Property:
    return next(p for p in PROPERTIES if (p.level, p.name) == (unit.level, unit.property))


def declared(info: Mapping[str, Any], unit: Unit, prop: Property) -> bool:
    """Does the target say it can do what the property asks?"""
    able = unit.method in info["methods"] and unit.level in info["levels"] and set(prop.needs) <= set(info["features"])
    return able and not prop.structure(unit.method, info).is_empty


def run_unit(target: str | Target, unit: Unit, options: Options) -> Event:
    """The result of one property: known failures first, then drawn cases until one is wrong; that one made small."""
    prop, clock = find(unit), Clock()
    implementation = here(target)
    info = told(implementation, options, unit.method)
    clock.target = time.perf_counter() - clock.began
    row: Event = {
        "type": "result", **asdict(unit), "required": prop.required, "status": "undeclared", "examples": 0,
        "ratio": None, "limit": LIMIT[unit.level], "statement": prop.statement,
        "claims": list(prop.claims_of(unit.method)), "case": None,
        "replay": None, "kind": None, "detail": "", **dict.fromkeys([f"{part}_seconds" for part in PARTS], 0.0),
    }  # fmt: skip
    if not declared(info, unit, prop):
        return row
    entries = [e for e in knowledge.load(info, options.known) if e.concerns(unit.method, unit.level, unit.property)]
    stale = next((e for e in entries if not still_fails(implementation, e, clock)), None)
    if stale:
        row |= {
            "status": "unexpected-pass",
            "detail": f"known failure passes or fails otherwise: {stale.reason}",
            "case": str(stale.case),
        }
    else:
        row |= drawn(implementation, named(target), unit, prop, entries, options, clock)
    return row | clock.read()


def told(target: Target, options: Options, method: str) -> Mapping[str, Any]:
    """What the target declares for a method, and about the model that it is to be checked on, if one is given."""
    info = target.info()
    lacking = {*info.get("without", {}).get(method, ()), *TRAITS[method].lacks}
    features = [f for f in info["features"] if f not in lacking]
    ways = {name: values for name, values in info.get("settings", {}).items() if name not in lacking}
    model = {"model": about(options.model)} if options.model else {}
    return {**info, "features": features, "settings": ways, **model}


def still_fails(target: Target, entry: "knowledge.Entry", clock: Clock) -> bool:
    return examine(target, entry.read(), clock).verdict.kind == entry.kind


def drawn(
    target: Target,
    name: str,
    unit: Unit,
    prop: Property,
    entries: Sequence["knowledge.Entry"],
    options: Options,
    clock: Clock,
) -> Event:
    wrong: list[tuple[Case, Verdict]] = []
    tally, ratios, skips = Counter[str](), list[float](), [""]
    met: list[knowledge.Entry] = []
    info = told(target, options, unit.method)
    phases = [Phase.reuse, Phase.generate, *([Phase.shrink] if options.shrink else [])]

    def ask(structure: dict[str, Any]) -> None:
        case = prop.case(unit.method, structure, options.seed)
        outcome = examine(target, case, clock)
        verdict = outcome.verdict
        entry = next((e for e in entries if e.explains(case, verdict.kind)), None) if verdict.kind else None
        if outcome.skipped:
            skips.append(outcome.skipped)
        elif entry:
            met.append(entry)
        elif verdict.kind:
            wrong.append((case, verdict))
            raise Gone if verdict.kind in COSTLY else Wrong
        else:
            ratios.append(verdict.ratio or 0.0)
        tally["skip" if outcome.skipped else "known" if entry else "pass"] += 1

    @settings(
        max_examples=options.examples or (ON_REAL_WEIGHTS if options.model else EXAMPLES[unit.level]),
        database=remembered(options, unit), deadline=None, phases=phases,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False, verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    @given(prop.structure(unit.method, info))
    def each(structure: dict[str, Any]) -> None:
        ask(structure)

    if options.database is None:  # Hypothesis remembers nothing of what it draws from a seed
        each = hypothesis.seed(zlib.crc32(f"{options.seed} {unit}".encode()))(each)
    try:
        for structure in prop.corners(unit.method, info):
            ask(structure)
        each()
    except (Wrong, Gone, Flaky):
        case, verdict = wrong[-1]
        if prop.smaller and options.shrink and verdict.kind not in COSTLY:
            case, verdict = smallest(target, prop, case, verdict, entries, clock)
        return {**failure(name, case, verdict, options), "examples": sum(tally.values())}
    row: Event = {"examples": tally["pass"], "ratio": float(f"{max(ratios):.3g}") if ratios else None}
    if entry := next(iter([*met, *entries]), None):
        return row | {"status": "known", "detail": entry.reason, **stored(entry.case, name)}
    return row | ({"status": "pass"} if tally["pass"] else {"status": "skip", "detail": skips[-1]})


def remembered(options: Options, unit: Unit) -> ExampleDatabase | None:
    """What failed before of this unit; each has a folder of its own, since examples mean nothing to others."""
    if options.database is None:
        return None
    return DirectoryBasedExampleDatabase(Path(options.database) / f"{unit.method}-{unit.level}-{unit.property}")


def smallest(
    target: Target, prop: Property, case: Case, verdict: Verdict, entries: Sequence["knowledge.Entry"], clock: Clock
) -> tuple[Case, Verdict]:
    """The case made smaller as the property can, as long as it fails in the same way, and not in one that is known."""
    assert prop.smaller
    for structure in prop.smaller(case.method, case.meta["structure"]):
        trial = prop.case(case.method, structure, case.meta["seed"] - case.meta["structure"]["draw"])
        found = examine(target, trial, clock).verdict
        if found.kind == verdict.kind and not any(e.explains(trial, found.kind) for e in entries):
            return smallest(target, prop, trial, found, entries, clock)
    return case, verdict


def failure(name: str, case: Case, verdict: Verdict, options: Options) -> Event:
    m = case.meta
    error = bool(verdict.kind and verdict.kind.startswith("error"))
    row = {
        "status": "error" if error else "fail",
        "ratio": verdict.ratio,
        "kind": verdict.kind,
        "detail": verdict.detail,
    }
    if options.folder is None:
        return row
    short = re.sub(r"[^\w.]+", "-", name)[:40]
    path = Path(options.folder) / f"{short}-{m['method']}-{m['level']}-{m['property']}.safetensors"
    case.save(path)
    return {**row, **stored(path, name), **scripted(case, path, name)}


def scripted(case: Case, path: Path, target: str) -> Event:
    """A story is stored as a script, too, where one can be written for the target."""
    if case.level != "story" or not scripts.writable(case, target):
        return {}
    file = path.with_suffix(".py")
    file.write_text(scripts.script(case, target), encoding="utf-8")
    return {"script": str(file)}


def stored(path: Path, target: str) -> Event:
    """Where a case is, and the command that asks it again."""
    return {"case": str(path), "replay": shlex.join(["refpeft", "replay", str(path), target])}


# ── one case ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def examine(target: Target, case: Case, clock: Clock | None = None) -> Outcome:
    """Ask the target, ask the specification, compare. Anything the target raises is its answer."""
    clock = clock or Clock()
    began = time.perf_counter()
    try:
        got = {name: np.asarray(a) for name, a in target.run(case).items()}
    except Skip as skip:
        if "refuse" in case.meta:
            return Outcome(refusals.refused(case, str(skip)))
        return Outcome(Verdict(), str(skip) or "no reason given")
    except Exception as error:  # whatever a target throws is a finding
        text = " ".join(str(error).split())[:300]
        kind = getattr(error, "kind", type(error).__name__)
        if "refuse" in case.meta and f"error:{kind}" not in COSTLY:
            return Outcome(refusals.refused(case, text))
        return Outcome(Verdict(f"error:{kind}", None, f"{kind}: {text}"))
    finally:
        clock.target += time.perf_counter() - began
    began = time.perf_counter()
    try:
        return Outcome(Yardstick(settled(case, got)).judge(got))
    except (ValueError, TypeError):
        if "refuse" not in case.meta:
            raise
        return Outcome(refusals.accepted(case))  # the specification refuses it
    finally:
        clock.spec += time.perf_counter() - began


def replay(path: str | Path, target: str) -> Outcome:
    """One stored case again; of a golden vector the question."""
    return examine(opened(target), Case.read(path).question)
