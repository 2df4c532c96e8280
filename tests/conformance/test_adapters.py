"""AdapterHub's adapters as a target: all that it answers is explained. In an environment without it, one sentence."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from refpeft.cli import app
from refpeft.conformance import engine, known, strategies
from refpeft.conformance.case import Case
from refpeft.conformance.properties import PROPERTIES
from refpeft.conformance.targets import TARGETS, Skip, open_target
from refpeft.conformance.targets.spec import Spec
from tests.conformance.findings import FINDINGS, prints_what_it_says

PYTHON = shlex.quote(sys.executable)
SERVED = f"program:{PYTHON} -m refpeft.conformance.serve"


def case(level: str, prop: str, method: str, family: str, **more: Any) -> Case:
    """The first corner that the suite asks of this family, with other fields."""
    p = next(p for p in PROPERTIES if (p.level, p.name) == (level, prop))
    s = next(s for s in p.corners(method, Spec().info()) if s["family"] == family)
    return p.case(method, s | more, 0)


# ── with the library ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.adapterhub
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", ["model", "lifecycle", "story"])
def test_adapters_differs_only_where_it_is_known_to(level: str, tmp_path: Path) -> None:
    rows = [e for e in engine.check("adapters", folder=tmp_path, examples=1, levels=[level]) if e["type"] == "result"]
    found = [r for r in rows if r["status"] != "undeclared"]
    assert {r["method"] for r in found} >= {"lora", "dora", "prompt_tuning", "prefix_tuning", "houlsby", "pfeiffer"}
    assert [
        (r["method"], r["property"], r["detail"]) for r in found if r["status"] not in ("pass", "known", "skip")
    ] == []
    assert any(r["status"] == "pass" for r in found)


@pytest.mark.adapterhub
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "config", "why"),
    [
        ("lora", {"r": 2, "lora_alpha": 2.0, "target_modules": ["attention.output.dense"]}, "no LoRA at"),
        ("lora", {"r": 2, "lora_alpha": 2.0, "target_modules": ["0.attention.self.query"]}, "puts a LoRA at"),
        ("prompt_tuning", {"num_virtual_tokens": 2, "placement": "before"}, "behind the embeddings"),
        ("prefix_tuning", {"num_virtual_tokens": 2, "encoder_hidden_size": 3}, "leaves the tokens where they are"),
        ("houlsby", {"train_norms": True}, "no train_norms"),
    ],
)
def test_what_adapterhub_has_not_is_skipped_with_the_reason(method: str, config: dict[str, Any], why: str) -> None:
    with pytest.raises(Skip, match=why):
        open_target("adapters").run(case("model", "logits", method, "bert", config=config, layers=2))


@pytest.mark.adapterhub
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_number_in_an_adapter_is_noticed() -> None:
    asked = case("model", "logits", "lora", "gpt2")
    answer = open_target("adapters").run(asked)
    other = Case(asked.meta, {n: a * 1.01 if "lora_B" in n else a for n, a in asked.arrays.items()})
    assert np.abs(answer["logits"] - open_target("adapters").run(other)["logits"]).max() > 1e-6
    assert engine.examine(open_target("adapters"), asked).verdict.kind is None


@pytest.mark.adapterhub
@pytest.mark.parametrize("page", sorted(FINDINGS.glob("adapters-*.md")), ids=lambda page: page.stem)
def test_the_scripts_of_the_findings_print_what_the_pages_say(page: Path) -> None:
    prints_what_it_says("adapters", page)


# ── without it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_target_is_listed() -> None:
    assert "adapters" in TARGETS
    assert "adapters" in CliRunner().invoke(app, ["targets"]).output


def test_where_it_is_missing_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFPEFT_TARGETS", "/nowhere")
    monkeypatch.setitem(sys.modules, "adapters", None)
    for name in ("adapters", "adapterhub"):
        monkeypatch.delitem(sys.modules, f"refpeft.conformance.targets.{name}", raising=False)
    engine.opened.cache_clear()
    result = CliRunner().invoke(app, ["check", "adapters"])
    assert result.exit_code == 2
    assert result.output.startswith(
        "refpeft: the target adapters needs adapters: refpeft targets --install adapters, or "
    )
    assert result.output.count("\n") == 1


def test_a_python_that_is_not_there_is_one_sentence() -> None:
    result = CliRunner().invoke(app, ["check", "adapters", "--python", "/nowhere/python"])
    assert result.exit_code == 2
    assert result.output.startswith("refpeft: cannot start program '/nowhere/python ")
    assert result.output.count("\n") == 1


def test_every_known_failure_has_a_reason_and_a_case() -> None:
    entries = known.parse(known.FOLDER / "adapters.json")
    assert {e.cls for e in entries} <= set(known.CLASSES)
    assert all(e.reason.endswith(".") and e.read().method == e.method for e in entries)
    cases = {e.case for e in entries}
    assert cases == set((known.FOLDER / "adapters").glob("*.safetensors"))
    assert len(cases) == len(entries)


# ── a target by another python, and what it declares ─────────────────────────────────────────────────────────────────


def test_a_target_served_by_another_python_answers_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "methods": ["lora"], "examples": 2}
    for target in ("spec", "mutant:alpha-ignored"):
        served = engine.check(f"{SERVED} {target}", properties=["logits", "merge", "saved-keys"], **options)
        here = engine.check(target, properties=["logits", "merge", "saved-keys"], **options)
        keys = ("property", "level", "status", "ratio", "kind", "detail")
        both = [[{k: e.get(k) for k in keys} for e in found if e["type"] == "result"] for found in (served, here)]
        assert both[0] == both[1]


def test_a_served_target_says_how_it_failed_and_what_it_skips(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from refpeft.conformance.targets import Skip\n"
        "print('hello')\n"
        "class Mine:\n"
        "    def info(self):\n"
        "        return {'name': 'mine', 'version': '1', 'levels': [], 'methods': [], 'dtypes': [], 'features': []}\n"
        "    def run(self, case):\n"
        "        print('a library talks')\n"
        "        raise {'dora': Skip('not this')}.get(case.method, KeyError('here'))\n"
        "mine = Mine()\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom refpeft.conformance.serve import serve\n"
    code += "serve('python:mine:mine')"
    target = open_target(f"program:{PYTHON} -c {shlex.quote(code)}")
    failed = engine.examine(target, case("model", "logits", "lora", "bert"))
    assert failed.verdict.kind == "error:KeyError"
    assert engine.examine(target, case("model", "logits", "dora", "bert")).skipped == "not this"
    target.close()


def test_layers_options_and_settings_that_a_target_declares_are_those_it_is_asked() -> None:
    info = dict(Spec().info()) | {
        "linears": {"bert": ("key",)},
        "options": {"lora": {"r": 3}},
        "settings": {"attention": ["a", "b"], "more": [1]},
        "families": ["bert"],
    }
    corners = strategies.model_corners("lora", info, ("gpt2", "bert"), ("",))
    assert [s["settings"] for s in corners] == [{"attention": "a", "more": 1}, {"attention": "b", "more": 1}]
    assert {s["family"] for s in corners} == {"bert"}
    assert all(set(s["config"]["target_modules"]) == {"key"} and s["config"]["r"] == 3 for s in corners)
    logits = next(p for p in PROPERTIES if (p.level, p.name) == ("model", "logits"))
    asked = logits.case("lora", corners[1], 0)
    assert asked.meta["settings"] == corners[1]["settings"]
    assert "settings" not in case("model", "logits", "lora", "bert").meta


def test_a_setting_can_be_of_some_methods_only() -> None:
    class Set(Spec):
        def info(self) -> dict[str, object]:
            settings = {"attention": ["a", "b"], "alpha": [1, 2]}
            return {**super().info(), "settings": settings, "without": {"lora": ["alpha", "cache"]}}

    told = {method: engine.told(Set(), engine.Options(), method) for method in ("lora", "ia3")}
    assert told["lora"]["settings"] == {"attention": ["a", "b"]}
    assert told["ia3"]["settings"] == {"attention": ["a", "b"], "alpha": [1, 2]}
    assert "cache" not in told["lora"]["features"]
    assert "cache" in told["ia3"]["features"]
