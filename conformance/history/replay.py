"""Makes an environment for each release, asks it one property, and compares the bad release with the fixed.

An environment holds the library alone. What runs beside it is installed once for all releases that ran with it, and
what this Python has is used where it fits: torch above all.
"""

import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from refpeft.conformance import engine
from refpeft.conformance.history.bugs import Bug
from refpeft.conformance.targets import libraries

SEEDS = (0, 1, 2)
WRONG = ("fail", "error")


@dataclass(frozen=True)
class Answer:
    """What one release said to the property: right, wrong, or not asked, and how."""

    status: str  # pass, fail, error: as in a report; absent: it could not be asked
    kind: str | None = None
    detail: str = ""
    seed: int | None = None  # that showed it

    def shows(self, bug: Bug) -> bool:
        """Is it wrong in the way of this bug?"""
        return self.status in WRONG and self.kind == bug.kind and re.search(bug.shows, self.detail) is not None


@dataclass(frozen=True)
class Result:
    bug: Bug
    bad: Answer
    fixed: Answer | None

    @property
    def verdict(self) -> str:
        """caught: the bad release fails, the fixed one passes; caught, not alone: the fixed one fails in another way.

        missed: the bad release does not fail, or not in this way; false alarm: the fixed one fails in this way too;
        unproven: the fixed one could not be asked.
        """
        if not self.bad.shows(self.bug):
            return "missed"
        if self.fixed is None or self.fixed.status == "pass":
            return "caught"
        if self.fixed.status not in WRONG:
            return "unproven"
        return "false alarm" if self.fixed.shows(self.bug) else "caught, not alone"

    @property
    def ok(self) -> bool:
        return self.verdict.startswith("caught")


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def history(
    bugs: Sequence[Bug],
    where: Path,
    seeds: Sequence[int] = SEEDS,
    run: libraries.Run | None = None,
    step: Callable[[str], None] = lambda said: None,
) -> Iterator[Result]:
    """One result for each bug, as it comes; environments are made in the folder `where`, and kept."""
    where.mkdir(parents=True, exist_ok=True)
    where = where.resolve()
    for bug in bugs:
        answers = []
        for release in [bug.bad, *([bug.fixed] if bug.fixed else [])]:
            step(f"{bug.name} in {bug.library} {release}")
            answers.append(asked(bug, environment(bug, release, where, run or pip), seeds, where))
        yield Result(bug, answers[0], answers[1] if bug.fixed else None)


def asked(bug: Bug, python: Path, seeds: Sequence[int], where: Path) -> Answer:
    """The property, seed after seed until one shows something wrong. What is known to fail counts as well."""
    none, cases = where / "known.json", where / "cases"
    none.write_text("[]\n", encoding="utf-8")
    target = libraries.served(bug.target, str(python))
    method, level, name = bug.place.split("/")
    answer = Answer("absent", None, "the release does not have what the property asks for")
    try:
        for seed in seeds:
            for row in engine.check(target, [method], [level], [name], seed=seed, known=none, folder=cases):
                if row["type"] == "result" and row["status"] != "undeclared":
                    answer = Answer(row["status"], row["kind"], row["detail"], seed)
            if answer.status != "pass":
                break
    except ValueError as error:  # it did not start
        return Answer("absent", None, str(error))
    engine.opened(target).close()
    return answer


# ── environments ─────────────────────────────────────────────────────────────────────────────────────────────────────


def environment(bug: Bug, release: str, where: Path, run: libraries.Run) -> Path:
    """The python of an environment with this release, made if it is not there."""
    beside, shared = bug.beside[release], [Path(sysconfig.get_path("purelib"))]
    others = made(where / "-".join(["beside", *map(plain, beside)]), [*libraries.SHARED, *beside], shared, run)
    home = where / "-".join([plain(f"{bug.library}-{release}"), *map(plain, beside[:1])])
    return made(home, ["--no-deps", f"{bug.library}=={release}"], [packages(others), *shared], run)


def pip(words: Sequence[str]) -> None:
    """Silent, for it complains of what it need not know: that this Python, which it sees, wants other versions."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise ValueError(f"{shlex.join(words[1:])}: exit code {done.returncode}: {said[-1]}")


def plain(requirement: str) -> str:
    """A requirement as a part of a folder's name."""
    return re.sub(r"[^\w.]+", "-", requirement)


def packages(python: Path) -> Path:
    return next(python.parents[1].glob("lib/python3*/site-packages"))


def made(home: Path, requires: Sequence[str], paths: Sequence[Path], run: libraries.Run) -> Path:
    """An environment with these packages, which also sees those in `paths`. One that is complete says so in a file."""
    complete, python = home / "complete.txt", home / "bin" / "python"
    lines = "".join(f"{r}\n" for r in (sys.version, *requires, *map(str, paths)))
    if not (complete.is_file() and complete.read_text(encoding="utf-8") == lines):
        build(home, requires, paths, run, lines)
    libraries.share(python)
    return python


def build(home: Path, requires: Sequence[str], paths: Sequence[Path], run: libraries.Run, lines: str) -> None:
    """Made beside its place and moved there, so that two that make the same one do not write into each other's: of a
    half-made environment, pip may take the Python it was made from for the one to install into."""
    with TemporaryDirectory(prefix=".", dir=home.parent) as folder:
        there = Path(folder) / home.name
        venv.create(there, symlinks=True)
        python = there / "bin" / "python"
        (packages(python) / "shared.pth").write_text("".join(f"{p}\n" for p in paths), encoding="utf-8")
        run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *requires])
        (there / "complete.txt").write_text(lines, encoding="utf-8")
        if home.exists():  # of other packages, or half made
            home.rename(Path(folder) / "old")
        there.rename(home)
