"""Optimisers, schedules and clipping: against torch, transformers and peft, step for step, and by identities."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refpeft import optim
from tests.models import config_json, tiny

Named = dict[str, Any]
SHAPES = {"W": (5, 3), "b": (4,), "T": (2, 3, 4), "s": (1,)}


def drawn(seed: int, dtype: Any = np.float64) -> Named:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def ours(init: Any, update: Any, steps: int = 12, dtype: Any = np.float64, **options: Any) -> Named:
    params = drawn(0, dtype)
    state = init(params)
    for n in range(steps):
        params, state = update(params, drawn(n + 1, dtype), state, **options)
    return params


def theirs(make: Callable[[list[Any]], Any], steps: int = 12) -> Named:
    """The same steps with an optimiser of torch."""
    import torch

    params = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in drawn(0).items()}
    optimizer = make(list(params.values()))
    for n in range(steps):
        for name, g in drawn(n + 1).items():
            params[name].grad = torch.tensor(g)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in params.items()}


def close(a: Named, b: Named, tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


# ── step for step ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peft
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    ],
)
def test_sgd_is_torchs(options: Named) -> None:
    import torch

    close(ours(optim.sgd_init, optim.sgd, **options), theirs(lambda p: torch.optim.SGD(p, **options)))


@pytest.mark.peft
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3}, {"lr": 0.05, "weight_decay": 0.1}]
)
def test_adam_and_adamw_are_torchs(options: Named) -> None:
    import torch

    close(ours(optim.adam_init, optim.adam, **options), theirs(lambda p: torch.optim.Adam(p, **options)))
    close(ours(optim.adam_init, optim.adamw, **options), theirs(lambda p: torch.optim.AdamW(p, **options)))


@pytest.mark.peft
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"warmup_init": True},
        {"scale_parameter": False},
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "clip_threshold": 0.5},
        {"lr": 0.02, "relative_step": False, "beta1": 0.8, "weight_decay": 0.1, "decay_rate": -0.5},
    ],
)
def test_adafactor_is_that_of_transformers(options: Named) -> None:
    from transformers.optimization import Adafactor

    def init(params: Named) -> Named:
        return optim.adafactor_init(params, options.get("beta1"))

    close(ours(init, optim.adafactor, **options), theirs(lambda p: Adafactor(p, **options)))


@pytest.mark.peft
def test_rates_and_decays_of_their_own_are_torchs_groups() -> None:
    import torch

    rates, decays = {"W": 0.1, "b": 0.02, "T": 0.3, "s": 0.0}, {"W": 0.0, "b": 0.1, "T": 0.2, "s": 0.3}

    def make(params: list[Any]) -> Any:
        groups = [
            {"params": [p], "lr": rates[n], "weight_decay": decays[n]} for n, p in zip(SHAPES, params, strict=True)
        ]
        return torch.optim.AdamW(groups)

    close(ours(optim.adam_init, optim.adamw, lr=rates, weight_decay=decays), theirs(make))


# ── what holds of itself ─────────────────────────────────────────────────────────────────────────────────────────────

ALL = [
    (optim.sgd_init, optim.sgd, {"momentum": 0.9}),
    (optim.adam_init, optim.adam, {}),
    (optim.adam_init, optim.adamw, {}),
    (optim.adafactor_init, optim.adafactor, {}),
]


@pytest.mark.parametrize(("init", "update", "options"), ALL)
def test_o1_nothing_is_written_into(init: Any, update: Any, options: Named) -> None:
    params, grads = drawn(0), drawn(1)
    params, state = update(params, grads, init(params), **options)
    for given in (params, grads, state):
        for a in given.values():
            a.flags.writeable = False
    first, second = (update(params, grads, state, **options) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("init", "update", "options"), ALL)
def test_o2_parameters_are_independent(init: Any, update: Any, options: Named) -> None:
    together = ours(init, update, **options)
    for name in SHAPES:
        params = {name: drawn(0)[name]}
        state = init(params)
        for n in range(12):
            params, state = update(params, {name: drawn(n + 1)[name]}, state, **options)
        assert np.array_equal(params[name], together[name])


@pytest.mark.parametrize(("init", "update", "options"), ALL)
def test_dtypes_are_kept(init: Any, update: Any, options: Named) -> None:
    single = ours(init, update, dtype=np.float32, **options)
    assert {a.dtype for a in single.values()} == {np.dtype(np.float32)}
    close({n: a.astype(float) for n, a in single.items()}, ours(init, update, **options), 1e-4)
    half = ours(init, update, steps=2, dtype=np.float16, **options)
    assert {a.dtype for a in half.values()} == {np.dtype(np.float16)}
    _, state = update(drawn(0, np.float16), drawn(1, np.float16), init(drawn(0, np.float16)), **options)
    assert all(a.dtype == np.float32 for name, a in state.items() if name != "step")


def test_o3_adams_first_step_has_the_size_of_the_learning_rate() -> None:
    params = {"p": np.zeros(3)}
    new, _ = optim.adam(params, {"p": np.array([1e-3, -7.0, 1e5])}, optim.adam_init(params), lr=0.25, eps=0.0)
    np.testing.assert_allclose(new["p"], [-0.25, 0.25, -0.25], rtol=1e-14)


def test_o4_what_is_left_without_momentum_and_decay() -> None:
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            ours(optim.adam_init, optim.adam, weight_decay=0.0).values(),
            ours(optim.adam_init, optim.adamw, weight_decay=0.0).values(),
            strict=True,
        )
    )
    params, grads = {"p": np.array([3.0, -8.0])}, {"p": np.array([2.0, 4.0])}
    new, state = optim.sgd(params, grads, optim.sgd_init(params), lr=0.5)
    assert new["p"].tolist() == [2.0, -10.0]
    assert state["step"] == 1


def test_a_parameter_without_a_gradient_stays_and_an_unknown_gradient_is_refused() -> None:
    params = drawn(0)
    new, _ = optim.adam(params, {"W": params["W"]}, optim.adam_init(params))
    assert new["b"] is params["b"]
    with pytest.raises(ValueError, match="'X', which is not a parameter"):
        optim.adam(params, {"X": params["W"]}, optim.adam_init(params))
    with pytest.raises(ValueError, match=r"gradient of 'W' must have shape \(5, 3\), found \(4,\)"):
        optim.adam(params, {"W": params["b"]}, optim.adam_init(params))


def test_options_that_contradict_each_other_are_refused() -> None:
    params = drawn(0)
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        optim.sgd(params, params, optim.sgd_init(params), nesterov=True)
    with pytest.raises(ValueError, match="lr must be None"):
        optim.adafactor(params, params, optim.adafactor_init(params), lr=0.1)
    with pytest.raises(ValueError, match="lr must be given"):
        optim.adafactor(params, params, optim.adafactor_init(params), relative_step=False)


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peft
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (5, 5), (1, 2)])
def test_schedules_are_those_of_transformers(warmup: int, total: int) -> None:
    import torch
    import transformers as t

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for factor, schedule in (
        (lambda n: optim.linear(n, warmup, total), t.get_linear_schedule_with_warmup(optimizer, warmup, total)),
        (lambda n: optim.cosine(n, warmup, total), t.get_cosine_schedule_with_warmup(optimizer, warmup, total)),
        (
            lambda n: optim.cosine(n, warmup, total, 1.5),
            t.get_cosine_schedule_with_warmup(optimizer, warmup, total, 1.5),
        ),
        (lambda n: optim.constant(n, warmup), t.get_constant_schedule_with_warmup(optimizer, warmup)),
    ):
        (of,) = schedule.lr_lambdas
        for n in range(total + 3):
            assert math.isclose(factor(n), of(n), rel_tol=1e-15, abs_tol=1e-15)


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peft
@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e4])
def test_clipping_is_torchs(max_norm: float) -> None:
    import torch

    params = [torch.nn.Parameter(torch.tensor(p)) for p in drawn(0).values()]
    for p, g in zip(params, drawn(1).values(), strict=True):
        p.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped, found = optim.clip_by_global_norm(drawn(1), max_norm)
    assert math.isclose(found, float(norm), rel_tol=1e-14)
    close(clipped, {n: p.grad.numpy() for n, p in zip(SHAPES, params, strict=True) if p.grad is not None})


def test_accumulating_weighs_each_part_by_its_terms() -> None:
    total = optim.accumulate([(1, {"p": np.array([8.0])}), (3, {"p": np.array([4.0]), "q": np.array([4.0])})])
    assert total["p"].tolist() == [5.0]
    assert total["q"].tolist() == [3.0]


# ── LoRA+ ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peft
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["c_attn", "c_fc"]},
        {"target_modules": ["c_attn", "wte"], "use_dora": True},
        {"target_modules": ["c_attn"], "lora_bias": True},
        {"target_modules": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe", "ln_1"]},
    ],
    ids=str,
)
def test_loraplus_groups_are_those_of_peft(config: Named) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    source = {k: v for k, v in config_json("gpt2").items() if k not in ("model_type", "architectures")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about each other
        model = get_peft_model(
            transformers.GPT2LMHeadModel(transformers.GPT2Config(**source)),
            LoraConfig(r=2, fan_in_fan_out=True, **config),
        )
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.25, loraplus_lr_embedding=0.125
    )
    of = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    params, expected = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts = name.removeprefix("base_model.model.").split(".")
            ours_ = ".".join(n for n in parts if n not in ("default", "base_layer", "modules_to_save"))
            params[ours_], expected[ours_] = p.detach().numpy(), of[id(p)]
    base = tiny("gpt2")
    norms = [s.path for s in base.sites.values() if s.kind == "layer_norm"]
    rates, decays = optim.loraplus(params, 0.5, 4.0, 0.25, 0.125, norms)
    assert {name: (rates[name], decays[name]) for name in params} == expected
