"""Public strategies: what they draw is of the kind that they say, and properties of all methods hold on it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refpeft
from refpeft import Adapter, strategies
from refpeft.conformance import build
from refpeft.conformance.targets.spec import Spec
from refpeft.conformance.traits import TRAITS
from refpeft.conformance.yardstick import Yardstick
from refpeft.methods import METHODS

FEW = settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MERGED = [name for name in TRAITS if hasattr(METHODS[name], "merge")]


@FEW
@given(st.data())
def test_models_and_adapters_go_together(data: st.DataObject) -> None:
    model = data.draw(strategies.models(layers=1))
    method = data.draw(st.sampled_from(sorted(m for m in TRAITS if model.config.family in TRAITS[m].families)))
    if TRAITS[method].architectures is None:
        adapter = data.draw(strategies.adapters(method, model))
        assert adapter.method == method
        assert all(np.isfinite(p).all() for p in adapter.params.values())
        assert {p.dtype for p in adapter.params.values()} <= {next(iter(model.params.values())).dtype}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_adapters_are_for_the_head_that_the_model_has(architecture: str) -> None:
    """A prompt has the classifier trained beside it, where there is one."""
    source = {"family": "llama", "architecture": architecture.removeprefix("Llama"), "layers": 1, "dtype": "float32"}
    model = build.tiny_model(source, 0)
    classifies = architecture.endswith("Classification")

    @FEW
    @given(strategies.adapters("p_tuning", model))
    def each(adapter: Adapter) -> None:
        assert bool(adapter.config.modules_to_save) == classifies

    each()


@pytest.mark.parametrize("method", sorted(TRAITS))
def test_configs_are_of_the_method_and_differ(method: str) -> None:
    seen = set()

    @settings(FEW, max_examples=20)
    @given(strategies.configs(method, TRAITS[method].families[0]))
    def each(config: object) -> None:
        assert isinstance(config, METHODS[method].Config)
        seen.add(repr(config))

    each()
    assert len(seen) > 1 or not TRAITS[method].choices


@pytest.mark.parametrize("method", MERGED)
def test_merging_changes_no_output(method: str) -> None:
    """wrap ≡ merge, as a user would write it."""

    @FEW
    @given(strategies.tuned(method, dtypes=["float64"], families=["gpt2", "bert", "bart"]))
    def each(t: strategies.Tuned) -> None:
        merged = refpeft.merge(t.model, t.adapter)
        one, two = merged(t.ids, **t.inputs)[0], t.model(t.ids, t.adapter, **t.inputs)[0]
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-9)
        changed.append(np.abs(two - t.model(t.ids, **t.inputs)[0]).max() > 0)

    changed: list[bool] = []
    each()
    assert any(changed)


@FEW
@given(strategies.cases("lora", "layer"))
def test_a_case_is_what_the_suite_asks(case: strategies.Case) -> None:
    """The specification's answer passes; with one number changed it does not."""
    answer = strategies.expected(case)
    assert Yardstick(case).judge(answer).kind is None
    name = next((n for n, a in answer.items() if a.size and a.dtype.kind == "f"), None)
    if name:
        wrong = answer[name].copy()
        wrong.flat[0] += 1 + abs(wrong.flat[0])
        assert Yardstick(case).judge({**answer, name: wrong}).kind == "value"


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="unknown method 'magic': there are"):
        strategies.tuned("magic")
    with pytest.raises(ValueError, match="unknown family 'gpt9': there are"):
        strategies.models(["gpt9"])
    with pytest.raises(ValueError, match="nothing is asked of 'lora' at level 'layer' under the name 'padding'"):
        strategies.cases("lora", "layer", "padding")
    assert Spec().info()["methods"]
