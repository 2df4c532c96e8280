"""The merged model one tensor at a time: what `refpeft.merge` gives, without ever holding a second model."""

from collections.abc import Iterator, Sequence

import numpy as np

from refpeft.adapter import Adapter
from refpeft.model import Model, Site
from refpeft.ops import Array
from refpeft.part import Part, make, stored
from refpeft.tune import merged_part, substituted, untied


def merged(model: Model, adapters: Sequence[Adapter], sites: dict[str, Site]) -> Iterator[tuple[str, Array]]:
    """Name and value of every tensor of the merged model, as `refpeft.merge` gives it. `sites` is brought up to date:
    a tied layer of which one side changed gets a tensor of its own."""
    for name, value, _ in merged_by_role(model, adapters, sites):
        yield name, value


def merged_by_role(
    model: Model, adapters: Sequence[Adapter], sites: dict[str, Site]
) -> Iterator[tuple[str, Array, str | None]]:
    """The same, with the role of the layer that an adapter changes; None where the tensor is the model's own."""
    model, adapters = substituted(model, adapters)
    params = dict(model.params)
    written: set[str] = set()
    for role in model.sites:
        own = model.part(role)
        if not any(own.path in a.by_module for a in adapters):
            continue
        old = in_float32(own)
        W, b = merged_part(adapters, old)
        if W is not old.W:
            sites |= untied(sites, params, role)
            yield from once(written, sites[role].weight, stored(old.kind, W), role)
        if b is not None and b is not old.b:
            yield from once(written, sites[role].bias, b, role)
    for site in sites.values():
        for name in (site.weight, site.bias):
            if name in params:
                yield from once(written, name, params[name], None)


def in_float32(part: Part) -> Part:
    """16-bit weights are merged in float32: what comes out is rounded once, to the dtype that is wanted."""
    if part.W.dtype.itemsize != 2:
        return part
    W, b = part.W.astype(np.float32), None if part.b is None else part.b.astype(np.float32)
    return make(part.path, part.kind, W, b, part.W_key, part.b_key, part.eps)


def once(written: set[str], name: str, value: Array, role: str | None) -> Iterator[tuple[str, Array, str | None]]:
    if name not in written:
        written.add(name)
        yield name, value, role
