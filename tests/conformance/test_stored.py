"""Layers in four bits as cases: what is stored, and a W that storing does not change."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refpeft import quantisation
from refpeft.conformance import engine, properties_stored
from refpeft.conformance.properties import PROPERTIES
from refpeft.conformance.targets.spec import Layer, Spec
from refpeft.quantisation import nf4, rounded

NF4 = {p.name: p for p in properties_stored.STORED}
INFO: dict[str, Any] = {**Spec().info(), "dtypes": ["float32"], "stored": "nf4"}


class Of(Spec):
    """The specification with one wrong answer about NF4."""

    def __init__(self, wrong: Callable[..., Any]) -> None:
        self.wrong = wrong

    def layer(self, case: Any) -> Any:
        W = case.arrays["W"]
        codes, absmax = self.wrong(W)
        return {"codes": codes, "absmax": absmax, "W_read": quantisation.read(*nf4(W), W)}


def swapped(W: Any) -> Any:
    codes, absmax = nf4(W)
    return codes << 4 | codes >> 4, absmax


def by_columns(W: Any) -> Any:
    return nf4(np.ascontiguousarray(W.T))


def one_scale(W: Any) -> Any:
    codes, absmax = nf4(W)
    return codes, absmax * 0 + absmax.max(initial=0)


@pytest.mark.parametrize("wrong", [swapped, by_columns, one_scale])
def test_a_mistake_in_what_is_stored_is_noticed(wrong: Callable[..., Any]) -> None:
    corners = NF4["nf4"].corners("lora", INFO)
    assert len(corners) > 2
    cases = [NF4["nf4"].case("lora", s, 0) for s in corners]
    assert all(engine.examine(Spec(), case).verdict.kind is None for case in cases)
    assert any(engine.examine(Of(wrong), case).verdict.kind == "value" for case in cases)


@pytest.mark.parametrize("name", ["forward", "param-grads", "nf4-merged"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_storing_the_weights_of_a_case_changes_nothing(name: str, method: str) -> None:
    prop = next(p for p in PROPERTIES if (p.level, p.name) == ("layer", name))
    linear = [s for s in prop.corners(method, INFO) if s["kind"] == "linear"]
    assert {s["regime"] for s in linear} == ({"exact"} if name == "nf4-merged" else {"exact", "float"})
    for s in linear:
        case = prop.case(method, s, 0)
        assert case.meta["layer"]["stored"] == "nf4"
        np.testing.assert_array_equal(rounded(case.arrays["W"]), case.arrays["W"])
        assert np.abs(Layer(case).φ["B"]).max() > 0
