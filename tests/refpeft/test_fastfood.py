"""Fastfood against its factors as dense matrices (H from SciPy), and the claims of refpeft/fastfood.py."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.linalg import hadamard as dense

from refpeft import check_op
from refpeft.fastfood import BLOCK, fastfood, hadamard, length

Array = np.ndarray[Any, Any]
SIZES = [(1, 1), (3, 5), (5, 3), (7, 64), (64, 64), (200, 1000), (1000, 200)]  # d, D


def factors(L: int, seed: int = 0, dtype: Any = np.float64) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    B = rng.choice(np.array([-1, 1], np.int8), L)
    return B, rng.permutation(L).astype(np.int32), rng.normal(size=L).astype(dtype)


def matrix(B: Array, Π: Array, G: Array, d: int, D: int) -> Array:
    """P [D, d], column by column of the formula."""
    L = len(B)
    H = dense(L).astype(float)
    P = H @ np.diag(G) @ np.eye(L)[Π] @ H @ np.diag(B)
    return P[:D, :d] / math.sqrt(D * (G**2).sum())


@pytest.mark.parametrize("k", range(11))
def test_hadamard_is_scipys(k: int) -> None:
    x = np.random.default_rng(k).integers(-9, 9, 1 << k).astype(float)
    assert np.array_equal(hadamard(x.copy()), dense(1 << k) @ x)


@pytest.mark.parametrize("k", [11, 13, 15, 16, 17, 18, 20])
def test_hadamard_of_many_blocks_is_a_kronecker_product(k: int) -> None:
    """H (n m) x = H(n) X H(m) for the table X [n, m] of x: small integers, so bit for bit."""
    n, m = 1 << k // 2, 1 << (k - k // 2)
    assert k <= 16 or n * m > BLOCK
    x = np.random.default_rng(k).integers(-9, 9, n * m).astype(np.float32)
    expected = dense(n).astype(np.float32) @ x.reshape(n, m) @ dense(m).astype(np.float32)
    assert np.array_equal(hadamard(x.copy()), expected.reshape(-1))


def test_claim_f1_hadamard_twice_is_l_times_the_identity() -> None:
    x = np.random.default_rng(0).integers(-9, 9, 1 << 17).astype(float)
    assert np.array_equal(hadamard(hadamard(x.copy())), len(x) * x)


@pytest.mark.parametrize(("d", "D"), SIZES)
def test_fastfood_is_the_product_of_its_factors(d: int, D: int) -> None:
    B, Π, G = factors(length(D, d))
    rng = np.random.default_rng(1)
    θ, dy = rng.normal(size=d), rng.normal(size=D)
    P = matrix(B, Π, G, d, D)
    y, vjp = fastfood(θ, B, Π, G, D)
    dθ = vjp(dy)[0]
    assert dθ is not None
    assert np.abs(y - P @ θ).max() < 1e-14 * np.linalg.norm(θ)
    assert np.abs(dθ() - P.T @ dy).max() < 1e-14 * np.linalg.norm(dy)
    assert vjp(dy)[1:] == (None, None, None)


@pytest.mark.parametrize("d", [4, 60, 64])
def test_claim_f2_columns_have_length_1(d: int) -> None:
    B, Π, G = factors(64)
    P = np.stack([fastfood(e, B, Π, G, 64)[0] for e in np.eye(d)], axis=1)
    assert np.abs((P * P).sum(0) - 1).max() < 1e-14


def test_claim_f2_on_average_where_l_exceeds_d() -> None:
    lengths = []
    for seed in range(20):
        B, Π, G = factors(64, seed)
        lengths += [(fastfood(e, B, Π, G, 40)[0] ** 2).sum() for e in np.eye(40)]
    assert abs(np.mean(lengths) - 1) < 0.02  # 800 values of which each is within about 0.2 of 1


@pytest.mark.parametrize(("d", "D"), SIZES)
def test_claim_f3_the_gradient_is_the_transpose(d: int, D: int) -> None:
    B, Π, G = factors(length(D, d))
    assert check_op(lambda θ: fastfood(θ, B, Π, G, D), np.random.default_rng(1).normal(size=d)) < 1e-15


def test_claim_f3_over_many_blocks() -> None:
    D, d = 200_000, 3_000
    B, Π, G = factors(length(D, d))
    assert check_op(lambda θ: fastfood(θ, B, Π, G, D), np.random.default_rng(1).normal(size=d)) < 1e-14


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype_is_kept_and_nothing_is_written_into_arguments(dtype: Any) -> None:
    B, Π, G = factors(64, dtype=np.float32 if dtype == np.float16 else dtype)
    θ, dy = np.ones(20, dtype), np.ones(50, dtype)
    before = [a.copy() for a in (θ, dy, B, Π, G)]
    y, vjp = fastfood(θ, B, Π, G, 50, c=2.0)
    dθ = vjp(dy)[0]
    assert dθ is not None
    assert dθ().dtype == dtype
    assert y.dtype == (np.float32 if dtype == np.float16 else dtype)  # half with float32 gives float32, as in all ops
    for a, b in zip((θ, dy, B, Π, G), before, strict=True):
        assert np.array_equal(a, b)


def test_the_divisor_can_be_given() -> None:
    B, Π, G = factors(64)
    θ = np.arange(20.0)
    given = fastfood(θ, B, Π, G, 50, c=1.0)[0] / math.sqrt(50 * (G**2).sum())
    assert np.allclose(given, fastfood(θ, B, Π, G, 50)[0], rtol=1e-13, atol=1e-13)
