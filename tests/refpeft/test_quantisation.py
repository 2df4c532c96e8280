"""NF4: its table, what is stored of a matrix, and what is read back."""

import ml_dtypes
import numpy as np
import pytest
from scipy.special import ndtri

from refpeft.quantisation import TABLE, ZERO, nf4, pack, read, rounded, unpack

rng = np.random.default_rng(0)
SHAPES = [(1, 1), (3, 5), (8, 8), (9, 15), (13, 10), (0, 4)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def test_the_table_is_quantiles_of_the_normal_distribution() -> None:
    """NF1"""
    δ = (31 / 32 + 29 / 30) / 2
    above, below = (ndtri(δ + (0.5 - δ) * np.arange(n) / n) for n in (8, 7))
    expected = np.sort([*above, *-below, 0]) / ndtri(δ)
    np.testing.assert_allclose(TABLE, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_read_back_is_stored_as_it_was(shape: tuple[int, int], dtype: type) -> None:
    """NF2"""
    W = rng.normal(size=shape).astype(dtype)
    c, a = nf4(W)
    again = read(c, a, W)
    assert (again.shape, again.dtype) == (W.shape, W.dtype)
    assert [a.tolist() for a in nf4(again)] == [c.tolist(), a.tolist()]
    np.testing.assert_array_equal(rounded(again), again)


def test_the_largest_of_a_block_and_zero_are_exact() -> None:
    """NF3"""
    W = np.zeros((4, 64), np.float32)
    W[1, 3], W[2, 5], W[2, 6] = 0.3, -1.7, 1.7
    c, a = nf4(W)
    np.testing.assert_array_equal(a, np.float32([0, 0.3, 1.7, 0]))
    np.testing.assert_array_equal(read(c, a, W), W)
    assert (unpack(c[:32]) == ZERO).all()


def test_each_number_gets_the_nearest_of_the_table() -> None:
    """NF4"""
    W = rng.normal(size=(50, 64)).astype(np.float32)
    c, a = nf4(W)
    step = np.abs(W.astype(float)[..., None] / a[:, None, None] - TABLE)
    np.testing.assert_array_equal(unpack(c).reshape(W.shape), step.argmin(-1))
    off = np.abs(rounded(W).astype(float) - W)
    assert (off <= 1.000001 * a[:, None] * np.diff(TABLE).max() / 2).all()
    assert off.max() > 0.2 * a.min() * np.diff(TABLE).max()


def test_two_codes_are_a_byte_the_first_above() -> None:
    assert pack(np.array([1, 2, 15])).tolist() == [0x12, 0xF7]
    assert unpack(np.array([0x12, 0xF7], np.uint8)).tolist() == [1, 2, 15, 7]
