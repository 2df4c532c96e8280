"""The engine on targets whose answers are known: the specification passes everything, wrong targets are found out."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.conformance import engine, known
from refpeft.conformance.case import Case
from refpeft.conformance.mutants import MUTANTS, hunt, target
from refpeft.conformance.properties import PROPERTIES
from refpeft.conformance.targets import FEATURES, Skip
from refpeft.conformance.targets.spec import Spec
from refpeft.conformance.traits import known as known_methods
from refpeft.conformance.yardstick import Yardstick
from tests.models import tiny


def rows(target: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    return [e for e in engine.check(target, folder=folder, **options) if e["type"] == "result"]


@pytest.mark.parametrize("level", engine.LEVELS)
def test_the_specification_passes_everything(level: str, tmp_path: Path) -> None:
    events = list(engine.check("spec", levels=[level], examples=2, folder=tmp_path))
    assert events[0]["type"] == "header"
    assert events[-1]["ok"]
    assert {e["status"] for e in events[1:-1]} == {"pass"}
    assert not list(tmp_path.iterdir())


RIGHTLY = ("value", "shape", "names", "dtype", "error:IndexError", "accepted", "unclear")


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_found_by_the_property_meant_for_it(name: str) -> None:
    kill = hunt(name, seed=5)
    assert kill.by is not None
    assert kill.by.endswith("/".join(MUTANTS[name].first))
    assert kill.kind in RIGHTLY, "an accident of the mutant"


def test_a_failure_leaves_a_small_case_that_fails_again_and_that_the_specification_passes(tmp_path: Path) -> None:
    name = "mutant:transposed-merge-on-square"
    (row,) = rows(name, tmp_path, methods=["lora"], properties=["merge"], levels=["layer"])
    assert row["status"] == "fail"
    assert row["kind"] == "value"
    assert row["replay"] == f"refpeft replay {row['case']} {name}"
    assert Path(row["case"]).stat().st_size < 4000
    assert engine.replay(row["case"], name).verdict.kind == "value"
    assert engine.replay(row["case"], "spec").verdict.kind is None


def test_the_same_seed_gives_the_same_run_and_an_executor_gives_the_same_results(tmp_path: Path) -> None:
    def results(executor: Any = None) -> Any:
        found = rows("spec", tmp_path, levels=["layer"], executor=executor, seed=3, examples=4)
        return sorted((r["method"], r["property"], r["status"], r["examples"], r["ratio"]) for r in found)

    alone = results()
    assert results() == alone
    with ThreadPoolExecutor(1) as pool:
        assert results(pool) == alone


def test_shards_are_a_partition(tmp_path: Path) -> None:
    def names(shard: tuple[int, int]) -> list[tuple[str, str]]:
        found = rows("spec", tmp_path, levels=["layer"], examples=1, properties=["forward", "frozen"], shard=shard)
        return [(r["method"], r["property"]) for r in found]

    assert sorted(names((1, 2)) + names((2, 2))) == sorted(names((1, 1)))


@pytest.mark.parametrize(
    ("family", "architecture", "not_asked"),
    [("llama", None, {"bitfit", "p_tuning_v2"}), ("bert", "ForSequenceClassification", {"prefix_tuning"})],
)
def test_a_model_in_a_folder_is_asked_what_methods_can_do_there(
    family: str, architecture: str | None, not_asked: set[str], tmp_path: Path
) -> None:
    refpeft.save(tiny(family, architecture, dtype=np.float32), tmp_path / "m")
    found = rows("spec", tmp_path / "cases", model=tmp_path / "m", properties=["count"])
    assert {r["status"] for r in found} == {"pass"}
    assert {r["method"] for r in found} == set(known_methods()) - not_asked


@pytest.mark.parametrize("option", ["methods", "levels", "properties"])
def test_a_name_that_does_not_exist_is_an_error(option: str) -> None:
    with pytest.raises(ValueError, match=r"unknown .* 'loar'"):
        list(engine.check("spec", **{option: ["loar"]}))


# ── targets that cannot do everything ────────────────────────────────────────────────────────────────────────────────


class Limited(Spec):
    """Declares only forward, on linear layers in float32."""

    def info(self) -> Any:
        return {
            **super().info(),
            "name": "limited",
            "features": ["forward"],
            "dtypes": ["float32"],
            "levels": ["layer"],
        }


class Skipping(Limited):
    def run(self, case: Case) -> Any:
        raise Skip("not today")


class Breaking(Limited):
    def run(self, case: Case) -> Any:
        raise KeyError("lora_A")


def only(target: Spec, prop: str = "forward") -> dict[str, Any]:
    unit = engine.Unit("lora", "layer", prop)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine, "opened", lambda name: target)
        return engine.run_unit("limited", unit, engine.Options(folder=None))


def test_what_is_not_declared_is_not_asked() -> None:
    assert only(Limited())["status"] == "pass"
    assert only(Limited(), "merge")["status"] == "undeclared"


def test_a_skip_is_not_a_pass() -> None:
    row = only(Skipping())
    assert (row["status"], row["examples"], row["detail"]) == ("skip", 0, "not today")


def test_what_a_target_raises_is_its_answer() -> None:
    row = only(Breaking())
    assert (row["status"], row["kind"]) == ("error", "error:KeyError")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda y: y, None),
        (lambda y: y * (1 + 1e-4), "value"),
        (lambda y: y * np.nan, "value"),
        (lambda y: y[None], "shape"),
        (lambda y: y.astype(np.float64), "dtype"),
    ],
)
def test_verdicts(change: Any, kind: str | None) -> None:
    prop = next(p for p in PROPERTIES if p.name == "forward")
    for structure in prop.corners("lora", Limited().info()):
        case = prop.case("lora", {**structure, "dtype": "float32"}, 0)
        got = Spec().run(case)
        assert Yardstick(case).judge({"y": change(got["y"])}).kind == kind
        assert Yardstick(case).judge({}).kind == "names"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: np.where(y == y.max(), np.nan, y), "y: nan or infinite in 1 of"),
        (lambda y: y * np.inf, "where the specification is finite"),
        (lambda y: y * 1.5, "y: off by 0.5 of its size, "),
    ],
)
def test_what_differs_is_said(change: Any, said: str) -> None:
    prop = next(p for p in PROPERTIES if p.name == "forward")
    structure = next(s for s in prop.corners("lora", Limited().info()) if s["regime"] == "float")
    case = prop.case("lora", {**structure, "dtype": "float32"}, 0)
    verdict = Yardstick(case).judge({"y": change(Spec().run(case)["y"])})
    assert said in verdict.detail
    assert "inf times" not in verdict.detail


def test_zeros_that_are_not_zero_are_said_to_be_so() -> None:
    prop = next(p for p in PROPERTIES if p.name == "forward")
    structure = next(s for s in prop.corners("lora", Limited().info()) if s["regime"] == "float")
    case = prop.case("lora", {**structure, "dtype": "float32", "bias": False}, 0)
    zero = Case(case.meta, {**case.arrays, "x": case.arrays["x"] * 0})
    y = Spec().run(zero)["y"]
    assert Yardstick(zero).judge({"y": y}).kind is None
    assert Yardstick(zero).judge({"y": y + y.dtype.type(0.5)}).detail == "y: expected zeros, found up to 0.5"


def test_seconds_are_measured_in_an_executor_too(tmp_path: Path) -> None:
    def seconds(executor: Any = None) -> Any:
        return list(engine.check("spec", levels=["layer"], examples=2, folder=tmp_path, executor=executor))[-1][
            "seconds"
        ]

    with ThreadPoolExecutor(1) as pool:
        for found in (seconds(), seconds(pool)):
            assert all(found[part] > 0 for part in engine.PARTS)
            assert sum(found[part] for part in engine.PARTS) <= found["wall"] * 1.02 + 0.01


def test_properties_are_one_sentence_and_need_declared_features() -> None:
    assert len({(p.level, p.name) for p in PROPERTIES}) == len(PROPERTIES)
    for p in PROPERTIES:
        assert p.statement.endswith(".")
        assert set(p.needs) <= set(FEATURES)


def test_every_method_has_mutants_of_its_own() -> None:
    """At least three that are tried on it."""
    alone = Counter(m.methods[0] for m in MUTANTS.values() if len(m.methods) == 1)
    shared = [m.methods for m in MUTANTS.values() if len(m.methods) > 1]
    assert [name for name in known_methods() if alone[name] + sum(name in s for s in shared) < 3] == []


def test_an_unknown_mutant_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown mutant 'x'"):
        target("x")


# ── known failures ───────────────────────────────────────────────────────────────────────────────────────────────────


def entry_for(name: str, tmp_path: Path, **fields: Any) -> Path:
    """A file of known failures holding what `mutant:name` gets wrong in merging."""
    (row,) = rows(name, tmp_path, methods=["lora"], properties=["merge"], levels=["layer"])
    own = {
        "method": "lora",
        "level": "layer",
        "property": "merge",
        "kind": "value",
        "class": "bug",
        "reason": "it is a mutant",
    }
    file = tmp_path / "known.json"
    file.write_text(json.dumps([{**own, "case": row["case"], **fields}]))
    return file


def merge_row(name: str, tmp_path: Path, file: Path) -> dict[str, Any]:
    known.parse.cache_clear()
    (row,) = rows(name, tmp_path, methods=["lora"], properties=["merge"], levels=["layer"], known=file)
    return row


WRONG = "mutant:transposed-merge-on-square"


def test_a_known_failure_is_known(tmp_path: Path) -> None:
    row = merge_row(WRONG, tmp_path, entry_for(WRONG, tmp_path))
    assert (row["status"], row["detail"]) == ("known", "it is a mutant")
    assert row["replay"] == f"refpeft replay {row['case']} {WRONG}"
    assert engine.replay(row["case"], WRONG).verdict.kind == "value"


def test_a_known_failure_that_passes_is_unexpected(tmp_path: Path) -> None:
    assert merge_row("spec", tmp_path, entry_for(WRONG, tmp_path))["status"] == "unexpected-pass"


def test_a_known_failure_that_fails_otherwise_is_unexpected(tmp_path: Path) -> None:
    assert merge_row(WRONG, tmp_path, entry_for(WRONG, tmp_path, kind="shape"))["status"] == "unexpected-pass"


def test_a_known_failure_explains_only_what_it_matches(tmp_path: Path) -> None:
    file = entry_for(WRONG, tmp_path, match={"layer.kind": "no such kind"})
    assert merge_row(WRONG, tmp_path, file)["status"] == "fail"


def test_another_version_has_other_known_failures(tmp_path: Path) -> None:
    assert merge_row(WRONG, tmp_path, entry_for(WRONG, tmp_path, versions="<0.0.1"))["status"] == "fail"


@pytest.mark.parametrize(("match", "status"), [(["linear", "conv1d", "embedding"], "known"), (["conv1d"], "fail")])
def test_a_known_failure_may_match_several_values(match: list[str], status: str, tmp_path: Path) -> None:
    file = entry_for(WRONG, tmp_path, match={"layer.kind": match})
    assert merge_row(WRONG, tmp_path, file)["status"] == status


@pytest.mark.parametrize(
    ("beside", "status"), [({"torch": ">=2"}, "known"), ({"torch": ">=3"}, "fail"), ({"x": ""}, "fail")]
)
def test_a_known_failure_may_depend_on_other_libraries(
    beside: dict[str, str], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = Spec().info() | {"versions": {"torch": "2.13.0"}}
    monkeypatch.setattr(Spec, "info", lambda self: info)
    file = entry_for(WRONG, tmp_path, beside=beside)
    assert merge_row(WRONG, tmp_path, file)["status"] == status


def test_one_property_can_be_recorded_twice(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    found = rows(WRONG, tmp_path / "cases", methods=["lora"], properties=["merge"], levels=["layer"])
    known.update(file, "0.1.0", found)
    known.update(file, "0.1.0", found)
    cases = [entry["case"] for entry in json.loads(file.read_text())]
    assert cases == ["mine/lora-layer-merge.safetensors", "mine/lora-layer-merge-2.safetensors"]
    assert all((tmp_path / case).is_file() for case in cases)


def test_failures_can_be_recorded(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    found = rows(WRONG, tmp_path / "cases", methods=["lora"], properties=["merge"], levels=["layer"])
    assert known.update(file, "0.1.0", found) == (1, 0)
    assert merge_row(WRONG, tmp_path, file)["status"] == "known"


@pytest.mark.parametrize("change", [{"class": "opinion"}, {"method": "loar"}, {"property": "x"}, {"unknown": 1}])
def test_an_entry_that_matches_nothing_is_an_error(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"known\.json: entry 0"):
        merge_row(WRONG, tmp_path, entry_for(WRONG, tmp_path, **change))


@pytest.mark.parametrize("file", sorted(known.FOLDER.glob("*.json")), ids=lambda f: f.stem)
def test_stored_cases_of_known_failures_pass_on_the_specification(file: Path) -> None:
    entries = known.parse(file)
    assert entries
    for entry in entries:
        assert engine.examine(Spec(), entry.read()).verdict.kind is None
