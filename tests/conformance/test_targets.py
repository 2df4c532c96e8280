"""The targets that need a library: nothing that they answer is unexplained."""

from pathlib import Path
from typing import Any

import pytest

from refpeft.conformance import engine


def results(target: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    found = [e for e in engine.check(target, folder=folder, examples=1, **options) if e["type"] == "result"]
    return [r for r in found if r["status"] != "undeclared"]


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", ["layer", "model", "lifecycle"])
def test_peft_differs_only_where_it_is_known_to(level: str, tmp_path: Path) -> None:
    found = results("peft", tmp_path, levels=[level])
    assert found
    assert [(r["property"], r["detail"]) for r in found if r["status"] not in ("pass", "known")] == []


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "ia3", "adalora", "oft", "prefix_tuning"])
def test_in_stories_peft_differs_only_where_it_is_known_to(method: str, tmp_path: Path) -> None:
    found = results("peft", tmp_path, levels=["story"], methods=[method])
    assert {"any-order", "files", "sixteen-bits"} <= {r["property"] for r in found}
    assert [(r["property"], r["detail"]) for r in found if r["status"] not in ("pass", "known")] == []


@pytest.mark.ort
def test_onnxruntime_runs_our_graphs_as_the_specification_says(tmp_path: Path) -> None:
    found = results("onnxruntime", tmp_path)
    assert {r["property"] for r in found} == {"onnx", "onnx-two", "onnx-tied"}
    assert [(r["method"], r["detail"]) for r in found if r["status"] != "pass"] == []
