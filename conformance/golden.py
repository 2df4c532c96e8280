"""Golden vectors: cases with the answers in them, a file for each. What they are for: docs/vectors.md.

A vector is a case (`case.py`) that also holds, under `expect/<name>`, what the specification answers, and in its
metadata the kind of bug that it hunts, and how far another answer may be off. Which questions are asked is chosen in
`golden_layers` and its neighbours; nothing is computed here but by the specification.

    exact   answers must be equal as numbers
    float   ‖got − expect‖ ≤ limit · unit, with expect = ref in the dtype of the answer and unit = max(dither, u ‖ref‖)
            as in `yardstick`, rounded up to a power of two; answers without a unit must be equal as numbers

Of a model's gradients the unit is at least u times the largest of them: some are sums that cancel (that of a bias of
keys is zero) and are left with the rounding of others. What the specification answers in the case's own dtype, which
the yardstick counts as well, is left out, since its rounding depends on the machine; units do not.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from refpeft import SPEC_VERSION
from refpeft.checkpoint import folder as folders
from refpeft.checkpoint.safetensors import Malformed, parse_json
from refpeft.conformance.case import EXPECT, Case, is_float
from refpeft.conformance.numbers import integers
from refpeft.conformance.properties import PROPERTIES, Property
from refpeft.conformance.traits import known
from refpeft.conformance.yardstick import LIMIT, SAME, Verdict, Yardstick, distance, norm, unit, wrong
from refpeft.ops import Array

INDEX = "index.json"
BITS = 12  # of the significand of numbers that are drawn, so that no platform's last bit of log or exp is in them
ABOUT = ("spec_version", "claims", "hunts")  # said of a question, and no part of it
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What is asked, and the kind of bug that it hunts. `wants`: of what the properties ask, only these."""

    name: str
    hunts: str
    level: str
    properties: Sequence[str]
    structure: Mapping[str, Any]
    wants: Sequence[str] | None = None

    def of(self, method: str) -> Case:
        """All that its properties ask, of the same numbers."""
        id = f"{method}/{self.level}/{self.name}"
        seed = zlib.crc32(id.encode()) % 2**31  # so that no vector's numbers depend on which others there are
        cases = [found(self.level, name).case(method, dict(self.structure), seed) for name in self.properties]
        meta = {k: v for k, v in cases[0].meta.items() if k != "structure"}
        asked = dict.fromkeys(w for c in cases for w in c.meta["want"] if self.wants is None or w in self.wants)
        claims = dict.fromkeys(label for c in cases for label in c.meta["claims"])
        meta |= {"id": id, "property": self.name, "want": list(asked), "claims": list(claims), "hunts": self.hunts}
        return numbered(Case(meta, {n: a for c in cases for n, a in c.arrays.items()}))


def found(level: str, name: str) -> Property:
    return next(p for p in PROPERTIES if (p.level, p.name) == (level, name))


def numbered(case: Case) -> Case:
    """Floats of BITS bits; where a model's answers must be exact, small integers."""
    if case.meta["regime"] == "float":
        return case.map(lambda name, a: short(a.astype(np.float64)).astype(a.dtype))
    if case.level == "layer":
        return case
    first = {
        a.tobytes(): name for name, a in reversed(list(case.arrays.items()))
    }  # what is stored twice must stay the same
    return case.map(lambda _, a: integers(case.meta["seed"], first[a.tobytes()], a.shape, -3, 3).astype(a.dtype))


def short(a: Array) -> Array:
    """a, rounded to BITS bits of its significand."""
    m, e = np.frexp(a)
    return np.asarray(np.ldexp(np.rint(m * 2**BITS), e - BITS))


def chosen(method: str) -> Sequence[Question]:
    from refpeft.conformance import golden_layers, golden_models, golden_products, golden_stacks

    tables = (golden_layers, golden_models, golden_products, golden_stacks)
    return [question for table in tables for question in table.questions(method)]


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def answered(case: Case) -> Case:
    """The case with the specification's answers in it, and how far others may be off."""
    y = Yardstick(case)
    expect = {n: a if y.exact or not is_float(a) else y.ref[n].astype(a.dtype) for n, a in y.spec.items()}
    units = {} if y.exact else spreads(case)
    meta = {**case.meta, "limit": LIMIT[case.level], "units": {n: u for n, u in sorted(units.items()) if u}}
    return Case(meta, {**case.arrays, **{EXPECT + n: a for n, a in expect.items()}})


def spreads(case: Case) -> dict[str, float]:
    """The unit of each array. A float64 is moved by as little as a float32, and what comes of it is scaled: moved by
    half a unit in its own last place, nothing could be seen in float64 but rounding."""
    y = Yardstick(case.map(lambda name, a: a.astype(np.float32) if a.dtype == np.float64 else a))
    scale = unit(np.zeros(0)) / unit(np.zeros(0, np.float32)) if case.meta["dtype"] == "float64" else 1.0
    return {n: scale * spread(y, n) for n, a in y.spec.items() if is_float(a)}


def spread(y: Yardstick, name: str) -> float:
    ref, u = y.ref[name], unit(y.spec[name])
    beside = [a for n, a in y.ref.items() if n.startswith("grad/")] if name.startswith("grad/") else []
    own = max(u * max(map(norm, [ref, *beside])), *(distance(d[name], ref) for d in y.dithered))
    m, e = math.frexp(own)
    return math.ldexp(1.0, e - (m == 0.5)) if own else 0.0


def judge(case: Case, got: Mapping[str, Array]) -> Verdict:
    """Is `got` all that is expected, and near enough?"""
    expect = case.expected
    if names := sorted(expect.keys() ^ got.keys()):
        return Verdict("names", None, f"{names[0]} is {'missing' if names[0] in expect else 'not expected'}")
    worst = SAME
    for name, e in expect.items():
        verdict = compare(case, name, np.asarray(got[name]), e)
        if verdict.kind:
            return verdict
        worst = max(worst, verdict, key=lambda v: v.ratio or 0.0)
    return worst


def compare(case: Case, name: str, got: Array, e: Array) -> Verdict:
    if got.shape != e.shape:
        return Verdict("shape", None, f"{name}: expected shape {list(e.shape)}, found {list(got.shape)}")
    if is_float(e) and got.dtype != e.dtype:
        return Verdict("dtype", None, f"{name}: expected {e.dtype}, found {got.dtype}")
    if name not in case.meta["units"]:
        n = int((got != e).sum())
        return wrong(f"{name}: {n} of {e.size} entries differ") if n else SAME
    ratio = distance(got, e.astype(np.float64)) / case.meta["units"][name]
    if ratio > case.meta["limit"]:
        return wrong(f"{name}: off by {ratio:.3g} units, at most {case.meta['limit']:g} are rounding", ratio)
    return Verdict(None, ratio)


# ── a folder of them ─────────────────────────────────────────────────────────────────────────────────────────────────


def vectors(methods: Sequence[str]) -> Iterator[Case]:
    for method in methods:
        for question in chosen(method):
            yield answered(question.of(method))


def file_of(case: Case) -> str:
    """A file for each, in a folder for each method."""
    return f"{case.method}/{case.level}-{case.meta['property']}.safetensors"


def entry(case: Case) -> dict[str, Any]:
    """What the index says of a vector. `question` is a digest of all that is asked, and of nothing that is answered."""
    fields = ("method", "level", "regime", "dtype", "want", "claims", "hunts")
    return {
        "id": case.meta["id"], "file": file_of(case), **{f: case.meta[f] for f in fields}, "question": digest(case),
    }  # fmt: skip


def digest(case: Case) -> str:
    q = case.question
    meta = {k: v for k, v in q.meta.items() if k not in ABOUT}
    h = hashlib.sha256(json.dumps(meta, sort_keys=True, ensure_ascii=False).encode())
    for name, a in sorted(q.arrays.items()):
        h.update(f"\n{name} {a.dtype.name} {list(a.shape)}\n".encode() + little(a))
    return h.hexdigest()


def little(a: Array) -> bytes:
    """The bytes of an array as a file has them."""
    return np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<")) if a.dtype.kind in "iuf" else a).tobytes()


def write(into: Path, methods: Sequence[str], progress: Progress = lambda id: None) -> int:
    """A folder of vectors and their index, whole or not at all; how many there are."""
    with folders.new_folder(into) as new:
        return fill(new, methods, progress)


def fill(new: Path, methods: Sequence[str], progress: Progress) -> int:
    entries = []
    for case in vectors(methods):
        case.save(new / file_of(case))
        entries.append(entry(case))
        progress(case.meta["id"])
    (new / INDEX).write_text(index_text(entries), encoding="utf-8")
    return len(entries)


def index_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """A line for each vector, so that a change shows as one."""
    lines = ",\n    ".join(json.dumps(e, ensure_ascii=False) for e in entries)
    head = f'"format": "refpeft vectors",\n  "spec_version": "{SPEC_VERSION}"'
    return f'{{\n  {head},\n  "vectors": [\n    {lines}\n  ]\n}}\n'


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's index."""
    path = folders.existing(folder) / INDEX
    if not path.is_file():
        raise Malformed(f"{folder}: there is no {INDEX}")
    found = parse_json(path.read_bytes(), INDEX)
    entries = found.get("vectors")
    if found.get("format") != "refpeft vectors" or not isinstance(entries, list):
        raise Malformed(f"{path}: expected an index of refpeft vectors, found something else")
    for e in entries:
        if not (isinstance(e, dict) and all(isinstance(e.get(k), str) for k in ("id", "file", "method", "question"))):
            raise Malformed(f"{path}: every vector needs id, file, method and question, found {str(e)[:80]}")
        if Path(e["file"]).is_absolute() or ".." in Path(e["file"]).parts:
            raise Malformed(f"{path}: {e['file']!r} is not a file within the folder")
    ids = [e["id"] for e in entries]
    if twice := [id for id in ids if ids.count(id) > 1]:
        raise Malformed(f"{path}: the id {twice[0]!r} occurs twice")
    return entries


# ── is a folder what is made now? ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Checked:
    """One vector: 'same' bytes; 'rounding', where only expectations differ, by so many units; or 'differs', and how."""

    id: str
    status: str
    units: float = 0.0
    detail: str = ""


def check(folder: Path, only: Sequence[str] = (), progress: Progress = lambda id: None) -> Iterator[Checked]:
    """Every vector (of some methods) made again and compared: those that are the same, and those that are not."""
    entries = {e["id"]: e for e in read_index(folder) if not only or e["method"] in only}
    methods = only or known()
    made = set()
    with TemporaryDirectory() as scratch:
        for case in vectors(methods):
            id = case.meta["id"]
            made.add(id)
            case.save(Path(scratch) / file_of(case))
            yield again(case, entries.get(id), folder, Path(scratch))
            progress(id)
    for id in sorted(entries.keys() - made):
        yield Checked(id, "differs", detail="it is in the folder, and no longer made: an id is never taken away")
    there = {str(p.relative_to(folder)) for p in folder.glob("*/*") if not only or p.parent.name in only}
    for file in sorted(there - {e["file"] for e in entries.values()}):
        yield Checked(file, "differs", detail=f"the file is not in {INDEX}")


def again(case: Case, listed: Mapping[str, Any] | None, folder: Path, scratch: Path) -> Checked:
    id, file = case.meta["id"], file_of(case)
    if listed is None:
        return Checked(id, "differs", detail=f"it is not in {INDEX}")
    if listed["question"] != digest(case):
        return Checked(id, "differs", detail="it asks something else now, but an id keeps its meaning: take a new one")
    if dict(listed) != entry(case):
        return Checked(id, "differs", detail=f"{INDEX} says something else of it")
    if not (folder / file).is_file():
        return Checked(id, "differs", detail=f"there is no file {file}")
    if (folder / file).read_bytes() == (scratch / file).read_bytes():
        return Checked(id, "same")
    try:
        stored = Case.read(folder / file)
    except ValueError as error:
        return Checked(id, "differs", detail=str(error))
    return near(id, stored, case)


def near(id: str, stored: Case, made: Case) -> Checked:
    """The same question, and answers as near as any right ones: machines round otherwise."""
    if digest(stored) != digest(made):
        return Checked(id, "differs", detail="the file asks something else than the index says")
    if stored.meta != made.meta:
        field = next(k for k in {**made.meta, **stored.meta} if stored.meta.get(k) != made.meta.get(k))
        return Checked(id, "differs", detail=f"its field {field!r} is another one in the file")
    verdict = judge(stored, made.expected)
    if verdict.kind:
        return Checked(id, "differs", detail=f"the specification now answers something else: {verdict.detail}")
    return Checked(id, "rounding", verdict.ratio or 0.0)
