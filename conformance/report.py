"""A report: what a run of the suite found, as JSON lines, and what its views (terminal, JUnit, HTML, picture) need.

    {"type": "header", "target": {…}, "spec_version": …, "seed": …, "examples": …, "shard": [1, 1], …}
    {"type": "result", "method": "lora", "level": "layer", "property": "merge", "status": "pass", "ratio": 0.8, …}  ×n
    {"type": "footer", "counts": {…}, "seconds": {…}, "ok": true}

A file without its footer was cut off, and says so in every view. Shards of one run join into one report.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from refpeft.conformance.properties import PROPERTIES
from refpeft.methods import METHODS

Event = Mapping[str, Any]

LEVELS = ("layer", "model", "lifecycle", "story", "export")
# worst first; with the symbol of each in a matrix, and what it means
STATUSES: Mapping[str, tuple[str, str]] = {
    "error": ("!", "the target broke"),
    "fail": ("✗", "differs from the specification"),
    "unexpected-pass": ("u", "a known failure that no longer fails"),
    "known": ("k", "a known failure, as recorded"),
    "skip": ("·", "skipped by the target, so not shown to be right"),
    "undeclared": ("–", "not declared by the target"),
    "pass": ("✓", "as specified"),
}
WORST = tuple(STATUSES)


@dataclass(frozen=True)
class Report:
    """One run. `footer` is None where the run was cut off; `missing` names the shards that are not there."""

    header: Event
    results: Sequence[Event]
    footer: Event | None
    missing: Sequence[int] = ()

    @property
    def target(self) -> str:
        target = self.header["target"]
        return " ".join(str(part) for part in (target["name"], target.get("version")) if part)

    @property
    def complete(self) -> bool:
        return self.footer is not None and not self.missing

    @property
    def ok(self) -> bool:
        """Everything as expected, and something at all shown to be so."""
        return self.complete and bool(self.footer and self.footer["ok"]) and self.shown

    @property
    def shown(self) -> bool:
        """Was anything tried? Where all is skipped or undeclared, nothing was."""
        return any(result["status"] not in ("skip", "undeclared") for result in self.results)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        counts = Counter(result["status"] for result in self.results)
        return {status: counts[status] for status in STATUSES if counts[status]}

    @property
    def seconds(self) -> Mapping[str, float]:
        """Spent in the specification, in the target, and in the engine between them."""
        return {part: s for part, s in (self.footer or {}).get("seconds", {}).items() if part != "wall"}

    @property
    def wall(self) -> float:
        return float((self.footer or {}).get("seconds", {}).get("wall", sum(self.seconds.values())))

    @property
    def parallel(self) -> bool:
        """Did several processes work side by side? Then the parts add up to more than the clock on the wall."""
        return sum(self.seconds.values()) > 1.05 * self.wall

    @cached_property
    def levels(self) -> Sequence[str]:
        return unique(result["level"] for result in self.results)

    def methods(self, level: str | None = None) -> Sequence[str]:
        found = unique(result["method"] for result in self.results if level in (None, result["level"]))
        return sorted(found, key=lambda method: rank(method, COLUMNS))

    def properties(self, level: str) -> Sequence[str]:
        return unique(result["property"] for result in self.results if result["level"] == level)

    def row(self, level: str, name: str) -> Mapping[str, Event]:
        """A property at a level: method → result."""
        return {r["method"]: r for r in self.results if (r["level"], r["property"]) == (level, name)}

    @property
    def failures(self) -> Sequence[Event]:
        return [result for result in self.results if result["status"] in ("error", "fail", "unexpected-pass")]

    @property
    def verdict(self) -> str:
        """The last line of every view."""
        said = ", ".join(f"{n} {status}" for status, n in self.counts.items()) or "nothing was checked"
        if self.missing:
            shards = f"{', '.join(map(str, self.missing))} of {self.header['shard'][1]}"
            return f"Incomplete: shard {shards} is missing ({said})."
        if self.footer is None:
            return f"Incomplete: the run was cut off before its end ({said})."
        if not self.shown:
            return f"Nothing was shown to be right: {said}."
        return f"All as expected: {said}." if self.ok else f"Not as expected: {said}."


def key(result: Event) -> tuple[str, str, str]:
    return result["level"], result["method"], result["property"]


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


ROWS = [(p.level, p.name) for p in PROPERTIES]
COLUMNS = list(METHODS)


def in_order(results: Iterable[Event]) -> list[Event]:
    """As the tables of properties and of methods list them, whatever the order in which they came."""
    return sorted(results, key=lambda r: (
        rank(r["level"], LEVELS), rank((r["level"], r["property"]), ROWS), rank(r["method"], COLUMNS)
    ))  # fmt: skip


def rank(name: Any, known: Sequence[Any]) -> int:
    """What is not known comes last."""
    return known.index(name) if name in known else len(known)


# ── reading, writing, joining ────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def writer(path: Path | None) -> Iterator[Any]:
    """A function that appends one event to the file, at once, so that what is there survives a crash."""
    if path is None:
        yield lambda event: None
        return
    with path.open("w", encoding="utf-8") as file:
        yield lambda event: write(file, event)


def write(file: TextIO, event: Event) -> None:
    file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def build(events: Iterable[Event], name: str = "the report") -> Report:
    header: Event | None = None
    footer: Event | None = None
    results: list[Event] = []
    for event in events:
        kind = event.get("type")
        if kind == "header" and header is None:
            header = event
        elif header is None or kind not in ("result", "footer") or footer is not None:
            raise ValueError(f"{name}: expected one header, then results, then a footer; found {kind!r}")
        elif kind == "result":
            results.append(event)
        else:
            footer = event
    if header is None:
        raise ValueError(f"{name}: expected a header first, found nothing")
    return Report(header, in_order(results), footer)


def read(path: Path) -> Report:
    """The report in a file of JSON lines. A last line cut in the middle is dropped: the missing footer tells."""
    lines = path.read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) and number > 1:
                break
            raise ValueError(f"{path}: line {number}: expected a JSON object, found {line[:40]!r}") from None
        if not isinstance(event, dict):
            raise ValueError(f"{path}: line {number}: expected a JSON object, found {line[:40]!r}")
        events.append(event)
    return build(events, str(path))


SAME = ("target", "spec_version", "seed", "examples", "model")


def join(reports: Sequence[Report]) -> Report:
    first = reports[0]
    for other in reports[1:]:
        for field in SAME:
            a, b = first.header.get(field), other.header.get(field)
            if a != b:
                raise ValueError(
                    f"these are not reports of one run: {field} is {short(a)} in one, {short(b)} in another"
                )
    ordered, missing = by_shard(reports)
    merged = merge(result for report in ordered for result in report.results)
    return Report(first.header, merged, add_footers(report.footer for report in ordered), missing)


def by_shard(reports: Sequence[Report]) -> tuple[list[Report], list[int]]:
    """The reports in the order of their shards, and the numbers of the shards that are missing."""
    count = shard(reports[0])[1]
    found: dict[int, Report] = {}
    for report in reports:
        i, n = shard(report)
        if n != count:
            raise ValueError(f"these are not reports of one run: one has {count} shards, another {n}")
        if i in found:
            raise ValueError(f"shard {i} of {count} is given twice")
        found[i] = report
    return [found[i] for i in sorted(found)], [i for i in range(1, count + 1) if i not in found]


def shard(report: Report) -> tuple[int, int]:
    i, n = report.header.get("shard", (1, 1))
    return i, n


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


SUMMED = ("examples", "spec_seconds", "target_seconds", "engine_seconds")


def merge(results: Iterable[Event]) -> list[Event]:
    """One result per cell: the worst of its parts, with the examples of all and the greatest ratio."""
    cells: dict[tuple[str, str, str], Event] = {}
    for result in results:
        other = cells.get(key(result))
        if other is None:
            cells[key(result)] = result
            continue
        worst = min(other, result, key=lambda r: WORST.index(r["status"]))
        ratios = [r["ratio"] for r in (other, result) if r.get("ratio") is not None]
        sums = {name: other.get(name, 0) + result.get(name, 0) for name in SUMMED}
        cells[key(result)] = {**worst, **sums, "ratio": max(ratios, default=None)}
    return in_order(cells.values())


def add_footers(footers: Iterable[Event | None]) -> Event | None:
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    ok = True
    for footer in footers:
        if footer is None:
            return None
        counts.update(footer.get("counts", {}))
        for part, value in footer.get("seconds", {}).items():
            seconds[part] += value
        ok = ok and bool(footer["ok"])
    return {"type": "footer", "counts": dict(counts), "seconds": dict(seconds), "ok": ok}
