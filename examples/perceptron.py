"""A perceptron made of refpeft's own parts, and scikit-learn's handwritten digits, for it to learn.

Whatever has sites, parameters and `part(role)` can be adapted. So methods, optimisers and training are those of
refpeft, and the gradients too, with nothing added here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from common import Array
from sklearn.datasets import load_digits

import refpeft
from refpeft.adapter import each
from refpeft.config import Site
from refpeft.layers import chain
from refpeft.objectives import Objective, class_loss
from refpeft.ops import tanh
from refpeft.part import BASE, Part, make, op_run

Named = dict[str, Array]


@dataclass(frozen=True)
class Config:
    """What the methods ask about a model that is no transformer: which tensors are none of its parameters."""

    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """A perceptron as a model that refpeft can adapt: where its layers are, and their parameters."""

    sites: Mapping[str, Site]
    params: Mapping[str, Array]
    config: Config = Config()

    @property
    def size(self) -> int:
        return sum(v.size for v in self.params.values())

    def part(self, role: str) -> Part:
        s = self.sites[role]
        W, b = self.params[s.weight], self.params[s.bias]
        return make(s.path, s.kind, W, b, (BASE, s.weight), (BASE, s.bias))

    def __call__(self, x: Array, adapter: refpeft.Adapter | None = None) -> tuple[Array, Callable[[Array], Named]]:
        """logits [n, classes] of x [n, inputs], and vjp: dlogits → the gradients of the adapter."""
        wrap = each([adapter] if adapter else [], self).part  # type: ignore[arg-type]
        first, *others = [wrap(self.part(role)).run for role in self.sites]
        y, back = chain(first, *(f for run in others for f in (op_run(tanh), run)))(x)
        wanted = {(0, name) for name in adapter.params} if adapter else set()
        return y, lambda dy: {name: g() for (_, name), g in back(lambda: dy, wanted)[1].items()}


def network(widths: tuple[int, ...], seed: int) -> Network:
    """Layers of these widths with tanh between them: W from N(0, 1/i), b = 0."""
    rng = np.random.default_rng(seed)
    names = [f"layers.{n}" for n in range(len(widths) - 1)]
    sites = {name: Site(name, "linear", name + ".weight", name + ".bias") for name in names}
    params: Named = {}
    for name, i, o in zip(names, widths, widths[1:], strict=False):
        params |= {name + ".weight": rng.normal(size=(o, i)) / np.sqrt(i), name + ".bias": np.zeros(o)}
    return Network(sites, {name: v.astype(np.float32) for name, v in params.items()})


@dataclass(frozen=True)
class Images:
    """x [n, 64] between −1 and 1, and what is written there [n]."""

    x: Array
    labels: Array

    def of(self, classes: range) -> "Images":
        chosen = np.isin(self.labels, classes)
        return Images(self.x[chosen], self.labels[chosen])

    @property
    def objective(self) -> Objective:
        """Cross entropy. A row is the number of an image."""
        return Objective(lambda rows, rng: {"input_ids": self.x[rows], "labels": self.labels[rows]}, class_loss)


def digits(training: int = 1200) -> tuple[Images, Images]:
    """1,797 digits of 8×8 pixels: so many to train on, and the others to test with."""
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    every = Images((x / 8 - 1).astype(np.float32)[order], labels[order])
    return Images(every.x[:training], every.labels[:training]), Images(every.x[training:], every.labels[training:])


def accuracy(net: Network, adapter: refpeft.Adapter | None, images: Images, among: range | None = None) -> float:
    """The share of images that are read right, where the answer may be any class or only one of `among`."""
    logits, _ = net(images.x, adapter)
    if among is not None:
        logits = np.where(np.isin(np.arange(logits.shape[1]), among), logits, -np.inf)
    return float((logits.argmax(1) == images.labels).mean())
