"""Numbers for cases, from a counter-based generator: any array is a function of the seed and its own name.

Shrinking a case therefore changes its structure and leaves the numbers of what remains alone.
"""

import zlib

import numpy as np

from refpeft.ops import Array


def generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))


def normal(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    return generator(seed, name).normal(size=shape)


def integers(seed: int, name: str, shape: tuple[int, ...], low: int, high: int) -> Array:
    """Integers from low to high, both included."""
    return generator(seed, name).integers(low, high + 1, size=shape)


def signs(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """±1"""
    return integers(seed, "sign " + name, shape, 0, 1) * 2.0 - 1.0
