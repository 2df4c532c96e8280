"""Libraries in environments of their own, as targets: listed, made, found; all that they answer is explained."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from refpeft.cli import app
from refpeft.cli.check import elsewhere
from refpeft.conformance import engine, known, strategies
from refpeft.conformance.case import Case
from refpeft.conformance.properties import PROPERTIES
from refpeft.conformance.targets import TARGETS, libraries
from refpeft.conformance.targets.fused import MASKS, Fused
from refpeft.conformance.targets.libraries import LIBRARIES
from refpeft.conformance.targets.spec import Spec
from tests.conformance.findings import pages, prints_what_it_says

DECLARES = {  # methods, and the property that shows how much of the layer level there is
    "loralib": ({"lora"}, "unmerge"),
    "lycoris": ({"lora", "rslora", "dora", "loha", "lokr", "glora", "dylora", "oft", "boft", "ia3"}, "unmerge"),
    "litgpt": ({"lora"}, "merge"),
    "torchtune": ({"lora", "dora"}, "disable"),
    "mlx": ({"lora", "rslora", "dora"}, "merge"),
    "keras": ({"lora"}, "merge"),
    "axolotl": ({"lora", "rslora", "dora"}, "sensitive"),
    "flax": ({"lora"}, "param-grads"),
    "qwix": ({"lora"}, "param-grads"),
    "paddle": ({"lora", "rslora"}, "unmerge"),
    "bitsandbytes": ({"lora", "rslora"}, "nf4-merged"),
    "invokeai": ({"lora", "dora", "loha", "lokr", "ia3"}, "merge"),
}
WITHOUT_GRADIENTS = ("invokeai",)
EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in DECLARES])


# ── with the libraries ───────────────────────────────────────────────────────────────────────────────────────────────


def target(name: str) -> str:
    return elsewhere(name, None)


@EACH
def test_a_library_differs_only_where_it_is_known_to(name: str, tmp_path: Path) -> None:
    rows = list(engine.check(target(name), folder=tmp_path, examples=2, levels=["layer"]))
    found = [r for r in rows if r["type"] == "result" and r["status"] != "undeclared"]
    methods, most = DECLARES[name]
    assert {r["method"] for r in found} == methods
    asked = {"forward", most} | ({"param-grads"} if name not in WITHOUT_GRADIENTS else set())
    assert asked <= {r["property"] for r in found}
    assert [(r["method"], r["property"], r["detail"]) for r in found if r["status"] not in ("pass", "known")] == []
    assert sum(r["status"] == "pass" for r in found) > len(found) / 3


@pytest.mark.lycoris
def test_lycoris_on_whole_models_differs_only_where_it_is_known_to(tmp_path: Path) -> None:
    asked = ["merge", "param-grads", "switch", "save-load", "saved-keys"]
    rows = list(
        engine.check(
            target("lycoris"), ["lora", "loha", "ln_tuning"], ["model", "lifecycle"], asked, folder=tmp_path, examples=1
        )
    )
    found = {(r["method"], r["property"]): r["status"] for r in rows if r["type"] == "result"}
    if set(found.values()) == {"undeclared"}:
        pytest.skip("whole models need transformers beside LyCORIS: refpeft targets --install lycoris")
    assert set(found.values()) == {"pass", "known"}
    assert found["loha", "merge"] == "known"
    assert {("lora", "merge"), ("lora", "saved-keys"), ("ln_tuning", "param-grads")} <= {
        place for place, status in found.items() if status == "pass"
    }


@EACH
def test_a_wrong_number_in_an_adapter_is_noticed(name: str) -> None:
    there, forward = engine.opened(target(name)), next(p for p in PROPERTIES if p.name == "forward")
    asked = forward.case("lora", forward.corners("lora", there.info())[-1], 0)
    assert engine.examine(there, asked).verdict.kind is None
    other = Case(asked.meta, {n: a * 2 if n == "B" else a for n, a in asked.arrays.items()})
    assert np.abs(there.run(asked)["y"] - there.run(other)["y"]).max() > 1e-3


@pytest.mark.parametrize(("name", "page"), pages(list(DECLARES)))
def test_the_scripts_of_the_findings_print_what_the_pages_say(name: str, page: Path) -> None:
    prints_what_it_says(name, page)


# ── without them ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No environment is there, and no library."""
    monkeypatch.setenv("REFPEFT_TARGETS", str(tmp_path))
    for name, library in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, library.module, None)
        monkeypatch.delitem(sys.modules, f"refpeft.conformance.targets.{name}", raising=False)
    monkeypatch.setattr(libraries, "find_spec", lambda module: None)
    engine.opened.cache_clear()
    return tmp_path


@pytest.mark.parametrize("name", LIBRARIES)
def test_where_a_library_is_missing_one_sentence_says_what_to_install(name: str, nowhere: Path) -> None:
    result = CliRunner().invoke(app, ["check", name])
    assert result.exit_code == 2
    assert result.output.startswith(f"refpeft: the target {name} needs ")
    assert f": refpeft targets --install {name}, or pip install {LIBRARIES[name].pip}\n" in result.output
    assert result.output.count("\n") == 1


def test_every_library_is_a_target_pinned_and_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    for name, library in LIBRARIES.items():
        assert TARGETS[name] == (library.about, library.factory)
        assert library.tried
        assert f"| `{name}` | {library.tried} |" in page


def test_targets_says_where_a_library_is_or_how_to_get_it(nowhere: Path, tmp_path: Path) -> None:
    info = nowhere / "mlx" / "lib" / "python3.11" / "site-packages" / "mlx_lm-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-lm\nVersion: 9.9\n")
    python = nowhere / "mlx" / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    assert CliRunner().invoke(app, ["targets", "--json", str(tmp_path / "t.jsonl")]).exit_code == 0
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())}
    assert rows["mlx"]["here"] == f"mlx-lm 9.9 in {nowhere / 'mlx'}"
    assert (rows["mlx"]["ready"], rows["flax"]["ready"]) == (True, False)
    assert rows["flax"]["here"] == "refpeft targets --install flax"
    assert elsewhere("mlx", None) == f"program:{python} -m refpeft.conformance.serve mlx"
    assert elsewhere("mlx", "/my/python") == "program:/my/python -m refpeft.conformance.serve mlx"
    assert elsewhere("flax", None) == "flax"


def test_a_library_that_asks_for_too_much_is_installed_alone(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []
    python = tmp_path / "axolotl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    libraries.install("axolotl", tmp_path, asked.append)
    first, *others = LIBRARIES["axolotl"].requires
    assert [list(words[5:]) for words in asked] == [["--no-deps", first], [*libraries.SHARED, *others]]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("vllm", ["uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"]),
        ("llamacpp", ["--omit=optional", "node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"]),
    ],
)
def test_what_pip_does_not_bring_comes_after_it_and_what_does_not_run_goes(
    name: str, last: Sequence[str], tmp_path: Path
) -> None:
    asked: list[Sequence[str]] = []
    python = tmp_path / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    libraries.install(name, tmp_path, asked.append)
    assert [words[0] for words in asked] == [str(python), "npm" if libraries.EVERY[name].npm else str(python)]
    assert list(asked[-1][-len(last) :]) == list(last)


def test_install_makes_an_environment_that_has_this_refpeft_and_nothing_else_of_ours(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []
    python = libraries.install("loralib", tmp_path, asked.append)
    assert asked == [
        [str(python), "-m", "pip", "install", "--quiet", *libraries.SHARED, *LIBRARIES["loralib"].requires]
    ]
    code = "import importlib.util as u, sys; print([n for n in ('refpeft', 'conformance', 'pytest') if u.find_spec(n)])"
    found = subprocess.run([python, "-E", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout == "['refpeft']\n"
    again: list[Sequence[str]] = []
    assert libraries.install("loralib", tmp_path, again.append) == python
    assert again == asked


def test_a_package_of_npms_is_installed_by_npm_and_runs_no_scripts(nowhere: Path) -> None:
    asked: list[Sequence[str]] = []
    found = libraries.install("transformersjs", None, asked.append)
    assert found == nowhere / "transformersjs" / "node_modules" / "@huggingface" / "transformers"
    (words,) = asked
    assert words[:4] == ["npm", "install", "--prefix", str(nowhere / "transformersjs")]
    assert "--ignore-scripts" in words
    assert words[-1] == libraries.TOOLS["transformersjs"].requires[0]
    assert not libraries.present("transformersjs")
    found.mkdir(parents=True)
    (found / "package.json").write_text('{"version": "9.9"}')
    assert libraries.present("transformersjs")
    assert libraries.version("transformersjs") == f"@huggingface/transformers 9.9 in {nowhere / 'transformersjs'}"


def test_tools_are_listed_and_are_no_targets(nowhere: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["targets", "--json", str(tmp_path / "t.jsonl")]).exit_code == 0
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())}
    for name in libraries.TOOLS:
        assert name not in TARGETS
        assert rows[name]["here"] == f"refpeft targets --install {name}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--install", "nosuch"], "--install nosuch: expected one of adapters, "),
        (["--dir", "x"], "--dir needs --install NAME"),
    ],
)
def test_what_cannot_be_installed_is_one_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["targets", *arguments])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.startswith(f"refpeft: {sentence}")


def test_a_pip_that_fails_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="pip ended with exit code 3: -c 'raise SystemExit"):
        libraries.pip([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_known_failure_of_a_library_has_a_reason_and_a_case(name: str) -> None:
    file = known.FOLDER / f"{name}.json"
    entries = known.parse(file) if file.is_file() else []
    assert all(e.reason.endswith(".") and e.read().method == e.method for e in entries)
    assert {e.case for e in entries} == set((known.FOLDER / name).glob("*.safetensors"))
    assert len({e.case for e in entries}) == len(entries)


# ── a layer among three, and what a target says about layers ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("mask", MASKS[1:])
def test_of_a_fused_layer_ours_comes_back_and_the_others_are_other_numbers(mask: str) -> None:
    fused, a = Fused(mask), np.arange(1.0, 7).reshape(2, 3)
    assert fused.base(a).shape == (6, 3)
    np.testing.assert_array_equal(fused.last(fused.base(a)), a)
    assert fused.adapter(a).shape == (2 * sum(fused.enabled), 3)
    np.testing.assert_array_equal(fused.ours(fused.adapter(a)), a)
    for whole in (fused.base(a), fused.adapter(a)):
        parts = [whole[k : k + 2] for k in range(0, len(whole), 2)]
        assert all((part != a).any() for part in parts[:-1])


def test_options_and_settings_of_a_target_hold_for_layers_too() -> None:
    info: dict[str, Any] = dict(Spec().info()) | {
        "options": {"dora": {"detach_norm": False}},
        "settings": {"way": ["a", "b"]},
    }
    corners = strategies.layer_corners("dora", info, {})
    assert {s["settings"]["way"] for s in corners} == {"a", "b"}
    assert all(s["config"]["detach_norm"] is False for s in corners)
    forward = next(p for p in PROPERTIES if p.name == "forward")
    assert forward.case("dora", corners[0], 0).meta["settings"] == {"way": "a"}
    assert "settings" not in strategies.layer_corners("dora", Spec().info(), {})[0]
