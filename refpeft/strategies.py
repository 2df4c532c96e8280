"""Hypothesis strategies, for property-based tests of one's own: configs, tiny models, adapters, cases.

    from hypothesis import given
    from refpeft import strategies

    @given(strategies.tuned("dora"))
    def test_merging_changes_no_output(t):
        assert np.allclose(merged(t.model, t.adapter)(t.ids), tuned(t.model, t.adapter)(t.ids))

Hypothesis draws structure: families, widths, ranks, options, which layers. Numbers come from a generator by their
names, so that what fails becomes small quickly. Needs hypothesis, which refpeft brings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refpeft.adapter import Adapter
from refpeft.conformance import build, tiny
from refpeft.conformance import strategies as drawn
from refpeft.conformance.case import Case
from refpeft.conformance.numbers import integers
from refpeft.conformance.properties import PROPERTIES
from refpeft.conformance.targets.spec import Spec
from refpeft.conformance.traits import TRAITS
from refpeft.methods import METHODS
from refpeft.model import Model
from refpeft.ops import Array

FAMILIES = tuple(tiny.FAMILIES)
PLAIN = "full"  # a method that every model has room for


@dataclass(frozen=True)
class Tuned:
    """A model, an adapter of it that is not where training starts, and what to run: ids [b, s], and for a model of
    encoder and decoder decoder_input_ids."""

    model: Model
    adapter: Adapter
    ids: Array
    inputs: Mapping[str, Array]


def info(dtypes: Sequence[str]) -> Mapping[str, Any]:
    """What is declared: everything, in these dtypes."""
    return {**Spec().info(), "dtypes": list(dtypes)}


HEADS = ("", tiny.CLASSIFIER)  # '' is the family's language model


def structures(
    method: str,
    families: Sequence[str] | None,
    dtypes: Sequence[str],
    layers: int,
    heads: tuple[str, ...] = HEADS,
) -> st.SearchStrategy[dict[str, Any]]:
    if method not in TRAITS:
        raise ValueError(f"unknown method {method!r}: there are {', '.join(TRAITS)}")
    for family in families or ():
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}: there are {', '.join(FAMILIES)}")
    return drawn.model(method, info(dtypes), tuple(families or FAMILIES), heads, layers)


def models(
    families: Sequence[str] | None = None, dtypes: Sequence[str] = ("float64", "float32"), layers: int = 2
) -> st.SearchStrategy[Model]:
    """Tiny models with random weights, as `refpeft.load` would give them; of LLaMA, Qwen2 and T5 in float32 only."""
    return structures(PLAIN, families, dtypes, layers).map(lambda s: build.tiny_model(s, s["draw"]))


def configs(method: str, family: str = "llama") -> st.SearchStrategy[Any]:
    """Configs of a method, for the layers that models of the family have."""
    return structures(method, [family], ("float32",), 1).map(lambda s: METHODS[method].Config(**s["config"]))


def adapters(method: str, model: Model) -> st.SearchStrategy[Adapter]:
    """Adapters of this model, its parameters moved away from where the method starts them."""
    family = model.config.family
    head = str(model.source["architectures"][0]).removeprefix(tiny.PREFIX[family])

    def made(s: Mapping[str, Any]) -> Adapter:
        return adapter_of(method, s["config"], model, s["draw"])

    return structures(method, [family], ("float32",), 1, ("" if head == tiny.LM[family] else head,)).map(made)


def tuned(
    method: str,
    families: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    layers: int = 2,
) -> st.SearchStrategy[Tuned]:
    """Models with an adapter of this method, and tokens."""

    def made(s: Mapping[str, Any]) -> Tuned:
        model = build.tiny_model(s, s["draw"])
        ids = integers(s["draw"], "ids", tuple(s["batch"]), 2, tiny.VOCAB - 1)
        more = {"decoder_input_ids": build.decoded(ids, s["draw"], tiny.VOCAB)} if model.config.encoder_decoder else {}
        return Tuned(model, adapter_of(method, s["config"], model, s["draw"]), ids, more)

    return structures(method, families, dtypes, layers).map(made)


def adapter_of(method: str, config: Mapping[str, Any], model: Model, seed: int) -> Adapter:
    import refpeft

    config = build.named(config, model)
    fresh = refpeft.init(method, config, model, seed=seed)
    params, _ = build.adapter(method, config, model, seed)
    return fresh.replace(params={name: np.asarray(a) for name, a in params.items()})


def cases(method: str, level: str | None = None, property: str | None = None, seed: int = 0) -> st.SearchStrategy[Case]:
    """Cases of the suite: what `refpeft check` asks. The arrays of the answer are `expected(case)`; those that must be
    refused have none, and are left out."""
    possible = [p for p in PROPERTIES if p.applies(method) and p.name != "rejects"]
    asked = [p for p in possible if level in (None, p.level) and property in (None, p.name)]
    asked = [p for p in asked if not p.structure(method, Spec().info()).is_empty]
    if not asked:
        raise ValueError(f"nothing is asked of {method!r} at level {level!r} under the name {property!r}")
    return st.sampled_from(asked).flatmap(
        lambda p: p.structure(method, Spec().info()).map(lambda s: p.case(method, s, seed))
    )


def expected(case: Case) -> dict[str, Array]:
    """The specification's own answer."""
    return Spec().run(case)
