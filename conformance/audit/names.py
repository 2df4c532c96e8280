"""Which tensor of the file is which of the model's.

By its name, as the model's class has it; under other prefixes and old names, as `refpeft.load` allows; under those of
HF peft's wrapper. In an ONNX graph also by what is in it: exporters rename and transpose what MatMul multiplies by.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from refpeft.checkpoint.families import Plan
from refpeft.checkpoint.models import named_as_planned
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.conformance.audit.compare import is_float

Array = np.ndarray[Any, Any]

WRAPPED = "base_model.model."  # HF peft's
SAMPLE = 4096  # elements by which contents are compared
ALIKE = 0.9  # the cosine above which two tensors are taken for the same


def by_name(p: Plan, found: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, str]]:
    """The file's tensors by the model's names, and how the file calls those that it calls otherwise."""
    plain: dict[str, Array] = {}
    for name, a in found.items():
        bare = name.removeprefix(WRAPPED).replace(".base_layer.", ".")
        if bare in plain:
            raise Malformed(f"tensors {show(name)} and another one both stand for {show(bare)}")
        plain[bare] = a
    named = named_as_planned(p, plain)
    originals = {id(a): name for name, a in found.items()}
    return named, {name: f for name, a in named.items() if (f := originals.get(id(a), name)) != name}


def by_suffix(wanted: Iterable[str], found: Mapping[str, Array]) -> dict[str, str]:
    """Model's name → the file's, for exact names and for those with something before them, if there is one such."""
    matched = {}
    for name in wanted:
        longer = [f for f in found if f.endswith("." + name)]
        if name in found:
            matched[name] = name
        elif len(longer) == 1:
            matched[name] = longer[0]
    return matched


def by_content(
    wanted: Iterable[tuple[str, tuple[Array, Array]]], found: Mapping[str, Array], named: Collection[str]
) -> tuple[dict[str, str], dict[str, bool]]:
    """Model's name → the file's, and whether the file has it transposed, by a sample of the numbers: those that should
    be there, or the base's. `wanted` is walked once and nothing of it is kept. The best pairs are taken first.

    What the file calls by a name (`named`), or what is taken already, stands for another tensor only if the numbers
    are the same: exporters store equal tensors once."""
    files = {f: a for f, a in found.items() if is_float(a.dtype) and a.ndim in (1, 2)}
    samples = {f: sample(a) for f, a in files.items()}
    pairs: list[Pair] = []
    for name, (want, base) in wanted:
        for flip in (0, 1)[: want.ndim]:
            turned = [x.T if flip else x for x in (want, base)]
            fitting = [f for f, a in files.items() if a.shape == turned[0].shape]
            ours = [sample(x) for x in turned] if fitting else []
            for f in fitting:
                alike = max(cosine(x, samples[f]) for x in ours)
                pairs.append((alike, any(same(x, samples[f]) for x in ours), bool(flip), name, f))
    return taken(pairs, set(named))


Pair = tuple[float, bool, bool, str, str]  # how alike, the same numbers, transposed, model's name, the file's


def taken(pairs: list[Pair], used: set[str]) -> tuple[dict[str, str], dict[str, bool]]:
    matched: dict[str, str] = {}
    flipped: dict[str, bool] = {}
    for alike, equal, flip, name, f in sorted(pairs, key=lambda p: (not p[1], -p[0], p[4] in used, *p[2:])):
        if name not in matched and (equal or (alike >= ALIKE and f not in used)):
            matched[name], flipped[name] = f, flip
            used.add(f)
    return matched, flipped


def same(x: Array, y: Array) -> bool:
    """To the rounding of any dtype."""
    return bool(np.allclose(x, y, rtol=2**-7, atol=0.0))


def sample(a: Array) -> Array:
    """Some elements, the same places in every tensor of this shape."""
    rng = np.random.default_rng(a.shape)
    places = tuple(rng.integers(0, n, SAMPLE) for n in a.shape) if a.size else ()
    return a[places].astype(np.float64) if places else np.zeros(0)


def cosine(x: Array, y: Array) -> float:
    both = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / both if both and np.isfinite(both) else float(np.array_equal(x, y))
