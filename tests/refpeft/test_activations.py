"""Activations that only adapters have: values from their definitions, derivatives by the complex step."""

import math

import numpy as np
import pytest

from refpeft.activations import ACTIVATIONS
from refpeft.check import check_op

X = np.concatenate([np.linspace(-8, 8, 33) + 0.01, [-60.0, 60.0]])
DEFINITIONS = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "linear": lambda x: x,
    "leaky_relu": lambda x: max(x, 0) + 0.01 * min(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
    "relu6": lambda x: min(max(x, 0), 6),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "relu": lambda x: max(x, 0),
    "gelu_new": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
SAME = {"swish": "silu", "leakyrelu": "leaky_relu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_new",
        "gelu_python_tanh": "gelu_new"}  # fmt: skip


def test_none_is_left_out() -> None:
    assert set(ACTIVATIONS) == set(DEFINITIONS) | set(SAME)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name: str) -> None:
    y, _ = ACTIVATIONS[name](X)
    want = [DEFINITIONS[SAME.get(name, name)](x) for x in X]
    np.testing.assert_allclose(y, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives(name: str) -> None:
    assert check_op(ACTIVATIONS[name], X) <= 1e-14


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes_are_kept_and_nothing_overflows(name: str, dtype: str) -> None:
    x = np.array([-200.0, -2.0, 0.0, 3.0, 200.0], dtype)
    y, vjp = ACTIVATIONS[name](x)
    (dx,) = vjp(np.ones_like(y))
    assert y.dtype == dx().dtype == dtype
    assert np.isfinite(y).all()
    assert np.isfinite(dx()).all()


@pytest.mark.peft
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"leakyrelu"}))
def test_those_of_transformers(name: str) -> None:
    import torch
    from transformers.activations import get_activation

    want = get_activation(name)(torch.tensor(X)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](X)[0], want, rtol=1e-12, atol=1e-13)
