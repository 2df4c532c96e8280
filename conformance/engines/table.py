"""Every engine that is there, asked about every adapter; and the table of it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.conformance.engines import ENGINES, About, variants
from refpeft.conformance.engines.variants import VARIANTS
from refpeft.conformance.engines.verdict import Judge, Verdict, law
from refpeft.conformance.targets import libraries

SECONDS = 600  # for an engine to start and to answer
STARTS = 3  # of an engine that dies: once for each adapter on which it does, within reason
PAGE = """\
# One adapter folder, every engine

The same tiny LLaMA and the same adapters, as HF peft writes them, are given to every engine, each through its own
reader of such folders. Written by `refpeft engines --markdown docs/engines.md`, which anybody can run.

{legend}

{table}

{notes}
An answer is the law of the next token, after each token of a prompt. **right**: as `refpeft`'s in float64, and how far
off at most, where 1 is all that the adapter changes. **refused**: with an error, which is right where an engine has no
such thing. **wrong**: another answer, and no error; what it is, if it is a mistake that is known, the notes say.
"""


@dataclass(frozen=True)
class Row:
    engine: str
    version: str | None
    verdicts: Mapping[str, Verdict]


def rows(
    names: Sequence[str] | None = None, step: Callable[[str], None] = lambda said: None, folder: Path | None = None
) -> Iterator[Row]:
    """One for each engine, as it comes."""
    unknown = [name for name in names or () if name not in ENGINES]
    if unknown:
        raise ValueError(f"unknown engine {unknown[0]!r}: there are {', '.join(ENGINES)}")
    with tempfile.TemporaryDirectory() as made:
        where = folder or Path(made)
        where.mkdir(exist_ok=True)
        variants.write(where)
        np.save(where / "ids.npy", variants.prompt())
        base = variants.model()
        judge = Judge(base, variants.prompt())
        for name in names or ENGINES:
            step(name)
            yield row(name, where, judge)


def row(name: str, folder: Path, judge: Judge) -> Row:
    python, version = there(ENGINES[name])
    if version is None:
        return Row(name, None, {v: Verdict("not installed") for v in VARIANTS})
    why = ask(name, python, folder)
    found = {v: verdict(folder / "answers" / name, v, judge, why) for v in VARIANTS}
    if (plain := found["plain"]).verdict == "refused":  # then it is not the adapter that it cannot take
        found = dict.fromkeys(VARIANTS, Verdict("no answer", None, plain.detail))
    return Row(name, version, found)


def there(about: About) -> tuple[str, str | None]:
    """The python that has an engine, and its version."""
    if about.library is None:
        try:
            return sys.executable, metadata.version(about.package)
        except metadata.PackageNotFoundError:
            return sys.executable, None
    python = libraries.elsewhere(about.library)
    if libraries.version(about.library) is None:
        return sys.executable, None
    return python or sys.executable, libraries.EVERY[about.library].tried


def ask(name: str, python: str, folder: Path) -> str:
    """Start the engine, again where it died on an adapter. Why it said nothing, if it did not."""
    words = [python, "-m", "refpeft.conformance.engines", name, str(folder)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(STARTS):
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=quiet)
        except subprocess.TimeoutExpired:
            return f"no answer within {SECONDS} seconds"
        if done.returncode == 0:
            return ""
    said = done.stderr.strip().splitlines() or ["it ended without a word"]
    return said[-1]


def verdict(answers: Path, variant: str, judge: Judge, why: str) -> Verdict:
    npy, txt = answers / f"{variant}.npy", answers / f"{variant}.txt"
    if npy.is_file():
        return judge.verdict(variant, variants.adapter(variant, variants.model()), law(np.load(npy)))
    if txt.is_file():
        return Verdict("refused", None, txt.read_text(encoding="utf-8"))
    return Verdict("no answer", None, why)


# ── as JSON and as a page ────────────────────────────────────────────────────────────────────────────────────────────


def as_json(found: Row) -> dict[str, Any]:
    about = ENGINES[found.engine]
    return {
        "engine": found.engine, "about": about.what, "how": about.how.strip("`"), "version": found.version,
        "adapters": {name: asdict(v) for name, v in found.verdicts.items()},
    }  # fmt: skip


def cell(v: Verdict) -> str:
    words = {"right": "right", "refused": "refused", "silently wrong": "**wrong**", "not installed": "·"}
    said = words.get(v.verdict, "?")
    return f"{said} {v.off:.0e}" if v.off is not None else said


def markdown(found: Sequence[Row]) -> str:
    legend = "\n".join(f"* `{name}`: {v.about}" for name, v in VARIANTS.items())
    head = ["engine", *[f"`{name}`" for name in VARIANTS]]
    lines = [head, ["---"] * len(head)]
    notes = []
    for r in found:
        about = ENGINES[r.engine]
        lines.append([f"{about.what} {r.version or ''}".strip(), *[cell(r.verdicts[v]) for v in VARIANTS]])
        said = [f"  * `{n}`, {v.verdict}: {v.detail}" for n, v in r.verdicts.items() if v.detail]
        told = f" ({about.note})" if about.note else ""
        notes += [f"* **{about.what}**, by {about.how}{told}" + (":" if said else ""), *said]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return PAGE.format(legend=legend, table=table, notes="\n".join(notes) + "\n")
