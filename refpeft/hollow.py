"""Hollow arrays: a shape and a dtype, and no memory for what would be in them.

A model of hollow arrays has all that a real one has but numbers. What only asks for shapes runs on it unchanged:
which modules a config targets, what a method adds to them, what a file would be called and how long it would be.
"""

from typing import Any

import numpy as np

from refpeft.ops import Array


def hollow(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of this shape whose entries are all the same zero, in memory too.

    >>> hollow((12288, 49152), "float16").shape
    (12288, 49152)
    """
    return np.broadcast_to(np.zeros((), dtype), shape)
