"""Golden vectors, read by programs in other languages: they agree, fail where their formulae are broken, and say what
they left out."""

import json
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from refpeft.conformance import golden
from refpeft.conformance.case import EXPECT, Case
from refpeft.conformance.traits import LORA

ROOT = Path(__file__).parents[2]
STORED = ROOT / "conformance" / "vectors"
EXAMPLES = ROOT / "examples" / "vectors"
ENTRIES = golden.read_index(STORED)
ASKED = {"output", "first_row", "grads", "merged", "changed"}
METHODS = {"node": (*LORA, "ia3"), "cc": (*LORA, "ia3"), "rustc": ("lora", "rslora", "loha", "lokr")}
READERS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in METHODS]
Command = Callable[[str], Sequence[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command of one of the examples, compiled once."""

    @cache
    def command(language: str) -> list[str]:
        if language == "node":
            return ["node", str(EXAMPLES / "check.mjs")]
        made = str(tmp_path_factory.mktemp(language) / "check")
        cc = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", str(EXAMPLES / "check.c"), "-lm"]
        rustc = ["--edition", "2021", "-D", "warnings", str(EXAMPLES / "check.rs")]
        subprocess.run([language, *(cc if language == "cc" else rustc), "-o", made], check=True)
        return [made]

    return command


def verdicts(program: Command, language: str, *words: str) -> tuple[int, dict[str, str], str]:
    """Exit code, id → verdict from the table, and what is said last."""
    done = subprocess.run([*program(language), *words], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines[1:-1]]
    return done.returncode, {row[0]: row[3] for row in rows}, lines[-1] if lines else done.stderr


CORES = "loha/layer/cores"  # between factors, which no reader has


def of_layers(language: str) -> dict[str, set[str]]:
    """What is asked by the vectors of layers, of the methods that are written in it."""
    known = METHODS[language]
    return {e["id"]: set(e["want"]) for e in ENTRIES if e["method"] in known and e["level"] == "layer"}


@pytest.mark.parametrize("language", READERS)
def test_another_language_reads_them_and_agrees(language: str, program: Command) -> None:
    code, said, _ = verdicts(program, language, str(STORED))
    mine = [id for id, want in of_layers(language).items() if want <= ASKED and id != CORES]
    assert said == dict.fromkeys(mine, "ok")
    assert len(mine) == {"node": 73, "cc": 73, "rustc": 61}[language]
    assert code == 0


@pytest.mark.parametrize("language", READERS)
def test_another_language_says_what_it_leaves_out(language: str, program: Command) -> None:
    _, said, last = verdicts(program, language, str(STORED))
    left = [id for id, want in of_layers(language).items() if not want <= ASKED or id == CORES]
    assert {id.rpartition("/")[2] for id in left} - {"cores"} == {"trained", "unmerged", "unloaded", "disabled"}
    assert last == (
        f"{len(said)} of {len(ENTRIES)} vectors are of layers and methods that are written here, "
        f"{len(left)} more ask of them what is not; 0 of them are wrong."
    )


SQUARE = {f"{m}/layer/{kind}-square" for m in ("lora", "rslora") for kind in ("linear", "conv1d", "embedding")}
FINDS = [
    (("node", "cc"), "scale", {"lora/layer/linear", "rslora/layer/float64", "dora/layer/magnitude", "ia3/layer/linear"},
     "lora/layer/rank-one"),
    (("node", "cc"), "gradient", {"lora/layer/conv1d", "rslora/layer/bias", "dora/layer/linear", "ia3/layer/linear"},
     "ia3/layer/linear-takes"),
    (("node", "cc"), "merge", SQUARE | {f"dora/layer/{kind}-square" for kind in ("linear", "conv1d", "embedding")},
     "lora/layer/linear"),
    (("node", "cc"), "norm", {"dora/layer/linear-square", "dora/layer/zero-row"}, "rslora/layer/linear"),
    (("rustc",), "scale", {"lora/layer/linear", "rslora/layer/float64", "loha/layer/conv1d", "lokr/layer/full"},
     "lokr/layer/product"),
    (("rustc",), "gradient", {"lora/layer/bias", "loha/layer/linear", "lokr/layer/product", "lokr/layer/both"},
     "lokr/layer/rows"),
    (("rustc",), "merge", SQUARE | {"loha/layer/linear-square", "lokr/layer/linear-square"}, "lokr/layer/product"),
    (("rustc",), "factors", {"loha/layer/rank-one", "lokr/layer/conv1d", "lokr/layer/product"}, "lokr/layer/primes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("language", "wrong", "finds", "passes"),
    [
        pytest.param(language, *rest, marks=getattr(pytest.mark, language))
        for languages, *rest in FINDS
        for language in languages
    ],
)
def test_another_language_fails_when_its_formula_is_broken(
    language: str, wrong: str, finds: set[str], passes: str, program: Command
) -> None:
    code, said, _ = verdicts(program, language, str(STORED), "--wrong", wrong)
    assert code == 1
    assert {said[id] for id in finds} == {"WRONG:"}
    assert said[passes] == "ok"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Those of rsLoRA, of which one expects another answer than was stored."""
    entries = [e for e in ENTRIES if e["method"] == "rslora"]
    for e in entries:
        Case.read(STORED / e["file"]).save(tmp_path / e["file"])
    path = tmp_path / "rslora" / "layer-linear.safetensors"
    case = Case.read(path)
    name = EXPECT + "dB"
    Case(case.meta, {**case.arrays, name: np.nextafter(case.arrays[name], np.float32(np.inf))}).save(path)
    (tmp_path / golden.INDEX).write_text(golden.index_text(entries), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("language", READERS)
def test_another_language_finds_an_answer_that_was_changed(language: str, program: Command, folder: Path) -> None:
    code, said, _ = verdicts(program, language, str(folder))
    assert code == 1
    assert [id for id, verdict in said.items() if verdict != "ok"] == ["rslora/layer/linear"]


def long(path: Path) -> bytes:
    return (2**63).to_bytes(8, "little") + path.read_bytes()[8:]


def elsewhere(path: Path) -> bytes:
    """An array that ends behind the file."""
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    header["W"]["data_offsets"] = [len(whole), len(whole) + 4 * int(np.prod(header["W"]["shape"]))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + n :]


@pytest.mark.parametrize("language", READERS)
@pytest.mark.parametrize("damage", [lambda path: b"junk", lambda path: b"", long, elsewhere])
def test_another_language_says_when_a_file_is_none(
    damage: Callable[[Path], bytes], language: str, program: Command, folder: Path
) -> None:
    path = folder / "rslora" / "layer-rows.safetensors"
    path.write_bytes(damage(path))
    assert verdicts(program, language, str(folder))[0] == 2


@pytest.mark.parametrize("language", READERS)
def test_another_language_says_when_it_cannot_run(language: str, program: Command, folder: Path) -> None:
    assert verdicts(program, language, str(folder / "nowhere"))[0] == 2
    assert verdicts(program, language, str(folder), "--wrong", "everything")[0] == 2
    (folder / golden.INDEX).write_text('{"vectors": [', encoding="utf-8")
    assert verdicts(program, language, str(folder))[0] == 2
