"""What the mutants of DID and SAID get wrong."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Session, Whole
from refpeft.fastfood import fastfood
from refpeft.method import Merged, Values
from refpeft.methods import did, said
from refpeft.ops import Array
from refpeft.part import Lazy

project = did.project
merges = {did: did.merge, said: said.merge}


def permutation_inverted(θ: Array, B: Array, Π: Array, G: Array, *rest: Any) -> Any:
    return fastfood(θ, B, np.argsort(Π), G, *rest)


def signs_forgotten(θ: Array, B: Array, Π: Array, G: Array, *rest: Any) -> Any:
    return fastfood(θ, np.ones_like(B), Π, G, *rest)


def not_transposed(θ: Array, B: Array, Π: Array, G: Array, D: int, c: float | None = None) -> Any:
    """The backward pass permutes as the forward pass does, and not back."""
    y, _ = fastfood(θ, B, Π, G, D, c)
    return y, fastfood(θ, B, np.argsort(Π), G, D, c)[1]


def never_turned(φ: Values, of: str, x: Array) -> Any:
    """Wide matrices are filled along their rows, as they are stored."""
    turned = x.ndim == 2 and x.shape[0] < x.shape[1]
    y, back = project(φ, of, x.T if turned else x)
    return (y.reshape(x.shape), lambda g: back(g.reshape(x.T.shape))) if turned else (y, back)


def biases_forgotten(method: Any) -> Any:
    """Only weights are moved."""

    def merge(cfg: Any, W: Array, b: Array | None, φ: Values, base: Any = None) -> Merged:
        return merges[method](cfg, W, b, {n: v for n, v in φ.items() if not n.endswith("_b")}, base)

    return merge


def one_lambda(cfg: Any, W: Array, b: Array | None, φ: Values, base: Any = None) -> Merged:
    """All tensors take as much of the subspace as the first."""
    return merges[said](cfg, W, b, {n: v * 0 if n in ("i", "i_b") else v for n, v in φ.items()}, base)


def lambda_forgotten_in_gradient(cfg: Any, W: Array, b: Array | None, φ: Values, base: Any = None) -> Merged:
    """dθ is that of λ = 1."""
    W1, b1, vjp = merges[said](cfg, W, b, φ, base)
    _, _, plain = merges[said](cfg, W, b, {**φ, "λ": np.ones_like(φ["λ"])}, base)

    def wrong(dW: Lazy, db: Lazy) -> Any:
        dW0, d = vjp(dW, db)
        return dW0, {**d, "θ": plain(dW, db)[1]["θ"]}

    return W1, b1, wrong


class TrainsNoLambda(Whole):
    def grads(self) -> Arrays:
        return {n: d * ("lambda" not in n) for n, d in super().grads().items()}


class CountsTheProjection(Whole):
    """P is counted as if it were trained."""

    def count(self) -> Arrays:
        return {"count": super().count()["count"] + sum(v.size for a in self.active for v in a.frozen.values())}


class MovesTiedTensorsTwice(Whole):
    """A tensor that two layers share is moved once for each of them."""

    def merged(self) -> Arrays:
        found = super().merged()
        uses = [site.weight for site in self.base.sites.values()]
        return {n: v + (v - self.base.params[n[7:]]) * (uses.count(n[7:]) > 1) for n, v in found.items()}


class DrawsAgain(Session):
    """P is drawn again at loading, from a generator that gives something else."""

    def load(self, adapters: Sequence[str]) -> None:
        super().load(adapters)
        for name, a in self.adapters.items():
            again = {n: v[::-1] if v.ndim else v for n, v in a.frozen.items()}
            self.adapters[name] = a.replace(frozen=again)
