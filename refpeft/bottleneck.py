"""Bottleneck adapters: what the methods `houlsby`, `pfeiffer` and `parallel` share.

    F(z) = s · g · (φ(z Dᵀ + b_D) Uᵀ + b_U)             z [b, t, d], D [m, d], U [d, m], b_D [m], b_U [d]

m = max(1, ⌊d / reduction_factor⌋). s is a number, or trained: `scaling` 'learned' [1] or 'channel' [d], from 1 on.
With `use_gating`, g = mean_t σ(z wᵀ + c), one number per sequence (w [1, d], c [1]); else g = 1. With `ln_before`, D
sees LN₁(z) in the place of z; with `ln_after`, LN₂ follows as below; both are new LayerNorms with ε = 10⁻⁵.

Where F stands in a sublayer that makes h of its input x, whose norm comes after the residual (N = norm), or before the
sublayer (N = identity):

    sequential   z, r = h, h                                   unless `original_ln_before`; then
                 z = N(h + x),   r = h, or h + x, or z          as `residual_before_ln` is True, 'post_add', False
                 v = F(z) + r                                  with `ln_after` LN₂(F(z)) + r, or, with
                                                               `adapter_residual_before_ln`, LN₂(F(z) + r)
    parallel     v = h + F(x)                                  with `ln_after` h + LN₂(F(x))
    then         y = N(v + x)                                  unless `original_ln_after` is off; then y = v

The backward pass goes the same way: h, x and z are used twice or three times, and their cotangents add up. Of F, with
p = φ(z Dᵀ + b_D), q = p Uᵀ + b_U and G = dy · s · g, the cotangent of q:
    dU = Gᵀ p,   db_U = Σ G,   dD, db_D and dz by φ′ and `linear`,   ds = Σ dy · g · q  (all of it, or per channel),
    dg = Σ_{t, d} dy · s · q  for each sequence, and from there through the mean and σ to w, c and z.

Config fields are AdapterHub's, which has all three methods as settings of one class; what is not its own stands below
the line in `Config`. A second adapter at the same sublayer takes the v of the first for its h, as in its `Stack`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.activations import ACTIVATIONS, sigmoid
from refpeft.hollow import hollow
from refpeft.hooks import Block, Hooks
from refpeft.method import Phi, as_dtype, masked, narrows, together
from refpeft.ops import Array, Op, Vjp, is_half, layer_norm, linear, op
from refpeft.part import Back, Grads, Lazy, Once, Run, Want, chain, join, link, op_run, plus

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.model import Model

KEYS: Mapping[str, tuple[str | None, str | None]] = {
    "D": ("adapters.adapter_down.weight", None),
    "b_D": ("adapters.adapter_down.bias", None),
    "U": ("adapters.adapter_up.weight", None),
    "b_U": ("adapters.adapter_up.bias", None),
    "s": ("adapters.scaling", None),
    "w": ("adapters.gate.weight", None),
    "c": ("adapters.gate.bias", None),
    "γ1": ("adapters.adapter_norm_before.weight", None),
    "β1": ("adapters.adapter_norm_before.bias", None),
    "γ2": ("adapters.adapter_norm_after.weight", None),
    "β2": ("adapters.adapter_norm_after.bias", None),
}
FROZEN = ()
INITS = ("houlsby", "bert", "mam_adapter")
LOCATIONS = {"attn": "mh_adapter", "cross": "cross_adapter", "mlp": "output_adapter"}
CONTAINERS = {"attn": "attention_adapters", "cross": "cross_attention_adapters", "mlp": "output_adapters"}
# families that have adapters so many modules above the sublayer's last layer
INSIDE = {"bert": 1, "roberta": 1, "t5": 2}
Φ = Mapping[str, Array]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Config:
    """AdapterHub's BnConfig, without what makes other methods of it (`phm_layer`, `inv_adapter`)."""

    mh_adapter: bool = True
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "gelu_new"
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "houlsby"
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    leave_out: Sequence[int] = ()
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    train_norms: bool = False  # the model's own norms too
    modules_to_save: Sequence[str] | None = None
    normed_input: bool = False  # parallel, where norms come first: F(norm x) in the place of F(x)

    def __post_init__(self) -> None:
        oneof("non_linearity", self.non_linearity.lower(), tuple(ACTIVATIONS))
        oneof("init_weights", self.init_weights, INITS)
        oneof("residual_before_ln", self.residual_before_ln, (True, False, "post_add"))
        if isinstance(self.scaling, str):
            oneof("scaling", self.scaling, ("learned", "channel"))
        factors = self.reduction_factor
        for key, factor in factors.items() if isinstance(factors, Mapping) else [("", factors)]:
            if not factor > 0:
                name = f"reduction_factor[{key!r}]" if key else "reduction_factor"
                raise ValueError(f"{name} must be a positive number, found {factor!r}")
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, found {getattr(self, name)!r}")
        if self.residual_before_ln == "post_add" and not (self.original_ln_before or self.is_parallel):
            raise ValueError("residual_before_ln 'post_add' needs original_ln_before, without which nothing is added")


def oneof(name: str, value: Any, among: Sequence[Any]) -> None:
    if value not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(str, among))}, found {value!r}")


# ── where adapters are ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Place:
    """A sublayer: its role 'layers.3.attn.', the layer's number, the module that holds adapters, its last layer."""

    at: str
    kind: str
    layer: int
    module: str
    last: str


def sublayers(model: "Model") -> list[Place]:
    """All sublayers of a model. Layers of a decoder are numbered on from those of the encoder, as in AdapterHub."""
    found = []
    for role, site in model.sites.items():
        if m := re.fullmatch(r"((?:encoder\.|decoder\.)?)layers\.(\d+)\.(?:(attn|cross)\.o|(mlp)\.down)", role):
            kind = m[3] or m[4]
            parents = site.path.split(".")
            up = INSIDE.get(model.config.family)
            layer = re.fullmatch(r"(.*?\.?\d+)\..*", site.path)
            assert layer is not None, f"the path of {role}, {site.path!r}, has no number"
            module = ".".join(parents[:-up]) if up else f"{layer[1]}.{CONTAINERS[kind]}"
            found.append((m[1], Place(role.rpartition(".")[0] + ".", kind, int(m[2]), module, role)))
    first = 1 + max((p.layer for stack, p in found if stack == "encoder."), default=-1)
    return [Place(p.at, p.kind, p.layer + first * (s == "decoder."), p.module, p.last) for s, p in found]


def places(cfg: Config, model: "Model") -> list[Place]:
    """Those that get an adapter."""
    return [p for p in sublayers(model) if getattr(cfg, LOCATIONS[p.kind]) and p.layer not in cfg.leave_out]


def complete(cfg: Config, model: "Model") -> Config:
    """Refuses layers that the model does not have, and a config without any adapter."""
    layers = {p.layer for p in sublayers(model)}
    if wrong := sorted(set(cfg.leave_out) - layers):
        raise ValueError(f"leave_out names layer {wrong[0]}, and the model has layers 0 to {len(layers) - 1}")
    found = places(cfg, model)
    if not found:
        raise ValueError("there is no sublayer left to adapt: see mh_adapter, output_adapter, cross_adapter, leave_out")
    for p in found:
        width(cfg, p.layer, model)
    return cfg


def width(cfg: Config, layer: int, model: "Model") -> int:
    """m, the size of the bottleneck."""
    factor = cfg.reduction_factor
    if isinstance(factor, Mapping):
        if not {str(layer), "default"} & factor.keys():
            raise ValueError(f"reduction_factor has no entry '{layer}' and no 'default'")
        factor = factor.get(str(layer), factor.get("default", 0.0))
    return max(1, int(model.config.hidden_size // factor))


def shapes(cfg: Config, layer: int, model: "Model") -> dict[str, tuple[int, ...]]:
    """The parameters of one adapter."""
    d, m = model.config.hidden_size, width(cfg, layer, model)
    found: dict[str, tuple[int, ...]] = {"D": (m, d), "b_D": (m,), "U": (d, m), "b_U": (d,)}
    if isinstance(cfg.scaling, str):
        found["s"] = (d,) if cfg.scaling == "channel" else (1,)
    if cfg.use_gating:
        found |= {"w": (1, d), "c": (1,)}
    for on, names in ((cfg.ln_before, ("γ1", "β1")), (cfg.ln_after, ("γ2", "β2"))):
        found |= dict.fromkeys(names, (d,)) if on else {}
    return found


def name(place: Place, symbol: str) -> str:
    """A parameter's name in an adapter: '<module>.adapters.<leaf>'."""
    return f"{place.module}.{KEYS[symbol][0]}"


def leaf(symbol: str) -> str:
    return str(KEYS[symbol][0]).removeprefix("adapters.")


def norms(model: "Model") -> dict[str, str]:
    """The tensors of the model's norms, by their names in an adapter."""
    both = [(s, leaf) for s in model.sites.values() if s.kind.endswith("norm") for leaf in ("weight", "bias")]
    return {f"{s.path}.{leaf}": getattr(s, leaf) for s, leaf in both if getattr(s, leaf) in model.params}


# ── how they begin ───────────────────────────────────────────────────────────────────────────────────────────────────


def init_model(
    cfg: Config, model: "Model", chosen: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """By init_weights, biases 0, norms 1 and 0, s = 1:

    'houlsby' D and U from N(0, 10⁻⁴) within two standard deviations; 'bert' from N(0, 0.02²); 'mam_adapter' D from
    U(−1/√d, 1/√d) and U = 0, which changes nothing. w from N(0, 0.02²).
    """
    outline, _ = outline_model(cfg, model, chosen)
    whole = norms(model) if cfg.train_norms else {}
    params = {n: a.copy() if n in whole else a for n, a in outline.items()}
    for p in places(cfg, model):
        for symbol in shapes(cfg, p.layer, model):
            a = outline[name(p, symbol)]
            params[name(p, symbol)] = start(cfg, symbol, a.shape, rng).astype(a.dtype)
    return params, {}


def outline_model(cfg: Config, model: "Model", chosen: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The parameters of every adapter, and the model's norms."""
    params: dict[str, Array] = {}
    for p in places(cfg, model):
        like = model.params[model.sites[p.last].weight].dtype
        for symbol, shape in shapes(cfg, p.layer, model).items():
            params[name(p, symbol)] = hollow(shape, np.float32 if is_half(like) else like)
    if cfg.train_norms:
        params |= {n: model.params[tensor] for n, tensor in norms(model).items()}
    return params, {}


def start(cfg: Config, symbol: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if symbol in ("s", "γ1", "γ2"):
        return np.ones(shape)
    if symbol not in ("D", "U", "w") or (symbol == "U" and cfg.init_weights == "mam_adapter"):
        return np.zeros(shape)
    if symbol == "D" and cfg.init_weights == "mam_adapter":
        return rng.uniform(-1, 1, shape) / math.sqrt(shape[1])
    if cfg.init_weights == "houlsby" and symbol != "w":
        return 0.01 * truncated(rng, shape)
    return rng.normal(0, 0.02, shape)


def truncated(rng: np.random.Generator, shape: tuple[int, ...], bound: float = 2.0) -> Array:
    """N(0, 1) given that it lies within ±bound, by the inverse of its distribution function."""
    from scipy import special

    low = special.ndtr(-bound)
    return special.ndtri(rng.uniform(low, 1 - low, shape))


def reads_all(cfg: Config) -> str | None:
    return "use_gating" if cfg.use_gating else None


def masks(
    cfg: Config, model: "Model", rng: np.random.Generator, ids_shape: Shape, decoder_shape: Shape | None = None
) -> dict[str, Array]:
    """Masks [b, t, d] for `dropout` of F's entries, times [b, 1, 1] for `stochastic_depth` of all of it."""
    if not (cfg.dropout or cfg.stochastic_depth):
        return {}
    found = {}
    for p in places(cfg, model):
        if p.at.startswith("decoder."):
            raise ValueError("masks are not drawn for adapters in a decoder, whose inputs have another length")
        like = model.params[model.sites[p.last].weight].dtype
        b, t = decoder_shape if decoder_shape and p.at.startswith("decoder.") else ids_shape
        drawn = [(cfg.dropout, (b, t, model.config.hidden_size)), (cfg.stochastic_depth, (b, 1, 1))]
        mask = np.ones(())
        for rate, shape in [(rate, shape) for rate, shape in drawn if rate]:
            mask = mask * np.where(rng.random(shape) < rate, 0, 1 / (1 - rate))
        found[p.module] = mask.astype(np.float32 if is_half(like) else like)
    return found


# ── what they compute ────────────────────────────────────────────────────────────────────────────────────────────────


def hooks(adapter: "Adapter", k: int, model: "Model") -> Hooks:
    """Each targeted sublayer with its adapter. What the adapter has for layers in `leave_out` waits (AdapterDrop)."""
    cfg = adapter.config
    at = {p.at: p for p in places(cfg, model)}
    found = {p.at: parameters(adapter, k, p, model) for p in at.values()}
    unknown = {path for path, (own, _) in adapter.by_module.items() if own} - {p.module for p in sublayers(model)}
    if unknown:
        raise ValueError(f"the adapter has parameters for {min(unknown)}, a sublayer that the model does not have")

    def block(b: Block) -> Block:
        return adapted(cfg, found[b.at], b, adapter.masks.get(at[b.at].module)) if b.at in at else b

    return Hooks(block=block)


def parameters(adapter: "Adapter", k: int, place: Place, model: "Model") -> Phi:
    """Those of one place, all there and of the right shapes."""
    values, keys = {}, {}
    for symbol, shape in shapes(adapter.config, place.layer, model).items():
        full = name(place, symbol)
        a = adapter.params.get(full)
        if a is None or a.shape != shape:
            raise ValueError(f"{full} must have shape {shape}, found {'nothing' if a is None else a.shape}")
        values[symbol], keys[symbol] = a, (k, full)
    return Phi(values, keys)


def adapted(cfg: Config, φ: Phi, b: Block, mask: Array | None = None) -> Block:
    """The sublayer with its adapter: x → v in the place of x → h, and x → y of it."""
    norm = None if b.norm_first else b.norm
    F = bottleneck(cfg, φ, mask)
    if cfg.is_parallel:
        F = chain(F, normed(φ)) if cfg.ln_after else F
        inner = together(b.sub, chain(b.norm, F) if cfg.normed_input and b.norm_first else F)
    else:
        inner = sequential(cfg, φ, b.sub, norm, F)
    return b.changed(inner, outer(inner, norm) if cfg.original_ln_after else inner)


def outer(inner: Run, norm: Run | None) -> Run:
    """y = N(v + x)"""

    def run(x: Array) -> tuple[Array, Back]:
        v, back_v = inner(x)
        y, back_norm = norm(v + x) if norm else (v + x, None)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            d, grads = back_norm(dy, want) if back_norm else (dy, {})
            dx, grads_v = back_v(d, want)
            return plus(d, dx), join(grads, grads_v)

        return y, back

    return run


def sequential(cfg: Config, φ: Phi, sub: Run, norm: Run | None, F: Run) -> Run:
    """x → v, with h, then z and r, then F and what joins it with r."""
    add, early = cfg.original_ln_before, cfg.original_ln_before and cfg.residual_before_ln

    def run(x: Array) -> tuple[Array, Back]:
        h, back_h = sub(x)
        t = h + x if add else h
        z, back_z = norm(t) if add and norm else (t, None)
        u, back_u = F(z)
        r = z if not early else t if early == "post_add" else h
        v, back_v = seam(cfg, φ, u, r)

        def back(dv: Lazy, want: Want) -> tuple[Lazy, Grads]:
            du, dr, grads = back_v(dv, want)
            dz, g = back_u(du, want)
            grads = join(grads, g)
            dz = dz if early else plus(dz, dr)
            dt, g = back_z(dz, want) if back_z else (dz, {})
            grads = join(grads, g)
            dt = plus(dt, dr) if early == "post_add" else dt
            dx, g = back_h(plus(dt, dr) if early is True else dt, want)
            return plus(dx, dt) if add else dx, join(grads, g)

        return v, back

    return run


def seam(cfg: Config, φ: Phi, u: Array, r: Array) -> tuple[Array, Callable[[Lazy, Want], tuple[Lazy, Lazy, Grads]]]:
    """v = u + r, LN₂(u) + r or LN₂(u + r), in the dtype of r; back(dv) → du, dr."""
    first = cfg.ln_after and cfg.adapter_residual_before_ln
    v, back_norm = normed(φ)(u + r if first else u) if cfg.ln_after else (u, None)
    v = v if first else v + r
    like, wide = as_dtype(v, r), v

    def back(dv: Lazy, want: Want) -> tuple[Lazy, Lazy, Grads]:
        d = Once(lambda: dv().astype(wide.dtype)) if narrows(wide, r) else dv
        du, grads = back_norm(d, want) if back_norm else (d, {})
        dr = du if first else d
        return du, Once(lambda: dr().astype(r.dtype)) if narrows(wide, r) else dr, grads

    return like, back


def normed(φ: Phi) -> Run:
    """LN₂"""
    return parametrised(partial(layer_norm, eps=1e-5), φ, "γ2", "β2")


def bottleneck(cfg: Config, φ: Phi, mask: Array | None = None) -> Run:
    """z → F(z)"""
    runs = [parametrised(partial(layer_norm, eps=1e-5), φ, "γ1", "β1")] if cfg.ln_before else []
    runs += [parametrised(linear, φ, "D", "b_D"), op_run(ACTIVATIONS[cfg.non_linearity.lower()])]
    runs += [parametrised(linear, φ, "U", "b_U")]
    if isinstance(cfg.scaling, str):
        runs.append(parametrised(scale, φ, "s"))
    elif cfg.scaling != 1:
        runs.append(op_run(partial(multiply, factor=cfg.scaling)))
    if mask is not None:
        runs.append(masked(op_run(ACTIVATIONS["linear"]), mask))
    return gated(φ, chain(*runs)) if cfg.use_gating else chain(*runs)


def parametrised(f: Op, φ: Phi, *names: str) -> Run:
    """An op with parameters of the adapter, as a run."""

    def run(x: Array) -> tuple[Array, Back]:
        y, vjp = f(x, *(φ[n] for n in names))

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, *dφ = link(vjp, dy, 1 + len(names))
            return dx, φ.grads(want, dict(zip(names, dφ, strict=True)))

        return y, back

    return run


@op
def multiply(x: Array, factor: float) -> tuple[Array, Vjp]:
    """y = factor · x"""
    return factor * x, lambda dy: (lambda: factor * dy,)


@op
def scale(x: Array, s: Array) -> tuple[Array, Vjp]:
    """y = x ⊙ s.      dx = dy ⊙ s,   ds = Σ dy ⊙ x over the entries that share s.      x [… d], s [1] or [d]"""
    d = x.shape[-1]

    def ds(dy: Array) -> Array:
        each = (dy * x).reshape(-1, d).sum(0)
        return each if s.shape[0] == d else each.sum(keepdims=True)

    return x * s, lambda dy: (lambda: dy * s, lambda: ds(dy))


@op
def over_sequence(x: Array) -> tuple[Array, Vjp]:
    """y = mean over the positions, padding included.      x [b, t, 1] → y [b, 1, 1]"""
    t = x.shape[1]
    return x.sum(1, keepdims=True) / t, lambda dy: (lambda: np.zeros_like(x) + dy / t,)


def gate(φ: Phi) -> Run:
    """g = mean_t σ(z wᵀ + c)      z [b, t, d] → g [b, 1, 1]"""
    return chain(parametrised(linear, φ, "w", "c"), op_run(sigmoid), op_run(over_sequence))


def gated(φ: Phi, F: Run) -> Run:
    """g(z) · F(z)"""

    def run(z: Array) -> tuple[Array, Back]:
        u, back_u = F(z)
        g, back_g = gate(φ)(z)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dz_u, grads_u = back_u(Once(lambda: dy() * g), want)
            dz_g, grads_g = back_g(Once(lambda: (dy() * u).sum(-1, keepdims=True).sum(1, keepdims=True)), want)
            return plus(dz_u, dz_g), join(grads_u, grads_g)

        return g * u, back

    return run
