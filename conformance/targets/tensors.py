"""Numbers from NumPy to torch and back."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

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


class Place(Protocol):
    """Where a tensor of ours lies in a library: its parameter there, and how to get there."""

    @property
    def param(self) -> Any: ...
    @property
    def there(self) -> Callable[[Array], Array]: ...


def fill(places: Mapping[str, Place], values: Mapping[str, Array]) -> None:
    """Values into parameters, in place."""
    for name, place in places.items():
        value = tensor(np.ascontiguousarray(place.there(values[name])))
        if value.shape != place.param.shape:
            raise ValueError(f"{name}: expected shape {list(place.param.shape)}, found {list(value.shape)}")
        place.param.data = value.clone()


def fill_all(places: Mapping[str, Place], values: Mapping[str, Array]) -> None:
    """The same, where there must be a place for each value, and a value for each place."""
    if places.keys() != values.keys():
        odd = sorted(places.keys() ^ values.keys())[0]
        raise ValueError(f"the parameters of the adapter are not those of the specification: {odd}")
    fill(places, values)
