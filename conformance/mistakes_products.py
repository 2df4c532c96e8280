"""What the mutants of LoHa, LoKr, GLoRA, OFT and BOFT get wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.conformance.case import Case
from refpeft.conformance.targets.spec import Whole
from refpeft.method import Phi, at
from refpeft.methods import boft, dylora, glora, loha, lokr, oft
from refpeft.methods.loha import factors
from refpeft.ops import Array
from refpeft.part import Once, Part, link
from refpeft.rotations import rotate

hadamard, kronecker, rotation, butterflies = loha.ΔW, lokr.ΔW, oft.rotation, boft.rotation
moving, widened = glora.through, dylora.whole
Delta = Callable[..., Any]
Wrap = Callable[..., Part]


def scaled_twice(delta: Delta) -> Delta:
    """s² in place of s: the scale is in ΔW, and whoever adds it multiplies again."""

    def wrong(cfg: Any, φ: Any) -> Any:
        return delta(replace(cfg, alpha=cfg.alpha**2 / cfg.r), φ)

    return wrong


def lokr_scaled_twice(cfg: Any, φ: Any) -> Any:
    return kronecker(replace(cfg, alpha=cfg.scale(φ) ** 2 * cfg.r), φ)


def unscaled(delta: Delta) -> Delta:
    return lambda cfg, φ: delta(replace(cfg, alpha=cfg.r), φ)


def summed(cfg: Any, φ: Any) -> Any:
    """P + Q in place of P ⊙ Q: two LoRAs."""
    s = cfg.scale

    def back(G: Any) -> Any:
        d = Once(lambda: s * G())
        return factors(φ, "B1", "A1", d) | factors(φ, "B2", "A2", d)

    return s * (φ["B1"] @ φ["A1"] + φ["B2"] @ φ["A2"]), back


def of_what_is_there(merge: Any, cfg: Any, W: Array, b: Any, φ: Any) -> Any:
    """GLoRA's W A with the W that earlier adapters have made."""
    return merge(cfg, W, b, φ, base=(W, b))


def through_the_other(cfg: Any, φ: Phi, part: Part) -> Any:
    """A on the other side, A W, where that has a shape."""
    return moving(cfg, φ, part if part.W.shape[0] != part.W.shape[1] else part._replace(W=part.W.T))


def halved_for_A(cfg: Any, φ: Phi, part: Part) -> Any:
    """dA_u as if each of two factors had half of it."""
    run = moving(cfg, φ, part)

    def wrong(x: Array) -> Any:
        z, back = run(x)

        def halved(dz: Any, want: Any) -> Any:
            dx, grads = back(dz, want)
            key = φ.keys.get("Au")
            return dx, {k: Once(lambda d=d: d() / 2) if k == key else d for k, d in grads.items()}

        return z, halved

    return wrong


def never_frozen(cfg: Any, φ: Any, name: str, d: Any) -> Any:
    """All ranks in play are trained."""
    return widened(replace(cfg, frozen=False), φ, name, d)


def first_block_trained(cfg: Any, φ: Any, name: str, d: Any) -> Any:
    """Where all but one block are frozen, the first is trained in place of the last."""
    axis, own = "AB".index(name), widened(replace(cfg, frozen=False), φ, name, d)
    kept = np.arange(cfg.r) < (cfg.block_size if cfg.frozen else cfg.r)
    return Once(lambda: own() * np.expand_dims(kept, 1 - axis))


def last_ranks(cfg: Any, φ: Any) -> Any:
    """The last b ranks for the first."""
    return {"A": φ["A"][-cfg.b :], "B": φ["B"][:, -cfg.b :]}


def patterns_as_one(cfg: Any, path: str) -> Any:
    """The first key of either pattern that matches is looked up in both."""
    keys = [*cfg.rank_pattern, *cfg.alpha_pattern]
    key = next((k for k in keys if at({k: True}, path, False)), "")
    r, α = cfg.rank_pattern.get(key, cfg.r), cfg.alpha_pattern.get(key, cfg.alpha)
    return replace(cfg, r=r, alpha=α, rank_pattern={}, alpha_pattern={})


class OtherOrder(Whole):
    """Running, the first adapter turns the input first."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.active = self.active[::-1]


def one_sided(cfg: Any, φ: Any) -> Any:
    """dP and dQ without the other product."""
    Δ, _ = hadamard(cfg, φ)
    return Δ, summed(cfg, φ)[1]


def plain(φ: Any) -> dict[str, Any]:
    return dict(φ.values if isinstance(φ, Phi) else φ)


def first_core_for_both(cfg: Any, φ: Any) -> Any:
    """P and Q with T₁: LyCORIS 1.9.0's modules did so."""
    values = plain(φ)
    return hadamard(cfg, {**values, "T2": values["T1"]} if "T1" in values else values)


def taps_first(cfg: Any, φ: Any) -> Any:
    """ΔW as [o, k, i]."""
    Δ, back = hadamard(cfg, φ)
    o, k = len(Δ), cfg.taps
    return Δ.reshape(o, -1, k).transpose(0, 2, 1).reshape(Δ.shape), back


def other_chain(cfg: Any, φ: Any) -> Any:
    """dB₁ with T₂ A₂ in the place of T₁ A₁, and dB₂ with T₁ A₁: written by hand, beside a right ΔW."""
    Δ, back = hadamard(cfg, φ)
    values = plain(φ)
    if "T1" not in values:
        return Δ, back
    (P, _), (Q, _) = loha.product(values, "1"), loha.product(values, "2")
    other = {**values, **{n + t: values[n + u] for n in "AT" for t, u in ("12", "21")}}
    (_, back_P), (_, back_Q) = loha.product(other, "1"), loha.product(other, "2")

    def wrong(G: Any) -> Any:
        dB1 = back_P(Once(lambda: cfg.scale * G() * Q))["B1"]
        dB2 = back_Q(Once(lambda: cfg.scale * G() * P))["B2"]
        return {**back(G), "B1": dB1, "B2": dB2}

    return Δ, wrong


def commuted(cfg: Any, φ: Any) -> Any:
    """D ⊗ C: the entries of C C ⊗ D in another order, with the same shape."""
    Δ, back = kronecker(cfg, φ)
    m, n = small(φ).shape
    k, j = Δ.shape[0] // m, Δ.shape[1] // n

    def turn(d: Array) -> Array:
        return d.reshape(m, k, n, j).transpose(1, 0, 3, 2).reshape(d.shape)

    def turned_back(G: Array) -> Array:
        return G.reshape(k, m, j, n).transpose(1, 0, 3, 2).reshape(G.shape)

    return turn(Δ), lambda G: back(Once(lambda: turned_back(G())))


def small(φ: Any) -> Array:
    C: Array = φ["Cb"] @ φ["Ca"] if φ.get("C") is None else φ["C"]
    return C


def one_where_full(cfg: Any, φ: Any) -> Any:
    """s = 1 where both factors are full: LyCORIS's reading."""
    return kronecker(replace(cfg, scale_full=False), φ)


def turned_back(cfg: Any, φ: Any) -> Any:
    """R(−v): the other of the two Cayley transforms."""
    name = "u" if φ.get("u") is not None else "v"
    R, back = rotation(cfg, {name: -φ[name]})
    return R, lambda dR: {name: Once(lambda: -back(dR)[name]())}


def turned_back_if_exact(cfg: Any, φ: Any) -> Any:
    return rotation(cfg, φ) if cfg.use_cayley_neumann else turned_back(cfg, φ)


def term_lost(cfg: Any, φ: Any) -> Any:
    """The series ends one term too early."""
    return rotation(replace_terms(cfg), φ)


def replace_terms(cfg: Any) -> Any:
    shorter = replace(cfg)
    object.__setattr__(shorter, "num_cayley_neumann_terms", cfg.num_cayley_neumann_terms - 1)
    return shorter


def first_block_for_all(x: Array, R: Array) -> Any:
    """Every block is turned by the first R, though each has its own."""
    y, vjp = rotate(x, R[:1])
    n = len(R)

    def back(dy: Array) -> Any:
        dx, dR = link(vjp, lambda: dy, 2)
        return dx, lambda: np.concatenate([dR(), np.zeros((n - 1, *R.shape[1:]), R.dtype)])

    return y, back


def half_turned(φ: Any) -> Any:
    """S = A − Aᵀ, without the half."""
    name = "C" if φ.get("C") is not None else "A"
    R, back = butterflies({**plain(φ), name: 2 * φ[name]})
    return R, lambda dR: {name: Once(lambda: 2 * back(dR)[name]())}


def never_gathered(x: Array, k: int, p: int) -> Array:
    """Every factor mixes the same blocks."""
    return x


def scale_of_bias(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """s on the bias too."""
    wrapped = wrap(cfg, φ, part)
    if part.b is None:
        return wrapped

    def run(x: Array) -> Any:
        y, back = wrapped.run(x)
        return y + (φ["s"][:, 0] - 1) * part.b, back

    return wrapped.wrapped(run)


def bias_turned_by_butterflies(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """On the side of outputs, the bias with them."""
    wrapped = wrap(cfg, φ, part)
    if part.b is None or cfg.side != "output":
        return wrapped
    R = butterflies(φ)[0]

    def run(x: Array) -> Any:
        y, back = wrapped.run(x)
        return y + boft.inverse(part.b, R)[0] - part.b, back

    return wrapped.wrapped(run)


def bias_turned(wrap: Wrap, cfg: Any, φ: Phi, part: Part) -> Part:
    """On the side of outputs, the bias with them."""
    wrapped = wrap(cfg, φ, part)
    if part.b is None:
        return wrapped
    R = rotation(cfg, φ)[0]

    def run(x: Array) -> Any:
        y, back = wrapped.run(x)
        return y + rotate(part.b, R)[0] - part.b, back

    return wrapped.wrapped(run) if cfg.side == "output" else wrapped
