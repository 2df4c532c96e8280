"""Every kind of adapter that HF peft makes leaves in a graph that is right; the pages say what was found of others."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import refpeft
from bench.peft_kinds import KINDS, MARK, NAMES, SIGNS, decided, ids, ours, quiet, verdict, write_base
from refpeft.adapter import Adapter
from refpeft.export.program import export
from tests.export.test_bench import cells

ROOT = Path(__file__).parents[2]


@pytest.mark.ort
@pytest.mark.peft
def test_all_kinds_are_right(tmp_path: Path) -> None:
    """HF peft makes them, and says what they compute; the graph is run on onnxruntime."""
    found = decided(tmp_path, list(KINDS), ["refpeft"])["refpeft"]
    assert len(found) == 19
    assert {kind: why for kind, (what, why) in found.items() if what != "right"} == {}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds") / "base"
    with quiet():
        write_base(folder)
    return folder


def saved(base: Path, folder: Path, **fields: object) -> Adapter:
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields}
    adapter = refpeft.init("lora", config, refpeft.load(base))
    refpeft.save_adapter(adapter, folder)
    return adapter


@pytest.mark.ort
@pytest.mark.peft
def test_an_adapter_that_is_dropped_or_scaled_is_wrong(base: Path, tmp_path: Path) -> None:
    model = refpeft.load(base)
    adapter = saved(base, tmp_path / "adapter")
    expected = model.astype(np.float64)(ids(), adapter)[0]
    other = adapter.replace(params={n: p * 1.01 for n, p in adapter.params.items()})
    for name, made, want in (("same", adapter, "right"), ("dropped", None, "wrong"), ("scaled", other, "wrong")):
        export(model, made, tmp_path / name, "unmerged")
        assert verdict(tmp_path / name, expected)[0] == want, name
    assert verdict(tmp_path / "same", expected[:, 1:, :-1])[0] == "wrong"


@pytest.mark.ort
@pytest.mark.peft
def test_what_cannot_be_run_is_refused(base: Path, tmp_path: Path) -> None:
    """With a reason: the exporter's own, or onnxruntime's."""
    (tmp_path / "adapters").mkdir()
    saved(base, tmp_path / "adapters" / "00")
    config = tmp_path / "adapters" / "00" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LORRA"'))
    ours(base, tmp_path / "adapters", tmp_path / "out")
    what, why = verdict(tmp_path / "out" / "00", np.zeros((1, 1, 1)))
    assert (what, "LORRA" in why) == ("refused", True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.onnx").write_bytes(b"no graph")
    what, why = verdict(tmp_path / "broken", np.zeros((1, 1, 1)))
    assert (what, why.startswith("onnxruntime: ")) == ("refused", True)


def test_the_readme_says_what_the_page_says() -> None:
    """docs/exporters.md is what bench/peft_kinds.py wrote; README.md counts it."""
    head, _, *lines, totals = cells((ROOT / "docs" / "exporters.md").read_text("utf-8"))
    assert [line[0] for line in lines] == list(KINDS)
    columns = {name: Counter(line[k] for line in lines) for k, name in enumerate(head) if k}
    assert list(columns) == list(NAMES.values())
    assert totals[1:] == [f"{column[SIGNS['right']]} of {len(KINDS)}" for column in columns.values()]
    counted = [[name, *(str(column[sign]) for sign in SIGNS.values())] for name, column in columns.items()]
    _, table, _ = (ROOT / "README.md").read_text("utf-8").split(MARK)
    assert cells(table)[2:] == counted
    assert counted[0] == ["refpeft export", "19", "0", "0"]
