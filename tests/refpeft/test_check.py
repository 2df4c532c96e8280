"""The checker is checked: it must see planted errors, and must not see any where there is none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import check_model, check_op, ops
from refpeft.methods import lora
from tests.models import tiny

Array = np.ndarray[Any, Any]
rng = np.random.default_rng(0)
x, W, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4)), rng.normal(size=5)
PLANTED = 1e-6  # what every planted error must exceed; right gradients stay below 1e-12


def linear(dx: Callable[[Array], Any], dW: Callable[[Array], Any]) -> Callable[..., Any]:
    """y = x Wᵀ with these cotangents."""
    return lambda x, W: (x @ W.T, lambda dy: (dx(dy), dW(dy)))


def right_dx(dy: Array) -> Array:
    return dy @ W


def right_dW(dy: Array) -> Array:
    return np.einsum("bso,bsi->oi", dy, x)


def test_cotangents_may_be_arrays_functions_or_none() -> None:
    assert check_op(linear(right_dx, right_dW), x, W) < 1e-12
    assert check_op(linear(lambda dy: lambda: right_dx(dy), right_dW), x, W) < 1e-12
    assert check_op(linear(lambda dy: None, right_dW), x, W) < 1e-12
    assert check_op(lambda x: (x * x, lambda dy: 2 * x * dy), x) < 1e-12  # one argument: its cotangent alone


WRONG = {
    "a factor": linear(right_dx, lambda dy: right_dW(dy) / 2),
    "the sign": linear(lambda dy: -right_dx(dy), right_dW),
    "one entry": linear(lambda dy: right_dx(dy) * (np.arange(4) != 2), right_dW),
    "a little": linear(lambda dy: right_dx(dy) * (1 + 1e-3), right_dW),
    "a row left out of the sum": linear(right_dx, lambda dy: right_dW(dy) - dy[0, 0][:, None] * x[0, 0]),
    "the second argument's only": linear(right_dx, lambda dy: right_dW(dy) + 1),
    "zero": linear(lambda dy: np.zeros_like(x), right_dW),
    "not a number": linear(lambda dy: right_dx(dy) * np.nan, right_dW),
    "infinite": linear(lambda dy: right_dx(dy) + np.inf, right_dW),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_planted_errors_are_seen(wrong: Callable[..., Any]) -> None:
    assert check_op(wrong, x, W) > PLANTED


def test_a_missing_term_is_seen() -> None:
    def softmax(x: Array) -> tuple[Array, Any]:
        y, _ = ops.softmax(x)
        return y, lambda dy: y * dy  # without − y Σ dy ⊙ y

    assert check_op(softmax, x) > PLANTED


def test_the_mean_left_out_of_layer_norm_s_gradient_is_seen() -> None:
    def layer_norm(x: Array, g: Array) -> tuple[Array, Any]:
        ρ = 1 / np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-5)
        n = (x - x.mean(-1, keepdims=True)) * ρ
        return n * g, lambda dy: (ρ * (dy * g - n * (dy * g * n).mean(-1, keepdims=True)), (dy * n).sum((0, 1)))

    assert check_op(layer_norm, x, W[0]) > PLANTED


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (1, 4), (4,), ()])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    wrong = linear(lambda dy: np.zeros(shape), right_dW)
    with pytest.raises(ValueError, match=r"cotangent 0 has shape .*, its argument \[2, 3, 4\]"):
        check_op(wrong, x, W)


def test_a_cotangent_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="cotangent"):
        check_op(lambda x, W: (x @ W.T, lambda dy: (right_dx(dy),)), x, W)


def test_float32_arguments_are_checked_in_float64() -> None:
    assert check_op(ops.linear, x.astype(np.float32), W.astype(np.float32), b.astype(np.float32)) < 1e-12


def test_integers_are_left_alone() -> None:
    assert check_op(ops.embedding, np.array([[0, 3], [3, 1]]), W) < 1e-12


def test_options_are_passed_on() -> None:
    assert check_op(ops.layer_norm, x, W[0], W[1], eps=0.5) < 1e-12


def test_a_formula_that_is_not_holomorphic_is_seen() -> None:
    """abs of values kills the imaginary step: the check cannot be passed by accident."""
    assert check_op(lambda x: (np.abs(x), lambda dy: dy * np.sign(x)), x) > PLANTED


# ── a whole model ────────────────────────────────────────────────────────────────────────────────────────────────────

IDS = rng.integers(0, 29, (2, 5))


def test_check_model_names_every_parameter() -> None:
    model = tiny("gpt2")
    one = refpeft.init("lora", {"r": 2}, model)
    assert set(check_model(model, IDS, one)) == set(one.params)
    assert set(check_model(model, IDS, one, base=True)) == set(one.params) | set(model.params)
    assert set(check_model(model, IDS, one, base=["transformer.wte.weight"])) == {*one.params, "transformer.wte.weight"}
    two = check_model(model, IDS, [one, one])
    assert set(two) == {f"{k}:{name}" for k in (0, 1) for name in one.params}


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_models_pass(family: str) -> None:
    assert max(check_model(tiny(family), IDS, base=True).values()) < 1e-12


def test_a_wrong_gradient_in_a_method_is_seen_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA whose A gets its gradient without the scale s = 1/2."""
    model = tiny("gpt2")
    adapter = refpeft.init("lora", {"r": 2, "lora_alpha": 1, "init_lora_weights": False}, model)

    def wrap(cfg: Any, φ: Any, part: Any, mask: Any = None) -> Any:
        scaled = replace(φ, values={**φ.values, "A": φ["A"] / 2})
        return lora.branch(part, lora.low_rank(replace(cfg, lora_alpha=cfg.r), scaled, part))

    monkeypatch.setattr(lora, "wrap", wrap)
    found = check_model(model, IDS, adapter)
    assert all((difference > PLANTED) == name.endswith("lora_A.weight") for name, difference in found.items())
