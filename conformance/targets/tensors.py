"""Numbers from NumPy to torch and back."""

import logging
from typing import Any

import numpy as np
import torch

from refpeft.conformance.case import DTYPES
from refpeft.ops import Array


def quietly(*loggers: str) -> None:
    """One thread, and no remarks."""
    torch.set_num_threads(1)
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)


def tensor(a: Array) -> Any:
    """The same numbers and strides as a torch tensor; bfloat16 by its bits, which NumPy and torch do not share."""
    if a.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def array(t: Any) -> Array:
    t = t.detach()
    if t.dtype == torch.bfloat16:
        return np.array(t.contiguous().view(torch.int16).numpy()).view(DTYPES["bfloat16"])
    return np.array(t.numpy())
