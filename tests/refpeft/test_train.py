"""Training as a function from state to state: what T1 to T3 claim, and that it learns."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import objectives, train
from refpeft.checkpoint.safetensors import Malformed
from refpeft.checkpoint.training import load_state, save_state
from refpeft.objectives import Setting
from refpeft.train import Plan, State
from tests.models import tiny

OBJECTIVE = objectives.make("causal", Setting())


def rows(count: int = 12, longest: int = 9) -> list[Any]:
    """Counting up from anywhere: easy to learn."""
    rng = np.random.default_rng(0)
    return [
        {"input_ids": [int(s + k) % 29 for k in range(rng.integers(3, longest))]} for s in rng.integers(0, 29, count)
    ]


def trained(plan: Plan, steps: int | None = None, state: State | None = None, **config: Any) -> State:
    model = tiny("gpt2")
    adapter = refpeft.init("lora", {"r": 4, **config}, model)
    state = state or train.start(plan, adapter)
    while state.step < (steps or plan.steps):
        state = train.step(plan, model, adapter, OBJECTIVE, rows(), state)
    return state


def same(a: State, b: State) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)

    return (
        a.step == b.step and equal(a.params, b.params) and equal(a.moments, b.moments) and (a.losses == b.losses).all()
    )


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_t1_a_run_that_was_stopped_goes_on_to_the_bit(optimizer: str, tmp_path: Any) -> None:
    plan = Plan(steps=6, batch=5, lr=0.01, optimizer=optimizer, accumulate=2, schedule="cosine", warmup=2, clip=1.0)
    whole = trained(plan, lora_dropout=0.25)
    save_state(tmp_path / "state", trained(plan, steps=3, lora_dropout=0.25), {"a": 1})
    like = train.start(plan, refpeft.init("lora", {"r": 4}, tiny("gpt2")))
    assert same(trained(plan, state=load_state(tmp_path / "state", like, {"a": 1}), lora_dropout=0.25), whole)
    assert not same(trained(replace(plan, seed=1), lora_dropout=0.25), whole)


def test_t2_accumulated_batches_have_the_gradient_of_one() -> None:
    """SGD with lr 1: what is taken away from the parameters is the gradient."""
    one = Plan(steps=1, batch=12, lr=1.0, optimizer="sgd", schedule="constant")
    first, second = trained(one), trained(replace(one, batch=3, accumulate=4))
    for name, p in first.params.items():
        np.testing.assert_allclose(second.params[name], p, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(second.losses, first.losses, rtol=1e-13)


def test_t3_every_row_once_before_any_twice() -> None:
    plan = Plan(batch=4)
    seen = [n for turn in range(15) for n in train.chosen(plan, 10, turn)]
    epochs = [seen[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 0.3, "momentum": 0.9, "clip": 1.0},
        {"optimizer": "adam", "lr": 0.02},
        {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.01, "schedule": "cosine", "warmup": 5},
        {"optimizer": "adafactor", "lr": 0.02},
        {"optimizer": "adamw", "lr": 0.005, "loraplus_ratio": 8.0},
    ],
    ids=str,
)
def test_the_loss_falls(options: Any) -> None:
    losses = trained(Plan(steps=40, batch=8, **options), target_modules="all-linear").losses
    assert losses[-5:].mean() < 0.6 * losses[0]


def test_lora_plus_moves_b_faster() -> None:
    """SGD's first step is lr times the gradient: with ratio 8, eight times as far for B, and A stays (its gradient is
    0 as long as B is)."""
    plan = Plan(steps=1, lr=0.5, optimizer="sgd", schedule="constant")
    plain, plus = trained(plan), trained(replace(plan, loraplus_ratio=8.0))
    for name, p in plain.params.items():
        if "lora_B" in name:
            assert np.abs(p).max() > 0
            np.testing.assert_allclose(plus.params[name], 8 * p, rtol=1e-14)
        else:
            assert np.array_equal(plus.params[name], p)


def test_nothing_is_written_into() -> None:
    plan = Plan(steps=2, batch=2)
    state = trained(plan, steps=1)
    for a in [*state.params.values(), *state.moments.values(), state.losses]:
        a.flags.writeable = False
    assert same(trained(plan, state=state), trained(plan, state=state))


def test_an_encoder_decoder_model_gets_its_decoders_ids() -> None:
    """By a model that answers with what it was asked."""
    asked: dict[str, Any] = {}

    def model(ids: Any, adapter: Any, **given: Any) -> Any:
        asked.update(given, ids=ids)
        logits = np.zeros((*given["decoder_input_ids"].shape, 9))
        return logits, lambda dout: {"p": dout.sum((0, 1))}

    setting = Setting(start_id=0, eos_id=1, encoder_decoder=True)
    objective = objectives.make("seq2seq", setting)
    batch = objective.batch([{"input_ids": [5, 1], "labels": [7, 8, 1]}], np.random.default_rng(0))
    L, n, grads = train.gradient(model, None, objective, batch)  # type: ignore[arg-type]
    assert asked["ids"].tolist() == [[5, 1]]
    assert asked["decoder_input_ids"].tolist() == [[0, 7, 8]]
    assert (L, n) == (pytest.approx(np.log(9)), 3)
    np.testing.assert_allclose(grads["p"], 1 / 9 - np.array([0, 1, 0, 0, 0, 0, 0, 1, 1]) / 3, atol=1e-15)


# ── plans and states that are none ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"lr": float("nan")}, "lr must be 0 or more, found nan"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, adafactor, found 'lion'"),
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine, found 'step'"),
        ({"momentum": 0.9}, "momentum and nesterov are options of sgd, not of adamw"),
        ({"optimizer": "sgd", "nesterov": True}, "nesterov needs a momentum above 0"),
        ({"loraplus_ratio": 0.0}, "loraplus_ratio must be above 0, found 0"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_are_refused(wrong: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(**wrong)


def test_states_of_another_run_are_refused(tmp_path: Any) -> None:
    plan = Plan(steps=4, batch=2)
    state = trained(plan, steps=2)
    with pytest.raises(Malformed, match="there is no training state"):
        load_state(tmp_path / "state", state, {})
    save_state(tmp_path / "state", state, {"lr": 1, "seed": 0})
    with pytest.raises(Malformed, match="began with lr 1 and cannot go on with 2"):
        load_state(tmp_path / "state", state, {"lr": 2, "seed": 0})
    other = train.start(plan, refpeft.init("lora", {"r": 2}, tiny("gpt2")))
    with pytest.raises(Malformed, match=r"must be float64 \[2, 16\], found float64 \[4, 16\]"):
        load_state(tmp_path / "state", other, {"lr": 1, "seed": 0})
    (tmp_path / "state" / "step-2" / "state.json").write_text("{}")
    with pytest.raises(Malformed, match="not the state of step 2"):
        load_state(tmp_path / "state", state, {})


def test_a_newer_state_takes_the_place_of_older_ones(tmp_path: Any) -> None:
    plan = Plan(steps=4, batch=2)
    for steps in (1, 2, 3):
        save_state(tmp_path / "state", trained(plan, steps=steps), {})
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-3"]
    (tmp_path / "state" / ".step-4.0.part").mkdir()  # what a killed writer leaves is no state
    assert load_state(tmp_path / "state", trained(plan, steps=1), {}).step == 3
