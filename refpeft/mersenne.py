"""The numbers that torch's generator on CPUs draws from a seed, from NumPy's Mersenne Twister.

Matsumoto & Nishimura 1998. torch takes the words u of 32 bits that NumPy's RandomState gives for the same seed; a
uniform float32 is made of the lower 24 bits of one of them:   x = (u mod 2²⁴)/2²⁴ · (b − a) + a,   rounded once.

What a checkpoint leaves to be drawn again from a seed is so drawn here as torch would. (On a GPU it draws others.)
"""

from typing import Any

import numpy as np

from refpeft.ops import Array

SEEDS = 2**32


def stream(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


def uniform(words: np.random.RandomState, bound: float, shape: tuple[int, ...]) -> Array:
    """U(−bound, bound) in float32, the next of the stream."""
    u = np.frombuffer(words.bytes(4 * int(np.prod(shape))), "<u4") & (2**24 - 1)
    b = np.float64(np.float32(bound))
    x: np.ndarray[Any, Any] = (u * 2.0**-24 * (b + b) - b).astype(np.float32)
    return x.reshape(shape)
