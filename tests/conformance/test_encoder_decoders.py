"""Cases of models with an encoder and a decoder: what is in them, and that they are asked."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, find, settings

from refpeft.conformance import build, engine, strategies, tiny
from refpeft.conformance.case import Case
from refpeft.conformance.mutants import STACKS, hunt
from refpeft.conformance.properties import PROPERTIES, Property
from refpeft.conformance.targets import open_target
from refpeft.conformance.targets.spec import Spec, Whole
from refpeft.conformance.traits import known
from refpeft.conformance.yardstick import Yardstick

QUIET = settings(database=None, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
CONFIG = {"r": 2, "lora_alpha": 6.0}


def prop(name: str, level: str = "model") -> Property:
    return next(p for p in PROPERTIES if (p.level, p.name) == (level, name))


def structure(family: str, **fields: Any) -> dict[str, Any]:
    linears = tiny.LINEARS[family]
    config = CONFIG | {"target_modules": [linears[0], linears[-1]]}
    usual = {
        "method": "lora", "family": family, "architecture": tiny.LM[family], "layers": 1, "dtype": "float32",
        "config": config, "batch": [2, 4], "draw": 0,
    }  # fmt: skip
    return usual | fields


def asked(name: str, family: str, **fields: Any) -> Case:
    return prop(name).case("lora", structure(family, **fields), 0)


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
@pytest.mark.parametrize(("s", "t"), [(1, 1), (2, 2), (3, 2), (5, 4)])
def test_the_decoder_reads_other_tokens_and_fewer(family: str, s: int, t: int) -> None:
    case = asked("logits", family, batch=[3, s])
    ids, written = case.arrays["ids"], case.arrays["decoder_input_ids"]
    assert (ids.shape, written.shape) == ((3, s), (3, t))
    assert (written != ids[:, :t]).all()
    assert written.min() >= 2
    assert written.max() < tiny.VOCAB


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_the_mask_is_of_the_encoder_and_hides_none_of_the_decoders_outputs(family: str) -> None:
    case = asked("padding", family, padded=True, batch=[3, 4])
    assert case.arrays["attention_mask"].shape == case.arrays["ids"].shape
    assert not case.arrays["attention_mask"].all()
    logits = Spec().run(case)["logits"]
    assert logits.shape[:2] == case.arrays["decoder_input_ids"].shape
    assert (np.abs(logits).max(-1) > 0).all()
    changed = Case(
        case.meta, {**case.arrays, "ids": np.where(case.arrays["attention_mask"] > 0, case.arrays["ids"], 5)}
    )
    np.testing.assert_array_equal(Spec().run(changed)["logits"], logits)


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_causal_is_said_of_the_decoder(family: str) -> None:
    case = asked("causal", family, batch=[2, 5])
    written, other = case.arrays["decoder_input_ids"], case.arrays["other_decoder_input_ids"]
    assert "other_ids" not in case.arrays
    assert (written[:, :-1] == other[:, :-1]).all()
    assert (written[:, -1] != other[:, -1]).all()
    found = Spec().run(case)
    before, after = (np.split(found[name], [-1], axis=1) for name in ("logits", "other_logits"))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_decoding_step_by_step_is_what_the_yardstick_takes_for_the_whole(family: str) -> None:
    case = asked("incremental", family, batch=[2, 5], dtype="float64")
    found = Whole(case).decoded()["decoded"]
    np.testing.assert_allclose(found, Whole(case).logits()["logits"], rtol=0, atol=1e-12 * np.abs(found).max())


LABELLED = ("prompt_tuning", "p_tuning", "prefix_tuning")


def labelled(method: str, family: str, **fields: Any) -> Case:
    (s,) = [s for s in prop("loss").corners(method, Spec().info()) if s["family"] == family]
    return prop("loss").case(method, {**s, **fields}, 1)


@pytest.mark.parametrize("method", LABELLED)
@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
@pytest.mark.parametrize("batch", [[1, 4], [2, 3]])
def test_labels_are_given_in_place_of_what_the_decoder_reads(batch: list[int], family: str, method: str) -> None:
    case = labelled(method, family, batch=batch)
    labels, mask = case.arrays["labels"], case.arrays["attention_mask"]
    assert not {"decoder_input_ids", "dout"} & case.arrays.keys()
    assert labels.shape == (batch[0], batch[1] + 2)
    assert (labels[:, 0] >= 2).all()
    assert (labels[:, -1] == -100).all()
    assert (labels != -100).sum() > batch[0]
    assert (mask[-1] == 0).any() or batch[0] == 1
    source = case.meta["model"]
    assert source["decoder_start_token_id"] not in (source["pad_token_id"], 2)


@pytest.mark.parametrize("method", LABELLED)
@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_the_loss_is_the_mean_of_what_each_label_has_for_itself(family: str, method: str) -> None:
    """Row by row and label by label, written out: −log p(yₜ | x, y<t), each from a decoder that reads no more."""
    case = labelled(method, family, dtype="float64")
    whole, start = Whole(case), case.meta["model"]["decoder_start_token_id"]
    found = []
    for ids, mask, labels in zip(*(case.arrays[n] for n in ("ids", "attention_mask", "labels")), strict=True):
        for t in np.flatnonzero(labels != -100):
            read = [start, *(case.meta["model"]["pad_token_id"] if y == -100 else y for y in labels[:t])]
            y, _ = whole.base(ids[None, mask > 0], whole.active, decoder_input_ids=np.array([read]))
            p = np.exp(y[0, -1])
            found.append(-np.log(p[labels[t]] / p.sum()))
    assert len(found) > 2
    np.testing.assert_allclose(whole.loss()["loss"], np.mean(found), rtol=1e-12)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_models_of_one_stack_are_asked_as_ever(family: str) -> None:
    case = labelled("prompt_tuning", family)
    assert "attention_mask" not in case.arrays
    assert case.arrays["labels"].shape == case.arrays["ids"].shape
    assert "decoder_start_token_id" not in case.meta["model"]


def test_of_t5_both_versions_are_drawn_and_their_layers_found() -> None:
    drawn = strategies.model("lora", Spec().info(), families=("t5",))
    new = find(drawn, lambda s: "more" in s and "wi" in s["config"]["target_modules"], settings=QUIET)
    case = build.model("lora", "model", "logits", new, 0, want=["logits"])
    assert "model/lm_head.weight" in case.arrays
    assert any(".wi_1." in n for n in case.arrays if n.startswith("default/"))
    old = find(drawn, lambda s: "more" not in s, settings=QUIET)
    assert "model/lm_head.weight" not in build.model("lora", "model", "logits", old, 0, want=["logits"]).arrays


@pytest.mark.parametrize("method", known())
def test_every_method_that_has_them_is_asked_about_both(method: str) -> None:
    """T5 has no biases to train, and neither is a classifier here."""
    corners = {s["family"] for s in prop("logits").corners(method, Spec().info())}
    wanted = {"bitfit": {"bart"}, "p_tuning_v2": set()}.get(method, set(tiny.ENCODER_DECODERS))
    assert corners & set(tiny.ENCODER_DECODERS) == wanted
    assert set(tiny.HEAD).isdisjoint(tiny.ENCODER_DECODERS)


def test_other_properties_ask_about_them_where_they_are_drawn() -> None:
    p = prop("merge")
    assert {s["family"] for s in p.corners("lora", Spec().info())}.isdisjoint(tiny.ENCODER_DECODERS)
    for family in tiny.ENCODER_DECODERS:
        s = find(p.structure("lora", Spec().info()), lambda s, family=family: s["family"] == family, settings=QUIET)
        assert Yardstick(p.case("lora", s, 0)).judge(Spec().run(p.case("lora", s, 0))).kind is None


def test_a_classifier_of_bart_in_a_folder_is_asked_nothing() -> None:
    about = {"family": "bart", "architecture": "BartForSequenceClassification"}
    assert not any(p.fits("lora", about) for p in PROPERTIES)
    assert prop("logits").fits("lora", {**about, "architecture": "BartForConditionalGeneration"})


@pytest.mark.parametrize("name", STACKS)
def test_no_other_family_would_reveal_what_these_mutants_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {**Spec().info(), "families": [f for f in tiny.FAMILIES if f not in tiny.ENCODER_DECODERS]}
    monkeypatch.setattr(Spec, "info", lambda self: info)
    engine.opened.cache_clear()
    assert hunt(name, 0).by is None
    engine.opened.cache_clear()


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
@pytest.mark.parametrize("method", ["lora", "dora", "ln_tuning", "trainable_tokens", "prompt_tuning", "p_tuning"])
def test_hf_peft_agrees(method: str, family: str) -> None:
    target = open_target("peft")
    loss = ["loss"] if prop("loss").applies(method) else []
    for name in ("logits", "param-grads", "padding", "causal", "incremental", *loss):
        p = prop(name)
        (s,) = [s for s in p.corners(method, target.info()) if s["family"] == family]
        verdict = engine.examine(target, p.case(method, s, 3))
        assert not verdict.skipped
        assert verdict.verdict.kind is None, (name, verdict.verdict.detail)
