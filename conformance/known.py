"""Known failures: stored cases that a target is known to answer otherwise, and why. Checked both ways.

`known/<target>.json` holds a list of entries. A stored case that now passes, or fails in another way, is reported as an
unexpected pass; a drawn case that fails as an entry describes counts as known and the search for others goes on.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from refpeft.conformance.case import Case
from refpeft.conformance.properties import PROPERTIES
from refpeft.methods import METHODS

FOLDER = Path(__file__).parent / "known"
CLASSES = ("bug", "convention")


@dataclass(frozen=True)
class Entry:
    method: str
    level: str
    property: str
    kind: str  # as in a verdict: value, shape, dtype, names, error:Type, accepted, unclear
    case: Path
    reason: str
    cls: str  # bug: theirs, should be mended; convention: another choice that they document
    versions: str  # of the target, as in requirements: '>=0.13,<0.21'
    match: Mapping[str, Any]  # what else fails in this way: dotted names of the case's fields → a value, or several
    beside: Mapping[str, str]  # versions of other libraries with which it does

    def concerns(self, method: str, level: str, property: str) -> bool:
        return (self.method, self.level, self.property) == (method, level, property)

    def explains(self, case: Case, kind: str | None) -> bool:
        return kind == self.kind and all(fits(field(case.meta, name), value) for name, value in self.match.items())

    def read(self) -> Case:
        return Case.read(self.case)


def fits(found: Any, value: Any) -> bool:
    """The value itself, or one of a list of them."""
    return bool(found == value) or (isinstance(value, list) and found in value)


def field(meta: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        meta = meta.get(name) if isinstance(meta, Mapping) else None
    return meta


def load(info: Mapping[str, Any], path: str | Path | None = None) -> Sequence[Entry]:
    """The entries that apply to this version of the target, beside these versions of what it runs on."""
    file = Path(path) if path else FOLDER / f"{info['name']}.json"
    if not path and not file.is_file():
        return []
    there = {info["name"]: info.get("version", "0"), **info.get("versions", {})}
    return [
        e
        for e in parse(file)
        if all(within(there.get(name), asked) for name, asked in {info["name"]: e.versions, **e.beside}.items())
    ]


def within(version: Any, asked: str) -> bool:
    return version is not None and SpecifierSet(asked).contains(str(version), prereleases=True)


@cache
def parse(file: Path) -> Sequence[Entry]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    entries = []
    for n, raw in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        try:
            raw = {"versions": "", "match": {}, "beside": {}, **raw}
            entry = entry_of(raw, file)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: entry {n}: {error}") from None
        entries.append(entry)
    return entries


def entry_of(raw: Mapping[str, Any], file: Path) -> Entry:
    fields = {name: value for name, value in raw.items() if name not in ("class", "case")}
    if raw["class"] not in CLASSES:
        raise TypeError(f"class must be one of {CLASSES}, found {raw['class']!r}")
    place = (raw["method"], raw["level"], raw["property"])
    if not any(p.applies(place[0]) and (p.level, p.name) == place[1:] for p in PROPERTIES) or place[0] not in METHODS:
        raise TypeError(f"there is no property {'/'.join(place)}, so it matches nothing")
    return Entry(**fields, cls=raw["class"], case=file.parent / raw["case"])


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def update(file: Path, version: str, results: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Entries for what fails now, their cases in a folder of the file's name; none for what fails no longer.

    Returns how many came and went. The reason given is what was found, and the class "bug": someone
    has to look into it and write down what it is.
    """
    entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    gone = {str(row["case"]) for row in results if row["status"] == "unexpected-pass"}
    kept = [entry for entry in entries if str(file.parent / entry["case"]) not in gone]
    failed = [row for row in results if row["status"] in ("fail", "error")]
    for row in failed:
        place = {name: row[name] for name in ("method", "level", "property", "kind")}
        case = new_name(f"{file.stem}/{row['method']}-{row['level']}-{row['property']}", kept)
        (file.parent / case).parent.mkdir(parents=True, exist_ok=True)
        Case.read(row["case"]).save(file.parent / case)
        kept.append({**place, "class": "bug", "reason": row["detail"], "versions": f"=={version}", "case": case})
    for case in {entry["case"] for entry in entries} - {entry["case"] for entry in kept}:
        (file.parent / case).unlink(missing_ok=True)
    file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    parse.cache_clear()
    return len(failed), len(entries) + len(failed) - len(kept)


def new_name(stem: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """A name for a case that no entry has: one property can fail in several ways."""
    taken = {entry["case"] for entry in entries}
    numbered = (f"{stem}{'-' * (n > 1)}{n if n > 1 else ''}.safetensors" for n in itertools.count(1))
    return next(name for name in numbered if name not in taken)
