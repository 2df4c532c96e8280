"""Every op in one table; every statement about ops is checked for every row of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy import special, stats

from refpeft import check_op, ops

Array = np.ndarray[Any, Any]
rng = np.random.default_rng(0)
EXACT = 1e-12  # relative, in float64; what is measured is about 1e-16


def N(*shape: int) -> Array:
    return rng.normal(size=shape)


def ids(high: int, *shape: int) -> Array:
    return rng.integers(0, high, shape)


@dataclass(frozen=True)
class Case:
    name: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


def case(name: str, *args: Any, **options: Any) -> Case:
    return Case(name, getattr(ops, name.partition(" ")[0]), args, options)


hidden = np.ones((2, 1, 5, 5), bool)
hidden[0, 0, 2] = False  # one query that may see nothing
padded = np.tril(np.ones((3, 1, 5, 5), bool))
padded[1, ..., :2] = False  # left padding: two queries that may see nothing
ahead = np.tril(np.ones((1, 1, 3, 7), bool), 4)  # three queries after four cached keys

CASES = [
    case("linear", N(2, 3, 4), N(5, 4), N(5)),
    case("linear matrix", N(3, 4), N(5, 4), N(5)),
    case("linear no bias", N(2, 3, 4), N(5, 4)),
    case("linear one token", N(1, 1, 4), N(5, 4), N(5)),
    case("linear empty batch", N(0, 3, 4), N(5, 4), N(5)),
    case("linear four axes", N(2, 1, 3, 4), N(5, 4), N(5)),
    case("embedding", ids(5, 2, 3), N(5, 4)),
    case("embedding repeated", np.zeros((2, 3), int), N(5, 4)),
    case("embedding one token", ids(5, 1, 1), N(5, 4)),
    case("embedding empty batch", ids(5, 0, 3), N(5, 4)),
    case("layer_norm", N(2, 3, 4), N(4), N(4)),
    case("layer_norm matrix", N(3, 4), N(4), N(4)),
    case("layer_norm eps", N(3, 4), N(4), N(4), eps=1.0),
    case("layer_norm equal entries", np.ones((2, 4)), N(4), N(4)),
    case("layer_norm one token", N(1, 1, 4), N(4), N(4)),
    case("layer_norm empty batch", N(0, 3, 4), N(4), N(4)),
    case("rms_norm", N(2, 3, 4), N(4)),
    case("rms_norm matrix", N(3, 4), N(4)),
    case("rms_norm eps", N(3, 4), N(4), eps=1.0),
    case("rms_norm zeros", np.zeros((2, 4)), N(4)),
    case("rms_norm one token", N(1, 1, 4), N(4)),
    case("rms_norm empty batch", N(0, 3, 4), N(4)),
    *(case(f, 3 * N(2, 3, 8)) for f in ops.activations),
    *(case(f"{f} matrix", N(3, 4)) for f in ops.activations),
    *(case(f"{f} zero", np.zeros((1, 4))) for f in ops.activations if f != "relu"),  # relu has a corner at 0
    *(case(f"{f} one token", N(1, 1, 1)) for f in ops.activations),
    *(case(f"{f} empty batch", N(0, 3, 4)) for f in ops.activations),
    case("softmax", N(2, 3, 5)),
    case("softmax matrix", N(3, 5)),
    case("softmax equal entries", np.ones((2, 5))),
    case("softmax one entry", N(2, 1)),
    case("softmax masked", np.where(hidden[0, 0], N(5, 5), -np.inf)),
    case("softmax empty batch", N(0, 5)),
    case("rope", N(2, 5, 4, 6), N(2, 5, 1, 3), N(2, 5, 1, 3)),
    case("rope shared", N(2, 5, 4, 6), N(1, 5, 1, 3), N(1, 5, 1, 3)),
    case("rope one token", N(1, 1, 1, 2), N(1, 1, 1, 1), N(1, 1, 1, 1)),
    case("rope empty batch", N(0, 5, 4, 6), N(1, 5, 1, 3), N(1, 5, 1, 3)),
    case("attention", N(2, 5, 4, 6), N(2, 5, 4, 6), N(2, 5, 4, 6)),
    case("attention grouped", N(2, 5, 6, 4), N(2, 5, 2, 4), N(2, 5, 2, 4)),
    case("attention one kv head", N(2, 5, 6, 4), N(2, 5, 1, 4), N(2, 5, 1, 4)),
    case("attention causal", N(2, 5, 4, 6), N(2, 5, 4, 6), N(2, 5, 4, 6), padded[:1]),
    case("attention left padding", N(3, 5, 4, 6), N(3, 5, 2, 6), N(3, 5, 2, 6), padded),
    case("attention nothing seen", N(2, 5, 4, 6), N(2, 5, 4, 6), N(2, 5, 4, 6), hidden),
    case("attention nothing seen by any", N(2, 5, 4, 6), N(2, 5, 2, 6), N(2, 5, 2, 6), np.zeros((1, 1, 1, 5), bool)),
    case("attention longer keys", N(2, 3, 4, 6), N(2, 7, 4, 6), N(2, 7, 4, 6)),
    case("attention cached", N(2, 3, 4, 6), N(2, 7, 2, 6), N(2, 7, 2, 6), ahead),
    case("attention keys masked", N(2, 3, 4, 6), N(2, 7, 4, 6), N(2, 7, 4, 6), ahead[:, :, :1]),
    case("attention scale", N(2, 3, 4, 6), N(2, 3, 4, 6), N(2, 3, 4, 6), scale=0.3),
    case("attention bias", N(2, 5, 4, 6), N(2, 5, 4, 6), N(2, 5, 4, 6), padded[:1], N(1, 4, 5, 5)),
    case("attention bias grouped", N(2, 3, 4, 6), N(2, 7, 2, 6), N(2, 7, 2, 6), ahead, N(1, 4, 3, 7), scale=1.0),
    case("attention bias empty batch", N(0, 5, 4, 6), N(0, 5, 2, 6), N(0, 5, 2, 6), padded[:1], N(1, 4, 5, 5)),
    case("attention one token", N(1, 1, 2, 4), N(1, 1, 2, 4), N(1, 1, 2, 4), np.ones((1, 1, 1, 1), bool)),
    case("attention empty batch", N(0, 5, 4, 6), N(0, 5, 2, 6), N(0, 5, 2, 6), padded[:1]),
    case("pick", N(3, 5, 4), np.array([0, 4, 2])),
    case("pick one token", N(1, 1, 4), np.array([0])),
    case("pick empty batch", N(0, 5, 4), np.zeros(0, int)),
    case("cross_entropy", N(2, 3, 7), ids(7, 2, 3)),
    case("cross_entropy matrix", N(3, 7), ids(7, 3)),
    case("cross_entropy ignored", N(2, 3, 7), np.array([[1, -100, 6], [-100, 0, 3]])),
    case("cross_entropy ignored 0", N(4, 7), np.array([1, 0, 0, 6]), ignore_index=0),
    case("cross_entropy all ignored", N(2, 3, 7), np.full((2, 3), -100)),
    case("cross_entropy one token", N(1, 1, 7), ids(7, 1, 1)),
    case("cross_entropy empty batch", N(0, 3, 7), ids(7, 0, 3)),
    case("mse", N(2, 3), N(2, 3)),
    case("mse vector", N(3), N(3)),
    case("mse empty batch", N(0, 3), N(0, 3)),
]

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))


def pulled(case: Case, args: tuple[Any, ...], dy: Array | None = None) -> tuple[Array, list[Array | None]]:
    """The op's value, and the cotangents of these arguments for a dy drawn from a fixed seed."""
    y, vjp = case.op(*args, **case.options)
    dy = np.random.default_rng(1).normal(size=y.shape).astype(y.dtype) if dy is None else dy
    cotangents = vjp(dy)
    assert not any(cotangents[len(args) :])  # of optional arguments that were not given
    return y, [d and d() for d in cotangents[: len(args)]]


def each(f: Callable[[Array], Array], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """f of every argument of a floating dtype."""
    return tuple(f(a) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args)


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


@every
def test_vjp_is_the_derivative(case: Case) -> None:
    assert check_op(case.op, *case.args, **case.options) <= EXACT


@every
def test_everything_is_finite_and_of_its_argument_s_shape(case: Case) -> None:
    y, cotangents = pulled(case, case.args)
    assert np.isfinite(y).all()
    for a, d in zip(case.args, cotangents, strict=True):
        if d is not None:
            assert d.shape == a.shape
            assert np.isfinite(d).all()


def test_the_table_has_every_op() -> None:
    public = {name for name, f in vars(ops).items() if getattr(f, "__wrapped__", None) and not name.startswith("_")}
    assert {case.name.partition(" ")[0] for case in CASES} == public


# ── what holds for every op ──────────────────────────────────────────────────────────────────────────────────────────


@every
def test_nothing_is_written_into_an_argument(case: Case) -> None:
    args = tuple(a.copy() if isinstance(a, np.ndarray) else a for a in case.args)
    for a in args:
        if isinstance(a, np.ndarray):
            a.setflags(write=False)
    y, vjp = case.op(*args, **case.options)
    dy = np.array(np.random.default_rng(1).normal(size=y.shape))
    dy.setflags(write=False)
    y.setflags(write=False)
    thunks = [d for d in vjp(dy) if d]
    first = [d().copy() for d in thunks]
    for d, before in zip(reversed(thunks), reversed(first), strict=True):  # asked for again, in another order
        np.testing.assert_array_equal(d(), before)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtype_is_kept_and_rounded_once(case: Case, dtype: Any) -> None:
    narrow = each(lambda a: a.astype(dtype), case.args)
    y, cotangents = pulled(case, narrow)
    assert y.dtype == dtype
    dy = np.random.default_rng(1).normal(size=y.shape).astype(dtype)
    exact, exact_cotangents = pulled(case, each_wide(narrow), wide(dy))
    close(y, exact, dtype)
    for a, d, e in zip(narrow, cotangents, exact_cotangents, strict=True):
        if d is not None:
            assert d.dtype == a.dtype
            close(d, e, dtype)


def wide(a: Array) -> Array:
    return np.asarray(a, np.float64)


def each_wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(wide(a) if isinstance(a, np.ndarray) and a.dtype.kind in "fV" else a for a in args)


def close(got: Array, exact: Any, dtype: Any, units: float = 16) -> None:
    """Within some units in the last place of the largest entry."""
    u = float(ml_dtypes.finfo(dtype).eps)
    assert np.abs(wide(got) - exact).max(initial=0) <= units * u * np.abs(exact).max(initial=1e-3)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_16_bits_beside_float32_give_float32_and_each_cotangent_its_own_dtype(half: Any) -> None:
    x, W = N(3, 4).astype(np.float32), N(5, 4).astype(half)
    y, vjp = ops.linear(x, W)
    dx, dW, *_ = vjp(np.ones_like(y))
    assert (y.dtype, dx().dtype, dW().dtype) == (np.float32, np.float32, half)


@every
def test_strides_do_not_matter(case: Case) -> None:
    def strided(a: Array) -> Array:
        return np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a

    def turned(a: Array) -> Array:
        return np.asfortranarray(a)

    y, cotangents = pulled(case, case.args)
    for other in (strided, turned):
        y2, cotangents2 = pulled(case, each(other, case.args))
        np.testing.assert_allclose(y2, y, rtol=EXACT, atol=EXACT)
        for d, d2 in zip(cotangents, cotangents2, strict=True):
            if d is not None:
                np.testing.assert_allclose(d2, d, rtol=EXACT, atol=EXACT)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_values_overflow_nowhere(case: Case, dtype: Any) -> None:
    """Any warning is an error in these tests."""
    y, cotangents = pulled(case, each(lambda a: (a * 1e4).astype(dtype), case.args))
    assert np.isfinite(y).all()
    assert all(np.isfinite(d).all() for d in cotangents if d is not None)


@pytest.mark.parametrize("op", [*ops.activations.values(), ops.softmax], ids=lambda op: op.__name__)
def test_the_largest_float16_overflows_nowhere(op: Callable[..., Any]) -> None:
    y, vjp = op(np.array([[65504, -65504, 0]], np.float16))
    assert np.isfinite(y).all()
    assert np.isfinite(vjp(np.ones_like(y))[0]()).all()


# ── values, against other ways of saying the same ────────────────────────────────────────────────────────────────────


def naive_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, bias: Array | None = None, scale: float | None = None
) -> Array:
    """One query at a time."""
    b, s, h, e = q.shape
    t, g = k.shape[1:3]
    y = np.zeros_like(q)
    mask = np.broadcast_to(True if mask is None else mask, (b, 1, s, t))
    for n in np.ndindex(b, s, h):
        seen = mask[n[0], 0, n[1]]
        if seen.any():
            head = n[2] // (h // g)
            score = k[n[0], seen, head] @ q[n] * (e**-0.5 if scale is None else scale)
            score = score if bias is None else score + bias[0, n[2], n[1], seen]
            y[n] = special.softmax(score) @ v[n[0], seen, head]
    return y


def naive_layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * g + b


def naive_rms_norm(x: Array, g: Array, eps: float = 1e-6) -> Array:
    return x / np.sqrt(np.linalg.norm(x, axis=-1, keepdims=True) ** 2 / x.shape[-1] + eps) * g


def naive_rope(x: Array, cos: Array, sin: Array) -> Array:
    """A rotation of the plane is a product of complex numbers."""
    x1, x2 = np.split(x, 2, axis=-1)
    z = (x1 + 1j * x2) * (cos + 1j * sin)
    return np.concatenate([z.real, z.imag], axis=-1)


def naive_softmax(x: Array) -> Array:
    rows = [special.softmax(r) if np.isfinite(r).any() else np.zeros_like(r) for r in x.reshape(-1, x.shape[-1])]
    return np.array(rows).reshape(x.shape)


def naive_cross_entropy(x: Array, labels: Array, ignore_index: int = -100) -> float:
    logp = special.log_softmax(x, axis=-1)
    kept = [-logp[(*at, label)] for at, label in np.ndenumerate(labels) if label != ignore_index]
    return float(np.mean(kept)) if kept else 0.0


NAIVE: dict[str, Callable[..., Any]] = {
    "linear": lambda x, W, b=0.0: np.einsum("...i,oi->...o", x, W) + b,
    "embedding": lambda ids, E: np.eye(len(E))[ids] @ E,
    "layer_norm": naive_layer_norm,
    "rms_norm": naive_rms_norm,
    "gelu": lambda x: x * stats.norm.cdf(x),
    "gelu_new": lambda x: x * special.expit(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: x * special.expit(x),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": lambda x: 2 * special.expit(2 * x) - 1,
    "softmax": naive_softmax,
    "rope": naive_rope,
    "attention": naive_attention,
    "pick": lambda x, index: np.array([row[n] for row, n in zip(x, index, strict=True)]).reshape(-1, x.shape[-1]),
    "cross_entropy": naive_cross_entropy,
    "mse": lambda x, y: ((x - y) ** 2).mean() if x.size else 0.0,
}


@every
def test_value(case: Case) -> None:
    y, _ = case.op(*case.args, **case.options)
    expected = NAIVE[case.name.partition(" ")[0]](*case.args, **case.options)
    assert y.shape == np.shape(expected)
    np.testing.assert_allclose(y, expected, rtol=EXACT, atol=1e-14)


def test_a_query_that_sees_nothing_gives_zeros_and_gets_no_gradient() -> None:
    q, k, v = N(2, 5, 4, 6), N(2, 5, 2, 6), N(2, 5, 2, 6)
    y, vjp = ops.attention(q, k, v, hidden)
    dq, dk, dv, *_ = vjp(N(*y.shape))
    assert not y[0, 2].any()
    assert not dq()[0, 2].any()
    assert dq()[0, 1].any()
    assert np.isfinite(dk()).all()
    assert np.isfinite(dv()).all()


def test_softmax_of_large_entries_is_that_of_their_differences() -> None:
    y, _ = ops.softmax(np.array([[1e300, 1e300], [-1e300, -1e300]]))
    np.testing.assert_array_equal(y, 0.5)


def test_relu_has_derivative_0_at_0() -> None:
    _, vjp = ops.relu(np.zeros(3))
    np.testing.assert_array_equal(vjp(np.ones(3))[0](), 0)


def test_all_ignored_is_a_loss_of_0() -> None:
    y, vjp = ops.cross_entropy(N(3, 7), np.full(3, -100))
    assert y == 0
    assert not vjp(np.array(1.0))[0]().any()


@every
def test_ids_masks_and_labels_have_no_derivative_and_everything_else_has_one(case: Case) -> None:
    _, cotangents = pulled(case, case.args)
    constant = [a.dtype.kind != "f" for a in case.args]
    if case.op is ops.rope:
        constant = [False, True, True]  # cos and sin of positions
    assert [d is None for d in cotangents] == constant


class Foreign:
    """An array type of one's own that answers for named ops."""

    ndim, shape, T = 2, (3, 4), property(lambda self: self)

    def __matmul__(self, other: Any) -> Array:
        return np.zeros((3, 5))

    def __op__(self, name: str, args: tuple[Any, ...], options: dict[str, Any], y: Array) -> str:
        return f"{name} of {len(args)} gives {list(y.shape)}"


def test_a_foreign_array_may_answer_for_an_op() -> None:
    y, _ = ops.linear(Foreign(), N(5, 4))
    assert y == "linear of 2 gives [3, 5]"


# ── values and gradients, against torch ──────────────────────────────────────────────────────────────────────────────


def torch_op(name: str) -> Callable[..., Any]:
    import torch

    F = torch.nn.functional

    def attention(q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None, scale: float | None = None) -> Any:
        n = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2)))
        mask = mask if bias is None else torch.where(mask, bias, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)

    table: dict[str, Callable[..., Any]] = {
        "linear": F.linear,
        "embedding": F.embedding,
        "layer_norm": lambda x, g, b, eps=1e-5: F.layer_norm(x, g.shape, g, b, eps),
        "rms_norm": lambda x, g, eps=1e-6: F.rms_norm(x, g.shape, g, eps),
        "gelu": F.gelu,
        "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "tanh": torch.tanh,
        "softmax": lambda x: F.softmax(x, -1),
        "attention": attention,
        "cross_entropy": lambda x, labels, ignore_index=-100: F.cross_entropy(
            x.flatten(0, -2), labels.flatten(), ignore_index=ignore_index
        ),
        "mse": F.mse_loss,
    }
    return table[name]


ELSEWHERE = ("rope", "pick", "empty", "nothing seen", "left padding", "all ignored", "softmax masked")  # nan in torch
IN_TORCH = [case for case in CASES if not any(word in case.name for word in ELSEWHERE)]


@pytest.mark.peft
@pytest.mark.parametrize("case", IN_TORCH, ids=lambda case: case.name.replace(" ", "-"))
def test_torch_says_the_same(case: Case) -> None:
    import torch

    tensors = [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in case.args]
    theirs = torch_op(case.name.partition(" ")[0])(*tensors, **case.options)
    y, cotangents = pulled(case, case.args)
    theirs.backward(torch.tensor(np.random.default_rng(1).normal(size=y.shape)))
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=EXACT, atol=1e-14)
    for tensor, d in zip(tensors, cotangents, strict=True):
        if d is not None:
            np.testing.assert_allclose(d, tensor.grad.numpy(), rtol=1e-10, atol=1e-13)
