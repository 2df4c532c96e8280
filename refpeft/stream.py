"""The merged model one tensor at a time: what `refpeft.merge` gives, without ever holding a second model.

Of a large matrix some rows at a time, where the method allows it: row o of W′ needs of B, m and β their row o only.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, found, replaced
from refpeft.method import Phi
from refpeft.methods import METHODS
from refpeft.model import Model, Site
from refpeft.ops import Array, is_half
from refpeft.part import Part, make, stored
from refpeft.tune import merged_part, substituted, untied

BY_ROW = {
    "lora": ("B", "B0", "β"),
    "rslora": ("B", "B0", "β"),
    "dora": ("B", "B0", "m"),
}  # those that o is the first of
LARGE = 4 << 20  # numbers


def merged(
    model: Model, adapters: Sequence[Adapter], sites: dict[str, Site], dtype: Any = None
) -> Iterator[tuple[str, Array]]:
    """Name and value of every tensor of the merged model, as `refpeft.merge` gives it. `sites` is brought up to date:
    a tied layer of which one side changed gets a tensor of its own. `dtype`: that large ones are wanted in."""
    for name, value, _ in merged_by_role(model, adapters, sites, dtype):
        yield name, value


def merged_by_role(
    model: Model, adapters: Sequence[Adapter], sites: dict[str, Site], dtype: Any = None
) -> Iterator[tuple[str, Array, str | None]]:
    """The same, with the role of the layer that an adapter changes; None where the tensor is the model's own."""
    model, adapters = substituted(model, adapters)
    params = dict(model.params)
    written: set[str] = set()
    for role in model.sites:
        old = model.part(role)
        if not any(old.path in a.by_module for a in adapters):
            continue
        by_row = rows_at_a_time(adapters, old, dtype)
        W, b = merged_part(adapters, old := in_float32(old)) if by_row is None else by_row
        if W is not old.W:
            sites |= untied(sites, params, role)
            yield from once(written, sites[role].weight, stored(old.kind, W), role)
        del W, by_row
        if b is not None and b is not old.b:
            yield from once(written, sites[role].bias, b, role)
    for site in sites.values():
        for name in (site.weight, site.bias):
            if name in params:
                yield from once(written, name, params[name], None)


def rows_at_a_time(adapters: Sequence[Adapter], part: Part, dtype: Any) -> tuple[Array, Array | None] | None:
    """W′ and b′ of a large matrix, without a second one beside it; None where it is small, or the method cannot."""
    part = replaced(adapters, part)
    own = list(found(adapters, part.path))
    if part.W.size <= LARGE or not own or any(a.method not in BY_ROW for a, _ in own):
        return None
    wide = np.dtype(np.float32) if is_half(part.W.dtype) else part.W.dtype
    W = stored(part.kind, np.empty(stored(part.kind, part.W).shape, wide if dtype is None else dtype))
    b: list[Array] = []
    step = max(1, LARGE // W.shape[1])
    for start in range(0, len(W), step):
        at = slice(start, start + step)
        W[at], b_at = of_rows(own, part, at, wide)
        b += [] if b_at is None else [b_at]
    changed = b and any("β" in φ.values for _, φ in own)
    return W, np.concatenate(b) if changed else part.b


def of_rows(
    own: Sequence[tuple[Adapter, Phi]], part: Part, at: slice, dtype: "np.dtype[Any]"
) -> tuple[Array, Array | None]:
    """Rows of W′ and b′."""
    W = part.W[at].astype(dtype)
    b = None if part.b is None else part.b[at].astype(dtype)
    base = (W, b)
    for adapter, φ in own:
        rows = {n: v[at] if n in BY_ROW[adapter.method] else v for n, v in φ.values.items()}
        W, b, _ = METHODS[adapter.method].merge(adapter.at(part.path), W, b, rows, base)
    return W, b


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
