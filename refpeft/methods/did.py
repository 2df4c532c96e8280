"""DID: Direct Intrinsic Dimension.      Li et al. 2018, arXiv 1804.08838, §2, eq. (2)

    θ = θ₀ + P θ_d            θ_d [d], zeros at first; P [D, d] random, never trained; θ₀ [D] all adapted parameters

θ is every tensor that is adapted, laid end to end, and P its blocks Pᵢ [Dᵢ, d], one for each tensor; all of a model is
moved by the same d numbers. Each block is a Fastfood projection (`refpeft.fastfood`), with a B, Π and G of its own:

    W′ = W + shaped(P_W θ_d),   b′ = b + P_b θ_d,   Pᵢ θ = [H G Π H B pad(θ)]_{:Dᵢ}
    shaped  fills a matrix row by row, the longer of its sides down            the divisor of Fastfood is within G

With gᵢ = ∂L/∂θᵢ, laid out likewise:   dθ_d = Σᵢ Pᵢᵀ gᵢ,   dW = dW′,   db = db′.      The gain of a norm is its W.

Claims:
    ID1  θ_d = 0 at init, hence θ = θ₀ exactly.
    ID2  wrap ≡ merge, by definition: the layer is run with the weights that `merge` gives.
    ID3  What is added is linear in θ_d, and several adapters add up, in any order.
    ID4  The columns of P have length 1, on average; with `columns` = "tensor" those of each Pᵢ have.
    ID5  The gradient is the transpose: ⟨P θ, g⟩ = ⟨θ, Pᵀ g⟩.
    ID6  How a tensor is stored does not matter, and one that two layers share (a head tied to the embedding) stays one.

Any set of tensors can be adapted: `target_modules` names modules or single tensors ('c_attn', 'c_attn.bias', or a
regular expression for the whole name); without it, all are. `modules_to_save` are trained whole beside.

Where implementations differ:
    * The paper's P is one matrix with columns of length 1. The Fastfood code in circulation gives every tensor its own,
      each with columns of that length, so that a bias is moved about as far as a matrix: `columns` = "tensor".
    * Its autograd function for H has a backward that is not the transpose, see `refpeft.fastfood`.
    * It draws B, Π and G again from a seed. Here they are saved with the adapter, which then needs no generator.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.fastfood import fastfood, length
from refpeft.hollow import hollow
from refpeft.method import Base, Merged, Phi, Values, as_dtype, branch, excluded, matches, weight
from refpeft.ops import Array, is_half
from refpeft.part import BASE, Lazy, Once, Part

if TYPE_CHECKING:
    from refpeft.model import Model

SHARED = {"θ": "did.theta"}
KEYS = {  # of the weight, then of the bias
    name + of: (f"{which}_{key}", f"{which}_{key}")
    for of, which in (("", "did_weight"), ("_b", "did_bias"))
    for name, key in (("B", "signs"), ("Π", "permutation"), ("G", "gaussian"))
}
FROZEN = tuple(KEYS)


@dataclass(frozen=True)
class Config:
    """`d`: the dimension. `columns`: of length 1 in P for the whole "model", or for each "tensor"."""

    d: int = 1000
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    columns: str = "model"

    def __post_init__(self) -> None:
        if not (isinstance(self.d, int) and not isinstance(self.d, bool) and 0 < self.d < 2**31):
            raise ValueError(f"d must be a positive integer below 2**31, found {self.d!r}")
        if self.columns not in ("model", "tensor"):
            raise ValueError(f"columns must be 'model' or 'tensor', found {self.columns!r}")

    def at(self, path: str) -> "Config":
        return self


Tensors = Mapping[str, Sequence[str]]  # a tensor of the model → its names as '<module>.weight' or '<module>.bias'


def tensors(cfg: Config, model: "Model") -> Tensors:
    """All that is adapted, every tensor once: those of which a name or a module is targeted, wherever they are used."""
    found: dict[str, list[str]] = {}
    for site in model.sites.values():
        for tensor, name in ((site.weight, site.path + ".weight"), (site.bias, site.path + ".bias")):
            there = tensor in model.params and tensor not in buffers(model)
            if there and not excluded(cfg, site.path) and not excluded(cfg, name):
                found.setdefault(tensor, []).append(name)
    if cfg.target_modules is not None:
        found = {t: names for t, names in found.items() if any(targeted(cfg, name) for name in names)}
    if not found:
        raise ValueError(f"target_modules {cfg.target_modules!r} matches no module and no tensor of the model")
    return found


def buffers(model: "Model") -> Sequence[str]:
    """The tensors of a transformer that are no parameters; what is none, and has no config, can be adapted too."""
    return model.config.buffers if hasattr(model, "config") else ()


def targeted(cfg: Config, name: str) -> bool:
    return matches(cfg.target_modules, name) or matches(cfg.target_modules, name.rpartition(".")[0])


def init_model(
    cfg: Config, model: "Model", chosen: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """θ_d = 0, and B, Π and G of every tensor."""
    found = tensors(cfg, model)
    frozen = projections("did", found, model, cfg.d, cfg.columns, rng)
    return {SHARED["θ"]: np.zeros(cfg.d, wide(found, model))}, frozen


def outline_model(cfg: Config, model: "Model", chosen: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """θ [d]; B, Π and G [L] of every tensor, L a power of two."""
    found = tensors(cfg, model)
    return {SHARED["θ"]: hollow((cfg.d,), wide(found, model))}, outlines("did", found, model, cfg.d)


def outlines(method: str, found: Tensors, model: "Model", d: int) -> dict[str, Array]:
    frozen: dict[str, Array] = {}
    for tensor, names in found.items():
        shape = (length(model.params[tensor].size, d),)
        dtypes = {"signs": np.int8, "permutation": np.int32, "gaussian": wide(found, model)}
        frozen |= companions(method, names, {key: hollow(shape, dtype) for key, dtype in dtypes.items()})
    return frozen


def companions(method: str, names: Sequence[str], own: Mapping[str, Array]) -> dict[str, Array]:
    """'x.c_attn.bias' and 'signs' → 'x.c_attn.did_bias_signs'"""
    places = [name.rsplit(".", 1) for name in names]
    return {f"{path}.{method}_{leaf}_{key}": v for path, leaf in places for key, v in own.items()}


def wide(found: Tensors, model: "Model") -> np.dtype[Any]:
    """The dtype of what is trained: the model's, float32 for 16 bits."""
    return np.result_type(np.float32, *{v.dtype for v in (model.params[t] for t in found) if not is_half(v.dtype)})


def projections(
    method: str, found: Tensors, model: "Model", d: int, columns: str, rng: np.random.Generator
) -> dict[str, Array]:
    """B, Π and G/c of every tensor,   c = √(D Σ G²),   D the size of them all, or of the tensor."""
    frozen: dict[str, Array] = {}
    sizes, dtype = {tensor: model.params[tensor].size for tensor in found}, wide(found, model)
    for tensor, names in found.items():
        L = length(sizes[tensor], d)
        B, Π, G = rng.choice(np.array([-1, 1], np.int8), L), rng.permutation(L).astype(np.int32), rng.normal(size=L)
        D = sum(sizes.values()) if columns == "model" else sizes[tensor]
        own = {"signs": B, "permutation": Π, "gaussian": (G / np.sqrt(D * (G * G).sum())).astype(dtype)}
        frozen |= companions(method, names, own)
    return frozen


def project(φ: Values, of: str, x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """shaped(P θ) in the shape of x, and its transpose.      `of`: '' for the weight, '_b' for the bias"""
    θ, turned = φ["θ"], x.ndim == 2 and x.shape[0] < x.shape[1]
    y, vjp = fastfood(θ, φ["B" + of], φ["Π" + of], φ["G" + of], math.prod(x.shape), 1.0)

    def back(g: Array) -> Array:
        g = (g.T if turned else g).reshape(-1)
        dθ = vjp(g.astype(θ.dtype) if is_half(g.dtype) else g)[0]
        assert dθ is not None
        return dθ()

    return y.reshape(x.shape[::-1]).T if turned else y.reshape(x.shape), back


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + shaped(P_W θ),   b′ = b + P_b θ;      dθ = P_Wᵀ dW + P_bᵀ db."""
    W1, b1, backs = W, b, []
    if "G" in φ:
        Δ, back_W = project(φ, "", W)
        W1 = as_dtype(W + Δ, W)
        backs.append((0, back_W))
    if b is not None and "G_b" in φ:
        Δ, back_b = project(φ, "_b", b)
        b1 = as_dtype(b + Δ, b)
        backs.append((1, back_b))

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        return dW1, {"θ": Once(lambda: reduce(add, [back((dW1, db1)[k]()) for k, back in backs]))}

    return W1, b1, vjp


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = f(x; W′, b′), f being what the layer computes: x Wᵀ + b, or a norm."""
    return lifted(part, φ, partial(merge, cfg))


def lifted(part: Part, φ: Phi, merge: Callable[[Array, Array | None, Values], Merged]) -> Part:
    """A part run with the weights that `merge` gives. After another adapter, what it adds:   f is linear in W and b, so

    f(x; W + ΔW, b + Δb) = f(x; W, b) + f(x; ΔW, Δb)      and `merge` takes zeros to ΔW and Δb.
    """
    if part.pristine:
        return weight(part, φ, merge)
    none, b = (BASE, ""), None if part.b is None else np.zeros_like(part.b)
    return branch(part, weight(part._replace(W=np.zeros_like(part.W), b=b, W_key=none, b_key=none), φ, merge).run)
