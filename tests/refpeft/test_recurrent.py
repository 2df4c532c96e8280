"""The LSTM: its gradients by the complex step, and everything against torch.nn.LSTM."""

import ml_dtypes
import numpy as np
import pytest

from refpeft import check_op
from refpeft.recurrent import lstm

SHAPES = [(1, True, 1, 1), (1, False, 3, 2), (2, True, 1, 5), (3, False, 2, 4), (3, True, 2, 4)]  # layers, ways, b, s
cases = pytest.mark.parametrize(("layers", "both", "b", "s"), SHAPES)
WIDTH, H = 4, 3


def drawn(layers, both, b, s, dtype=np.float64):
    """x and the weights, in torch's order."""
    rng = np.random.default_rng(0)
    ways = 2 if both else 1
    widths = [(WIDTH if n == 0 else ways * H) for n in range(layers) for _ in range(ways)]
    shapes = [shape for i in widths for shape in ((4 * H, i), (4 * H, H), (4 * H,), (4 * H,))]
    return [rng.normal(size=shape).astype(dtype) for shape in [(b, s, WIDTH), *shapes]]


@cases
def test_gradients_are_exact(layers, both, b, s):
    args = drawn(layers, both, b, s)
    assert check_op(lstm, *args, bidirectional=both) <= 1e-12
    if layers > 1:
        masks = np.random.default_rng(1).choice([0, 1.25], (layers - 1, b, s, (2 if both else 1) * H))
        assert check_op(lstm, *args, bidirectional=both, masks=masks) <= 1e-12


@pytest.mark.peft
@cases
def test_it_is_torchs(layers, both, b, s):
    import torch

    x, *weights = drawn(layers, both, b, s)
    module = torch.nn.LSTM(WIDTH, H, layers, bidirectional=both, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for p, w in zip(module.parameters(), weights, strict=True):
            p.copy_(torch.tensor(w))
    tx = torch.tensor(x, requires_grad=True)
    want, _ = module(tx)
    y, vjp = lstm(x, *weights, bidirectional=both)
    np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-14)
    dy = np.random.default_rng(2).normal(size=y.shape)
    want.backward(torch.tensor(dy))
    for thunk, theirs in zip(vjp(dy), [tx, *module.parameters()], strict=True):
        np.testing.assert_allclose(thunk(), theirs.grad, rtol=0, atol=1e-13)


def test_it_neither_promotes_nor_writes_nor_overflows():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        args = drawn(2, True, 2, 3, dtype)
        before = [a.copy() for a in args]
        y, vjp = lstm(*args)
        assert y.dtype == dtype
        assert all(thunk().dtype == dtype for thunk in vjp(np.ones_like(y)))
        assert all((a == b).all() for a, b in zip(args, before, strict=True))
    x, *weights = drawn(1, True, 1, 3)
    y, _ = lstm(1e5 * x, *weights)
    assert np.isfinite(y).all()


def test_the_backward_direction_is_the_forward_one_of_the_reversed_sequence():
    x, *w = drawn(1, True, 2, 4)
    y, _ = lstm(x, *w)
    z, _ = lstm(x[:, ::-1], *w[4:], *w[:4])
    np.testing.assert_allclose(z[:, ::-1, H:], y[..., :H], atol=1e-15)
    np.testing.assert_allclose(z[:, ::-1, :H], y[..., H:], atol=1e-15)
