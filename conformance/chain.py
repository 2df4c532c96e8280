"""A chain of layers, for stories: a model so small that it can be written out in a bug report, with what is awkward.

    wte → q → q2 → q → block.q → down → head,      tanh between them

`q` runs twice; `q` is the beginning of `q2` and the end of `block.q`; `q2` and `down` are Conv1D, the others Linear,
square and not; `head` may be tied to `wte`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refpeft.config import Config, Site
from refpeft.conformance.numbers import generator
from refpeft.hooks import Hooks
from refpeft.model import Cache, Model
from refpeft.model import Chain as Stages
from refpeft.ops import Array, tanh
from refpeft.part import op_run

FAMILY = "chain"
LAYERS: Mapping[str, tuple[str, int, int, bool]] = {  # path → kind, inputs, outputs, has it a bias?
    "wte": ("embedding", 5, 4, False),
    "q": ("linear", 4, 4, True),
    "q2": ("conv1d", 4, 4, True),
    "block.q": ("linear", 4, 6, False),
    "down": ("conv1d", 6, 4, True),
    "head": ("linear", 4, 5, False),
}
ORDER = ("wte", "q", "q2", "q", "block.q", "down", "head")


class Chain(Model):
    """Its sites are its layers; what it computes is `source["order"]`."""

    def run(self, hooks: Hooks, ids: Array, *inputs: Any, past: Cache | None = None, frozen: bool = True) -> Any:
        x, backs, order = ids, [], self.source["order"]
        for n, path in enumerate(order):
            x, back = hooks.part(self.part(path, frozen)).run(x)
            backs.append(back)
            if n < len(order) - 1:
                x, back = op_run(tanh)(x)
                backs.append(back)
        chains: list[Stages] = [("", backs)]
        return x, chains, ()


def source(tied: bool, conv1d: bool = True) -> dict[str, Any]:
    """What stands in the place of a config.json: the layers, and the order in which they run. Without `conv1d`, those
    that would be are Linear too."""
    layers = {
        path: {"kind": kind if conv1d or kind != "conv1d" else "linear", "in": i, "out": o, "bias": bias}
        | ({"tied_to": "wte"} if tied and path == "head" else {})
        for path, (kind, i, o, bias) in LAYERS.items()
    }
    return {"model_type": FAMILY, "layers": layers, "order": list(ORDER)}


def model(source: Mapping[str, Any], params: Mapping[str, Array]) -> Chain:
    config = Config(FAMILY, 4, 1, 1, 1, 4, "tanh", False, True, 0.0, False, ())
    sites = {
        path: Site(path, about["kind"], about.get("tied_to", path) + ".weight", path + ".bias")
        for path, about in source["layers"].items()
    }
    return Chain(config, sites, params, source)


def params(source: Mapping[str, Any], seed: int, dtype: Any) -> dict[str, Array]:
    """Weights, each as its layer stores it."""
    found: dict[str, Array] = {}
    for path, about in source["layers"].items():
        o, i = about["out"], about["in"]
        if "tied_to" not in about:
            W = short(seed, path + ".weight", (i, o) if about["kind"] in ("embedding", "conv1d") else (o, i))
            found[path + ".weight"] = W if about["kind"] != "embedding" else W * 2
        if about["bias"]:
            found[path + ".bias"] = short(seed, path + ".bias", (o,))
    return {name: a.astype(dtype) for name, a in found.items()}


def short(seed: int, name: str, shape: Sequence[int]) -> Array:
    """Numbers of three decimals between −1 and 1, no two of the same magnitude: they are printed in scripts, and
    ranked."""
    rng, n = generator(seed, name), int(np.prod(shape))
    magnitudes = rng.permutation(np.arange(20, 1000))[:n] / 1000
    return (magnitudes * np.where(rng.random(n) < 0.5, -1, 1)).reshape(tuple(shape))
