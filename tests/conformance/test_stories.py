"""Stories: they are told of what is possible, made shorter, refused in part, and written as scripts that run alone."""

import ast
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from refpeft.cli import app
from refpeft.conformance import engine, staging, stories, telling
from refpeft.conformance.case import Case
from refpeft.conformance.mutants import MUTANTS
from refpeft.conformance.script import literal, script
from refpeft.conformance.targets.spec import Spec
from refpeft.conformance.targets.spec_stories import Story, settled
from refpeft.conformance.traits import LORA

KNOWN = Path(engine.__file__).parent / "known" / "peft"
BOTH = [*stories.BOTH]


def told(
    moves: Sequence[Any],
    method: str = "lora",
    prop: str = "files",
    dtype: str = "float32",
    lacks: Sequence[str] = (),
    **config: Any,
) -> Case:
    """A story of named moves, untied."""
    able = list(telling.NEEDED)
    named = [(m, 0, 0) if isinstance(m, str) else m for m in moves]
    configs = {
        name: {"r": 2, "lora_alpha": 3.0 + n, "target_modules": ["q", "q2"], **config}
        for n, name in enumerate(telling.NAMES)
    }
    if method not in LORA:
        configs = staging.plainly(method, 0, [{}], [["q", "q2"]], config)
    structure = {
        "moves": [[able.index(m) + 1, a, b] for m, a, b in named], "able": able, "draw": 0, "configs": configs,
        "tied": False, "dtype": dtype, **({"lacks": lacks} if lacks else {}),
    }  # fmt: skip
    return staging.case(method, prop, structure, 0)


def done(case: Case) -> list[str]:
    return [step["do"] for step in case.meta["steps"]]


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_possible_is_left_out() -> None:
    assert done(told(["unmerge", "delete", "enable", "load", "add", "swap", "unmerge", "merge", "train"])) == [
        "add",
        "merge",
    ]


def test_any_part_of_a_story_is_a_story() -> None:
    rng = np.random.default_rng(0)
    names = list(telling.NEEDED)
    for _ in range(30):
        moves = [(names[n], int(a), int(b)) for n, a, b in rng.integers(0, [len(names), 3, 11], (10, 3))]
        for kept in (moves, moves[1:], moves[::2], moves[:5]):
            case = told(kept)
            assert len(Spec().run(case)) >= len(case.meta["steps"])


def test_all_moves_and_all_combinations_are_told_always() -> None:
    info = Spec().info()
    seen, sums = set[str](), set[str]()
    for prop in stories.STORIES:
        for s in prop.corners("lora", info):
            steps = prop.case("lora", s, 0).meta["steps"]
            seen |= {step["do"] for step in steps}
            sums |= {step["how"] for step in steps if step["do"] == "combine"}
    assert seen == {*telling.NEEDED} - {"replace", "thin"}
    assert sums == {*telling.SUMS}


def test_a_target_is_told_what_it_declares() -> None:
    info = {**Spec().info(), "features": ["merge", "several", "unmerge"]}
    for s in stories.STORIES[0].corners("lora", info):
        assert set(done(stories.STORIES[0].case("lora", s, 0))) <= {"add", "merge", "unmerge", "activate"}


# ── shrinking ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mutant", "steps"),
    [
        ("merges-again", ["add", "merge", "merge"]),
        ("delete-leaves-merged-weights", ["add", "add", "merge", "delete"]),
        ("unmerge-restores-other-dtype", ["add", "merge", "activate"]),
        ("delete-forgets-head-of-heir", ["add", "add", "activate", "delete"]),
        ("load-under-another-name-keeps-the-old", ["add", "save", "train", "load_as", "activate"]),
        ("hot-swap-clears-neighbours", ["add", "add", "save", "swap", "activate"]),
        ("dare-not-rescaled", ["add", "add", "combine", "activate"]),
    ],
)
def test_a_story_that_fails_is_made_as_short_as_it_can_be(mutant: str, steps: list[str], tmp_path: Path) -> None:
    name = MUTANTS[mutant].first[1]
    found = engine.check(f"mutant:{mutant}", ["lora"], ["story"], [name], folder=tmp_path, seed=1)
    (row,) = [e for e in found if e["type"] == "result"]
    assert row["status"] == "fail"
    case = Case.read(row["case"])
    assert done(case) == steps
    assert case.meta["dtype"] == "float32"
    assert "tied_to" not in case.meta["model"]["layers"]["head"]
    assert engine.replay(row["case"], f"mutant:{mutant}").verdict.kind == row["kind"]
    assert engine.replay(row["case"], "spec").verdict.kind is None


# ── steps that may be refused ────────────────────────────────────────────────────────────────────────────────────────


class Refuses(Spec):
    """Will not delete what is merged; `spoils`: and has done something to it when it says so."""

    spoils = 0.0

    def run(self, case: Case) -> Any:
        return Refusing(case, self.spoils).run(case.meta["steps"])


class Refusing(Story):
    def __init__(self, case: Case, spoils: float) -> None:
        super().__init__(case)
        self.spoils = spoils

    def delete(self, adapter: str) -> Any:
        a = self.adapters[adapter]
        self.adapters[adapter] = a.replace(params={n: v * np.float32(1 + self.spoils) for n, v in a.params.items()})
        return {"refused": np.array(True)}


MERGED = [*BOTH, "merge", ("delete", 0, 0), "unmerge"]


def test_a_refusal_changes_nothing() -> None:
    case = told(MERGED)
    assert case.meta["steps"][3]["may"] == "refuse"
    target = Refuses()
    assert engine.examine(target, case).verdict.kind is None
    assert engine.examine(Spec(), case).verdict.kind is None
    target.spoils = 0.1
    verdict = engine.examine(target, case).verdict
    assert verdict.kind == "value"
    assert verdict.detail.startswith("3/logits")


def test_what_may_not_be_refused_is_wrong_if_it_is() -> None:
    case = told([*BOTH, ("delete", 1, 0)])
    assert settled(case, {"2/refused": np.array(True)}).meta == case.meta
    assert engine.examine(Refuses(), case).verdict.kind == "names"


# ── scripts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_literals_give_the_same_numbers_back() -> None:
    for dtype in (np.float32, np.float64):
        a = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)
        assert np.array_equal(np.array(ast.literal_eval(literal(a)), dtype), a)
    assert ast.literal_eval(literal(np.array([True, False]))) == [True, False]


def test_a_script_is_of_stories_and_of_libraries_that_have_a_template(tmp_path: Path) -> None:
    case = told(["add"])
    with pytest.raises(ValueError, match="scripts can be written for peft, not for 'mlx'"):
        script(case, "mlx")
    layer = Case({"level": "layer", "method": "lora"}, {})
    with pytest.raises(ValueError, match="not of a case of level layer"):
        script(layer, "peft")
    assert "refpeft" not in script(case, "peft")
    file = tmp_path / "case.safetensors"
    case.save(file)
    said = CliRunner().invoke(app, ["replay", str(file), "spec", "--script", str(tmp_path / "story.py")])
    assert said.exit_code != 0


def ran(text: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    file = folder / "story.py"
    file.write_text(text, encoding="utf-8")
    return subprocess.run([sys.executable, "-W", "ignore", "-E", str(file)], capture_output=True, text=True, cwd=folder)


@pytest.mark.peft
def test_a_script_shows_a_known_failure_by_itself(tmp_path: Path) -> None:
    case, file = KNOWN / "lora-story-hot-swap.safetensors", tmp_path / "story.py"
    said = CliRunner().invoke(app, ["replay", str(case), "peft", "--script", str(file)])
    assert said.exit_code == 1
    done = ran(file.read_text(encoding="utf-8"), tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "wrong after activate(adapters=['foobar'])"
    assert len(done.stdout.splitlines()) == 5


@pytest.mark.peft
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lora", "float32"), ("lora", "bfloat16"), ("dora", "float32"), ("vera", "float32"), ("adalora", "float32"),
     ("lokr", "float64"), ("boft", "float32")],
)  # fmt: skip
def test_a_script_of_what_is_right_says_so(method: str, dtype: str, tmp_path: Path) -> None:
    """Files, training, merging, a head; combinations with masks."""
    flags: dict[str, Any] = {"use_dora": True} if method == "dora" else {}
    sums: Sequence[Any] = (("combine", 0, 6), ("activate", 3, 0), "train", ("combine", 0, 9))
    moves = [
        *BOTH,
        "train",
        "save",
        ("load_as", 0, 0),
        ("activate", 2, 0),
        *(sums if (method, dtype) == ("lora", "float32") else ()),
        "merge",
        "unmerge",
        "disable",
        "enable",
    ]
    lacks = [f for f in staging.RELEVANT if f in peft_without(method)]
    case = told(moves, method, "files", dtype, lacks, **flags)
    assert done(case) == [m if isinstance(m, str) else m[0] for m in moves]
    said = ran(script(case, "peft"), tmp_path)
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.splitlines()) == len(moves)


def peft_without(method: str) -> Sequence[str]:
    lacking: Mapping[str, Sequence[str]] = engine.here("peft").info()["without"]
    return lacking[method]


# ── HF peft ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peft
def test_peft_combines_as_defined_and_what_it_gets_wrong_is_stored_as_a_script(tmp_path: Path) -> None:
    none = tmp_path / "known.json"
    none.write_text("[]")
    names = ["combined", "hot-swap"]
    found = engine.check("peft", ["lora"], ["story"], names, examples=5, folder=tmp_path / "cases", known=none)
    rows = {e["property"]: e for e in found if e["type"] == "result"}
    assert rows["combined"]["status"] == "pass"
    assert rows["hot-swap"]["status"] == "fail"
    assert "hotswap_adapter" in Path(rows["hot-swap"]["script"]).read_text(encoding="utf-8")
