"""Parts are lazy: linking a backward pass computes nothing, and each gradient is computed once, when asked for."""

from typing import Any

import numpy as np
import pytest

from refpeft.ops import Array, embedding, linear
from refpeft.part import BASE, Once, Part, join, link, lookup, make, op_run, plus, stored

rng = np.random.default_rng(0)
W, b, x = rng.normal(size=(5, 4)), rng.normal(size=5), rng.normal(size=(2, 3, 4))
KEYS = {(BASE, "W"), (BASE, "b")}


def part(kind: str, W: Array = W, b: Array | None = b) -> Part:
    return make("a.layer", kind, W, b, (BASE, "W"), (BASE, "b"), eps=1e-5)


def never() -> Array:
    raise AssertionError("this was not asked for")


def test_once_computes_when_asked_and_once() -> None:
    calls: list[int] = []
    value = Once(lambda n: calls.append(n) or n + 1, 4)
    assert calls == []
    assert (value(), value(), calls) == (5, 5, [4])


def test_once_lets_go_of_what_it_was_made_from() -> None:
    value = Once(np.negative, np.ones(3))
    value()
    assert value.args == ()
    assert value.make is None


def test_linking_computes_nothing() -> None:
    def vjp(dy: Array) -> Any:
        return never, lambda: 2 * dy, never

    asked: list[str] = []
    lazies = link(vjp, lambda: asked.append("dy") or np.ones(2), 3)
    assert asked == []
    np.testing.assert_array_equal(lazies[1](), 2)
    assert asked == ["dy"]


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "layer_norm", "rms_norm"])
def test_only_wanted_gradients_are_returned_and_none_is_computed(kind: str) -> None:
    norm = kind.endswith("norm")
    p = part(kind, b, None if kind == "rms_norm" else b) if norm else part(kind)
    _, back = p.run(rng.normal(size=(2, 5)) if norm else np.array([[0, 3]]) if kind == "embedding" else x)
    has = KEYS if kind != "rms_norm" else {(BASE, "W")}
    assert set(back(never, KEYS)[1]) == has
    assert set(back(never, {(BASE, "W")})[1]) == {(BASE, "W")}
    assert back(never, ())[1] == {}


def test_a_gradient_is_computed_without_the_others() -> None:
    p = part("linear")
    _, back = p.run(x)
    _, grads = back(lambda: np.ones((2, 3, 5)), {(BASE, "b")})
    np.testing.assert_array_equal(grads[BASE, "b"](), np.full(5, 6.0))


@pytest.mark.parametrize(("kind", "transposed"), [("linear", False), ("conv1d", True), ("embedding", True)])
def test_gradients_have_the_shape_in_which_the_weight_is_stored(kind: str, transposed: bool) -> None:
    p = part(kind)
    _, back = p.run(np.array([[0, 3, 3]]) if kind == "embedding" else x)
    dy = np.ones((1, 3, 5) if kind == "embedding" else (2, 3, 5))
    grads = back(lambda: dy, KEYS)[1]
    assert grads[BASE, "W"]().shape == stored(kind, W).shape == ((4, 5) if transposed else (5, 4))


def test_lookup_is_linear_on_one_hot_rows() -> None:
    ids = np.array([[0, 3, 3], [1, 1, 0]])
    (y, vjp), (y2, vjp2) = lookup(ids, W, b), linear(np.eye(4)[ids], W, b)
    np.testing.assert_allclose(y, y2)
    dy = rng.normal(size=y.shape)
    for d, d2 in list(zip(vjp(dy), vjp2(dy), strict=True))[1:]:
        assert d is not None
        assert d2 is not None
        np.testing.assert_allclose(d(), d2())
    np.testing.assert_array_equal(lookup(ids, W)[0], embedding(ids, W.T)[0])


def test_bare_is_the_matrix_alone_whatever_has_wrapped_the_part() -> None:
    p = part("linear")
    wrapped = p.wrapped(lambda x: (never(), lambda dy, want: (dy, {})))
    y, back = wrapped.bare(x)
    np.testing.assert_allclose(y, x @ W.T)
    assert set(back(never, KEYS)[1]) == {(BASE, "W")}
    assert (p.pristine, wrapped.pristine) == (True, False)


def test_join_sums_where_both_have_a_gradient() -> None:
    a, c = {(0, "A"): lambda: 1.0, (0, "B"): lambda: 2.0}, {(0, "B"): lambda: 5.0, (1, "A"): never}
    both = join(a, c)
    assert set(both) == {(0, "A"), (0, "B"), (1, "A")}
    assert both[0, "A"]() == 1.0
    assert both[0, "B"]() == 7.0
    assert join(a, {}) == a
    assert join({}, c) == c


def test_plus_computes_nothing_until_asked() -> None:
    assert plus(never, never) is not None
    assert plus(lambda: 1, lambda: 2)() == 3


def test_an_op_of_one_argument_is_a_run_without_parameters() -> None:
    def twice(x: Array) -> Any:
        return 2 * x, lambda dy: (lambda: 2 * dy,)

    y, back = op_run(twice)(x)
    dx, grads = back(lambda: y, KEYS)
    np.testing.assert_array_equal(dx(), 4 * x)
    assert grads == {}
