"""Golden vectors: the stored ones are those that are made, each is answered, and no mutant passes all of its method."""

import filecmp
import json
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from refpeft.cli import app
from refpeft.conformance import build, engine, golden, tiny
from refpeft.conformance.case import EXPECT, Case
from refpeft.conformance.mutants import MUTANTS
from refpeft.conformance.numbers import normal
from refpeft.conformance.targets import Skip, open_target
from refpeft.conformance.targets.spec import Spec
from refpeft.conformance.traits import LORA, known

ROOT = Path(__file__).parents[2]
STORED = ROOT / "conformance" / "vectors"
ENTRIES = golden.read_index(STORED)
IDS = [e["id"] for e in ENTRIES]


@cache
def stored(id: str) -> Case:
    return Case.read(STORED / next(e["file"] for e in ENTRIES if e["id"] == id))


def of(method: str) -> list[Case]:
    return [stored(e["id"]) for e in ENTRIES if e["method"] == method]


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, ["vectors", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# ── what is stored ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_stored_vectors_are_those_that_are_made_now() -> None:
    found = list(golden.check(STORED))
    assert [f for f in found if f.status == "differs"] == []
    assert [f.id for f in found] == IDS


def test_they_are_small_and_about_a_dozen_for_every_method_in_both_regimes() -> None:
    assert sum(p.stat().st_size for p in STORED.rglob("*") if p.is_file()) < 5.5e6
    methods = Counter(e["method"] for e in ENTRIES)
    assert list(methods) == known()
    assert min(methods.values()) >= 12
    assert {(e["method"], e["regime"]) for e in ENTRIES} == {(m, r) for m in methods for r in ("exact", "float")}


def test_the_page_about_them_says_how_many_there_are() -> None:
    size = sum(p.stat().st_size for p in STORED.rglob("*") if p.is_file())
    page = " ".join((ROOT / "docs" / "vectors.md").read_text(encoding="utf-8").split())
    assert f"They are {len(IDS)} files of {size / 1e6:.1f} MB together." in page


def test_ids_files_and_bugs_are_told_apart() -> None:
    assert len(set(IDS)) == len(IDS)
    assert {e["file"] for e in ENTRIES} == {str(p.relative_to(STORED)) for p in STORED.glob("*/*")}
    for e in ENTRIES:
        assert stored(e["id"]).meta["id"] == e["id"]
        assert golden.entry(stored(e["id"])) == e


@pytest.mark.jsonschema
@pytest.mark.parametrize("name", ["case", "index"])
def test_what_they_say_is_what_the_schema_says(name: str) -> None:
    import jsonschema

    schema = json.loads((ROOT / "conformance" / "schema" / f"{name}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    index = json.loads((STORED / golden.INDEX).read_text())
    for value in [index] if name == "index" else [dict(stored(id).meta) for id in IDS]:
        validator.validate(value)
        for key in schema["required"]:
            assert not validator.is_valid({k: v for k, v in value.items() if k != key})
    assert name == "index" or not validator.is_valid({k: v for k, v in value.items() if k != "units"})


@pytest.mark.parametrize("method", known())
def test_the_specification_is_as_expected_and_exact_ones_do_not_depend_on_rounding(method: str) -> None:
    for case in of(method):
        assert golden.judge(case, Spec().run(case.question)).kind is None, case.meta["id"]
        if case.meta["regime"] == "exact":
            assert not case.meta["units"]
            wide = Spec().run(case.question.in_float64())
            assert all((wide[n] == a).all() for n, a in case.expected.items()), case.meta["id"]


DEAD = {  # by chance, whatever the mistake: the first two have a neighbour that is not, `product` and `exact-one`
    "lokr/layer/linear", "vera/model/exact-rank-one", "houlsby/model/gate", "houlsby/model/channel-scale-norm-after",
}  # fmt: skip


def test_none_is_dead() -> None:
    """An adapter that is zero, or a gradient, would forgive a wrong scale; it is where that is asked for."""
    dead = set()
    for id in IDS:
        case = stored(id)
        own = [a for n, a in case.arrays.items() if not n.startswith("model/") and a.dtype.kind == "f"]
        if case.meta["edge"] not in ("zeros", "empty-batch") and not all(a.any() for a in own):
            dead.add(id)
    assert dead == DEAD


def killed(name: str, method: str) -> str | None:
    """The first vector that finds the mutant out, by its answer and not because it broke down."""
    for case in sorted(of(method), key=lambda c: c.level != MUTANTS[name].first[0]):
        try:
            got = MUTANTS[name].run(case.question)
        except (KeyError, IndexError) as error:
            if str(error) == "empty batch":
                return str(case.meta["id"])
            continue
        if golden.judge(case, got).kind:
            return str(case.meta["id"])
    return None


LIVES = ("lifecycle", "story")  # of which there are no vectors


@pytest.mark.parametrize(
    "name", [name for name, m in MUTANTS.items() if m.first[0] not in LIVES and m.first[1] != "rejects"]
)
def test_every_mutant_of_a_method_is_found_by_one_of_its_vectors(name: str) -> None:
    for method in MUTANTS[name].methods:
        assert killed(name, method), method


@pytest.mark.parametrize(
    ("id", "change", "kind"),
    [
        ("lora/layer/linear", lambda y: y, None),
        ("lora/layer/linear", lambda y: y + 1e-5 * (y == y.max()), "value"),
        ("lora/layer/linear", lambda y: y.astype(np.float64), "dtype"),
        ("lora/layer/rows", lambda y: y * (1 + 2.0**-23), None),
        ("lora/layer/rows", lambda y: y * np.float32(1 + 1e-5), "value"),
        ("lora/layer/rows", lambda y: y * np.nan, "value"),
        ("lora/layer/rows", lambda y: y[..., None], "shape"),
        ("lora/layer/disabled", lambda y: -y, "value"),
    ],
)
def test_verdicts(id: str, change: Any, kind: str | None) -> None:
    case = stored(id)
    name = next(iter(case.expected))
    got = {**case.expected, name: change(case.expected[name])}
    if kind != "dtype":
        got[name] = got[name].astype(case.expected[name].dtype)
    assert golden.judge(case, got).kind == kind
    assert golden.judge(case, {}).kind == golden.judge(case, {**got, "more": got[name]}).kind == "names"


def test_a_vector_is_a_case_that_can_be_replayed() -> None:
    path = STORED / "dora" / "layer-conv1d.safetensors"
    assert engine.replay(path, "spec").verdict.kind is None
    assert engine.replay(path, "mutant:alpha-ignored").verdict.kind == "value"


REFUSED = "because the base layer has no bias."
DIFFERS = {  # it will not merge a bias of B into a layer without one; the others are among its known failures
    **{f"{m}/layer/bias-of-its-own": REFUSED for m in ("lora", "rslora")},
    **{f"{m}/model/tied-{which}": "value" for m in LORA for which in ("head", "embedding")},
    "dora/layer/zero-row": "value",
    "ia3/layer/unmerged": "value",
    "loha/layer/float64": "value",
    "loha/layer/cores": "value",
    **{f"oft/{name}": "value" for name in ("layer/exact", "layer/exact-square", "model/two")},
    **{f"trainable_tokens/model/{name}": "value" for name in ("bert", "padding", "t5-untied")},
}


@pytest.mark.peft
def test_hf_peft_agrees_but_for_what_is_known_of_it() -> None:
    """An oracle of the answers: what it declares is asked, but for prefixes, of which it has two of ours in one."""
    target, differs, asked = open_target("peft"), {}, 0
    for method in [m for m in target.info()["methods"] if m not in ("prefix_tuning", "p_tuning_v2")]:
        info = engine.told(target, engine.Options(), method)
        for question, case in zip(golden.chosen(method), of(method), strict=True):
            units = {p: engine.Unit(method, case.level, p) for p in question.properties}
            if not all(engine.declared(info, unit, golden.found(case.level, p)) for p, unit in units.items()):
                continue
            try:
                kind = golden.judge(case, target.run(case.question)).kind
            except Skip:
                continue
            except RuntimeError as error:
                kind = str(error)[-len(REFUSED) :]
            asked += 1
            if kind:
                differs[case.meta["id"]] = kind
    assert differs == DIFFERS
    assert asked > 100


# ── made again ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["lora", "did", "p_tuning"])
def test_made_twice_they_are_the_same_byte_for_byte(method: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run(str(tmp_path / name), "-m", method).exit_code == 0
    files = [str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*") if p.is_file()]
    same, _, _ = filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", files, shallow=False)
    assert sorted(same) == sorted(files)
    result = run(str(tmp_path / "one"), "-m", method, "--check")
    n = len(files) - 1
    assert (result.exit_code, result.stdout) == (0, f"{n} vectors: {n} the same byte for byte.\n")


@pytest.mark.parametrize("method", ["lora", "bitfit", "did"])
def test_questions_do_not_depend_on_the_last_bit_of_what_is_drawn(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another C library may round log and exp otherwise, which normal numbers are made with."""

    def other(*of: Any) -> Any:
        return np.nextafter(normal(*of), np.inf)

    for module in (build, tiny):
        monkeypatch.setattr(module, "normal", other)
    there = {e["id"]: e["question"] for e in ENTRIES}
    for question in golden.chosen(method):
        case = question.of(method)
        assert golden.digest(case) == there[case.meta["id"]], case.meta["id"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Those of rsLoRA, to be damaged."""
    shutil.copytree(STORED / "rslora", tmp_path / "v" / "rslora")
    mine = [e for e in ENTRIES if e["method"] == "rslora"]
    (tmp_path / "v" / golden.INDEX).write_text(golden.index_text(mine), encoding="utf-8")
    return tmp_path / "v"


def checked(folder: Path) -> Result:
    return run(str(folder), "--check", "-m", "rslora")


def change(folder: Path, name: str, array: str, f: Any, **fields: Any) -> None:
    path = folder / "rslora" / f"layer-{name}.safetensors"
    case = Case.read(path)
    Case({**case.meta, **fields}, {n: f(a) if n == array else a for n, a in case.arrays.items()}).save(path)


def next_up(a: Any) -> Any:
    return np.nextafter(a, np.float32(np.inf))


def test_answers_that_differ_by_rounding_are_counted(folder: Path) -> None:
    change(folder, "rows", EXPECT + "y", next_up)
    result = checked(folder)
    assert result.exit_code == 0
    assert "32 the same byte for byte, 1 with answers that differ by rounding (" in result.stdout


@pytest.mark.parametrize(
    ("name", "array", "f", "fields", "said"),
    [
        ("linear", EXPECT + "y", next_up, {}, "answers something else: y: 1"),
        ("rows", EXPECT + "y", lambda a: a * 1.001, {}, "answers something else: y: off by"),
        ("rows", "W", next_up, {}, "the file asks something else than the index says"),
        ("rows", "", None, {"units": {"y": 1.0, "y_row": 1.0}}, "its field 'units' is another one in the file"),
        ("rows", "", None, {"limit": 1e9}, "its field 'limit' is another one in the file"),
        ("rows", "", None, {"hunts": "Nothing."}, "its field 'hunts' is another one in the file"),
        ("rows", "", None, {"want": ["output"]}, "the file asks something else than the index says"),
    ],
)
def test_a_vector_that_was_changed_is_found(
    name: str, array: str, f: Any, fields: dict[str, Any], said: str, folder: Path
) -> None:
    change(folder, name, array, f, **fields)
    result = checked(folder)
    assert result.exit_code == 1
    assert f"✗ rslora/layer/{name}: " in result.stdout
    assert said in result.stdout
    assert result.stdout.splitlines()[-1] == "33 vectors: 32 the same byte for byte, 1 that differ."


def edited(folder: Path, edit: Any) -> None:
    entries = golden.read_index(folder)
    edit(entries)
    (folder / golden.INDEX).write_text(golden.index_text(entries), encoding="utf-8")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda e: e.pop(0), "✗ rslora/layer/linear: it is not in index.json"),
        (
            lambda e: e.append({**e[0], "id": "rslora/layer/old"}),
            "✗ rslora/layer/old: it is in the folder, and no longer",
        ),
        (lambda e: e.append({**e[0], "id": "loar/layer/x", "method": "loar"}), "✗ loar/layer/x: it is in the folder"),
        (lambda e: e[0].update(question="0" * 64), "it asks something else now, but an id keeps its meaning"),
        (lambda e: e[0].update(hunts="Nothing."), "index.json says something else of it"),
    ],
)
def test_an_index_that_was_changed_is_found(
    edit: Any, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "known", lambda: ["rslora"])
    edited(folder, edit)
    result = run(str(folder), "--check")
    assert result.exit_code == 1
    assert said in result.stdout


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.unlink(), "there is no file rslora/layer-rows.safetensors"),
        (lambda p: p.write_bytes(b"junk"), "expected a safetensors file, found something else"),
        (lambda p: shutil.copy(p, p.with_name("layer-more.safetensors")), "the file is not in index.json"),
        (lambda p: shutil.copy(p.with_name("layer-linear.safetensors"), p), "asks something else than the index says"),
    ],
)
def test_files_that_are_damaged_are_found(damage: Any, said: str, folder: Path) -> None:
    damage(folder / "rslora" / "layer-rows.safetensors")
    result = checked(folder)
    assert result.exit_code == 1
    assert said in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["v"], "exists already, and nothing is overwritten"),
        (["nowhere/v"], "does not exist"),
        (["new", "-m", "loar"], "unknown method 'loar': there are lora, "),
        (["nowhere", "--check"], "nowhere: no such folder"),
        (["v/rslora", "--check"], "there is no index.json"),
    ],
)
def test_what_cannot_run_is_said_in_a_sentence(
    words: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"format": "refpeft vectors"}', "expected an index of refpeft vectors"),
        ('{"format": "other", "vectors": []}', "expected an index of refpeft vectors"),
        ('{"format": "refpeft vectors", "vectors": [{"id": "x"}]}', "every vector needs id, file, method and question"),
        (
            '{"format": "refpeft vectors", "vectors": ['
            + ", ".join(['{"id": "x", "file": "x", "method": "x", "question": "x"}'] * 2)
            + "]}",
            "the id 'x' occurs twice",
        ),
        (
            '{"format": "refpeft vectors", "vectors": [{"id": "x", "file": "../x", "method": "x", "question": "x"}]}',
            "is not a file within the folder",
        ),
    ],
)
def test_what_is_no_index_is_said_in_a_sentence(text: str, said: str, folder: Path) -> None:
    (folder / golden.INDEX).write_text(text)
    result = checked(folder)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
