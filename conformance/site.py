"""Reports of several implementations, or of several of their versions, joined: who is right about which method.

A run is a report, or the shards of one. Runs of one implementation, oldest first, are its history; the newest is what
counts. A cell is a method of an implementation: for each level the worst of what was found there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refpeft.conformance.report import COLUMNS, LEVELS, STATUSES, WORST, Event, Report, join, rank, read, shard, unique


@dataclass(frozen=True)
class Cell:
    """What a run says of a method."""

    report: Report
    results: Sequence[Event]

    @cached_property
    def levels(self) -> Mapping[str, Sequence[Event]]:
        """The statements that were asked, by level."""
        asked = [result for result in self.results if result["status"] != "undeclared"]
        return {level: own for level in LEVELS if (own := [r for r in asked if r["level"] == level])}

    def worst(self, level: str) -> str:
        """Of a level the worst status, or 'undeclared'."""
        return min((r["status"] for r in self.levels.get(level, ())), key=WORST.index, default="undeclared")

    def near(self, level: str) -> float:
        """How near the limit the greatest ratio of a level is, from 0 to 1."""
        found = [r["ratio"] / r["limit"] for r in self.levels.get(level, ()) if r["ratio"] is not None and r["limit"]]
        return round(min(1.0, max(found, default=0.0)), 3)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        found = Counter(r["status"] for own in self.levels.values() for r in own)
        return {status: found[status] for status in STATUSES if found[status]}

    @property
    def text(self) -> str:
        return ", ".join(f"{n} {status}" for status, n in self.counts.items()) or "not declared"


@dataclass(frozen=True)
class Implementation:
    """A target and its runs, oldest first."""

    name: str
    runs: Sequence[Report]

    @property
    def latest(self) -> Report:
        return self.runs[-1]

    @property
    def version(self) -> str:
        return str(self.latest.header["target"].get("version") or "")

    def cell(self, method: str, run: Report | None = None) -> Cell:
        run = run or self.latest
        return Cell(run, [result for result in run.results if result["method"] == method])

    def history(self, method: str) -> Iterator[tuple[Report, Cell]]:
        return ((run, self.cell(method, run)) for run in reversed(self.runs))


@dataclass(frozen=True)
class Site:
    implementations: Sequence[Implementation]

    @property
    def runs(self) -> Sequence[Report]:
        return [run for i in self.implementations for run in i.runs]

    @cached_property
    def methods(self) -> Sequence[str]:
        """Those that anyone declares, in the order of the specification's table."""
        there = [(m, i) for i in self.implementations for m in i.latest.methods() if i.cell(m).levels]
        return sorted({m for m, _ in there}, key=lambda m: rank(m, COLUMNS))

    @property
    def ok(self) -> bool:
        return all(i.latest.ok for i in self.implementations)

    @property
    def verdict(self) -> str:
        bad = [i.latest.target for i in self.implementations if not i.latest.ok]
        count = len(self.implementations)
        if not bad:
            return f"{count} implementations, all as expected."
        return f"{count} implementations, of which not as expected or incomplete: {', '.join(bad)}."

    @property
    def statements(self) -> Sequence[tuple[Implementation, Event]]:
        """All that was asked of the newest of each, what needs looking at first."""
        found = [(i, r) for i in self.implementations for r in i.latest.results if r["status"] != "undeclared"]
        return sorted(found, key=lambda pair: WORST.index(pair[1]["status"]))


def read_runs(paths: Sequence[Path]) -> list[Report]:
    """The runs in these files: whole reports, and shards joined; in the order in which they are given."""
    reports = [read(path) for path in paths]
    found: list[Report] = []
    for identity in unique(identify(report) for report in reports):
        own = [report for report in reports if identify(report) == identity]
        parts = [report for report in own if shard(report)[1] > 1]
        found += [report for report in own if shard(report)[1] == 1]
        found += [join(parts)] if parts else []
    return found


def identify(report: Report) -> str:
    target = report.header["target"]
    return f"{target['name']} {target.get('version')} {target.get('spec')}"


def gathered(runs: Sequence[Report]) -> Site:
    names = unique(str(run.header["target"]["name"]) for run in runs)
    of = {name: [run for run in runs if run.header["target"]["name"] == name] for name in names}
    return Site([Implementation(name, sorted(own, key=started)) for name, own in of.items()])


def started(run: Report) -> str:
    return str(run.header.get("started", ""))
