"""LSTM: the recurrent layer of P-tuning's prompt encoder.      Hochreiter & Schmidhuber 1997, Neural Computation 9(8)

Laid out as torch.nn.LSTM lays it out, so that its weights can be used as they are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from refpeft.ops import Array, Cotangent, Vjp, op, rows


class Step(NamedTuple):
    """What the backward pass needs of one step: gates, tanh c, and the cell and state before it.      each [b, h]"""

    i: Array
    f: Array
    g: Array
    o: Array
    t: Array
    before: Array
    h: Array


@op
def lstm(x: Array, *weights: Array, bidirectional: bool = True, masks: Sequence[Array] = ()) -> tuple[Array, Vjp]:
    """y = LSTM(x), several layers, in one direction or both, from zeros.      x [b, s, i] → y [b, s, h or 2h]

    [i f g o] = xₜ Wᵀ + b + hₜ₋₁ Uᵀ + β,   cₜ = σ(f) ⊙ cₜ₋₁ + σ(i) ⊙ tanh g,   hₜ = σ(o) ⊙ tanh cₜ

    `weights`: W [4h, i], U [4h, h], b [4h], β [4h] of each direction of each layer, forwards before backwards, as torch
    orders them. The backward direction reads x from its end; y holds both side by side, and is the next layer's input,
    times `masks` [layers − 1, b or 1, s, 2h] (dropout between layers) if there are any.

    With da the cotangent of the four sums before their nonlinearities, from the last step to the first:
    dhₜ = dyₜ + daₜ₊₁ U,   dcₜ = dhₜ ⊙ σ(o) (1 − tanh²cₜ) + dcₜ₊₁ ⊙ σ(f)ₜ₊₁,
    dW = Σ daᵀ x,   dU = Σ daₜᵀ hₜ₋₁,   db = dβ = Σ da,   dx = da W.
    """
    ways = 2 if bidirectional else 1
    layers = [weights[k : k + 4 * ways] for k in range(0, len(weights), 4 * ways)]
    backs: list[list[Callable[[Array], tuple[Array, ...]]]] = []
    for n, layer in enumerate(layers):
        x = x * masks[n - 1] if n and len(masks) else x
        ran = [direction(x, layer[4 * k : 4 * k + 4], backwards=k == 1) for k in range(ways)]
        x = np.concatenate([h for h, _ in ran], axis=-1)
        backs.append([back for _, back in ran])

    def vjp(dy: Array) -> tuple[Cotangent, ...]:
        @functools.cache
        def cotangents() -> list[Array]:
            d, found = dy, list[Array]()
            for n in reversed(range(len(layers))):
                h = d.shape[-1] // ways
                pulled = [back(d[..., k * h : (k + 1) * h]) for k, back in enumerate(backs[n])]
                found = [a for _, *own in pulled for a in own] + found
                d = sum(dx for dx, *_ in pulled)
                d = d * masks[n - 1] if n and len(masks) else d
            return [d, *found]

        return tuple(functools.partial(lambda k: cotangents()[k], k) for k in range(1 + len(weights)))

    return x, vjp


Back = Callable[[Array], tuple[Array, ...]]


def direction(x: Array, weights: Sequence[Array], backwards: bool = False) -> tuple[Array, Back]:
    """One layer in one direction: its states [b, s, h] in the order of x, and dh → dx, dW, dU, db, dβ."""
    W, U, b, β = weights
    s = x.shape[1]
    order = range(s)[::-1] if backwards else range(s)
    z = x @ W.T + (b + β)
    h = c = np.zeros_like(z[:, 0, : U.shape[1]])
    steps: dict[int, Step] = {}
    states: dict[int, Array] = {}
    for t in order:
        h, c, steps[t] = step(z[:, t] + h @ U.T, c, h)
        states[t] = h

    def back(dy: Array) -> tuple[Array, ...]:
        dh = dc = np.zeros_like(dy[:, 0])
        da: dict[int, Array] = {}
        for t in reversed(order):
            da[t], dc = unstep(steps[t], dy[:, t] + dh, dc)
            dh = da[t] @ U
        d, before = side_by_side(da), side_by_side({t: step.h for t, step in steps.items()})
        db = rows(d).sum(0)
        return d @ W, rows(d).T @ rows(x), rows(d).T @ rows(before), db, db

    return side_by_side(states), back


def step(a: Array, c: Array, h: Array) -> tuple[Array, Array, Step]:
    """One step, from the four sums a [b, 4h], the cell c and the state h before it, to the state and the cell after."""
    n = a.shape[-1] // 4
    i, f, g, o = σ(a[:, :n]), σ(a[:, n : 2 * n]), np.tanh(a[:, 2 * n : 3 * n]), σ(a[:, 3 * n :])
    after = f * c + i * g
    t = np.tanh(after)
    return o * t, after, Step(i, f, g, o, t, c, h)


def unstep(q: Step, dh: Array, dc: Array) -> tuple[Array, Array]:
    """From dhₜ, and what the next step says of cₜ, to da [b, 4h] and what this step says of cₜ₋₁."""
    d = dh * q.o * (1 - q.t * q.t) + dc
    di, df, dg, do = d * q.g, d * q.before, d * q.i, dh * q.t
    sums = (di * q.i * (1 - q.i), df * q.f * (1 - q.f), dg * (1 - q.g * q.g), do * q.o * (1 - q.o))
    return np.concatenate(sums, axis=-1), d * q.f


def σ(x: Array) -> Array:
    """1/(1 + e⁻ˣ) = ½ (1 + tanh ½x), which cannot overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def side_by_side(at: dict[int, Array]) -> Array:
    """[b, h] of each place → [b, s, h]"""
    return np.concatenate([at[t][:, None] for t in sorted(at)], axis=1)
