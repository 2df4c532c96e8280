"""Engines: whole models in other runtimes, as targets."""

from pathlib import Path

import numpy as np
import pytest

from refpeft.cli.check import elsewhere
from refpeft.conformance import engine
from refpeft.conformance.case import Case
from refpeft.conformance.properties import PROPERTIES
from tests.conformance.findings import pages, prints_what_it_says

DECLARES = {"llamacpp": {"lora", "rslora"}}  # target → methods
EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in DECLARES])


@EACH
def test_an_engine_differs_only_where_it_is_known_to(name: str, tmp_path: Path) -> None:
    rows = list(engine.check(elsewhere(name, None), folder=tmp_path, examples=2))
    found = [r for r in rows if r["type"] == "result" and r["status"] != "undeclared"]
    assert {r["method"] for r in found} == DECLARES[name]
    assert {"logits", "padding", "switch"} <= {r["property"] for r in found}
    assert [(r["method"], r["property"], r["detail"]) for r in found if r["status"] not in ("pass", "known")] == []
    assert sum(r["status"] == "pass" for r in found) > sum(r["status"] == "known" for r in found)


@EACH
def test_a_wrong_number_in_an_adapter_is_noticed(name: str) -> None:
    there, logits = engine.opened(elsewhere(name, None)), next(p for p in PROPERTIES if p.name == "logits")
    asked = logits.case("lora", logits.corners("lora", there.info())[0], 0)
    assert engine.examine(there, asked).verdict.kind is None
    other = Case(asked.meta, {n: a * 2 if n.endswith("lora_B.weight") else a for n, a in asked.arrays.items()})
    assert np.abs(there.run(asked)["logits"] - there.run(other)["logits"]).max() > 1e-3


@pytest.mark.parametrize(("name", "page"), pages(list(DECLARES)))
def test_the_scripts_of_the_findings_print_what_the_pages_say(name: str, page: Path) -> None:
    prints_what_it_says(name, page)
