"""Prefix tuning: learned keys and values.      Li & Liang 2021, arXiv 2101.00190, §4.2, eq. (3), and §4.3

    y = attention(q, [P_K; K], [P_V; V])          of every layer, its own P_K and P_V [n, g, e] seen by every query
    P = [P_K of layer 0, P_V of layer 0, P_K of layer 1, …]          [n, 2 L t], each of them [n, t], t = g e
    P = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂          with `prefix_projection`; E [n, c], W₁ [h, c], W₂ [2 L t, h]

P_K gets neither position nor rotation: it stands where keys are multiplied with queries. Unless `position_shift` is
off, the tokens stand at n, n + 1, … as if the prefix had taken the places before them; so where positions are relative
(T5), the bias of these places is added to q P_K, and only otherwise none.

The prefix serves all rows of a batch:   dP = Σ_b [dP_K, dP_V of each layer].   With u = tanh(E W₁ᵀ + b₁):
    dW₂ = dPᵀ u,   db₂ = Σ dP,   dz = (dP W₂) ⊙ (1 − u²),   dW₁ = dzᵀ E,   db₁ = Σ dz,   dE = dz W₁.

Claims:
    PX1  Attention is mixed with attention to the prefix: y = (1 − λ) attention(q, K, V) + λ attention(q, P_K, P_V), λ
         the share of the prefix in Σ exp(α q k) over all keys (He et al. 2021, arXiv 2110.04366, eq. (7)).
    PX2  A prefix of zeros is not the identity: y = y₀ Z/(Z + n), Z = Σ exp(α q k) over the keys of the tokens.
    PX3  The keys and values of a text, taken from the cache, are a prefix with which a causal model continues as if
         it had read the text (`of_cache`).
    PX4  The MLP is a way to train: without it (`flat`) the adapter computes the same.
    PX5  A prefix has no order: its n places may be exchanged.

In an encoder-decoder there are three prefixes of this form, each with its own MLP: of the encoder's attention, of the
decoder's own ('prompt_embeddings', as elsewhere) and of the attention to the encoder ('encoder.…', 'cross.…').

Where implementations differ:
    * The paper trains through the MLP always, with h = 512 or 800. HF peft's default is without it, and if with, then
      h = c = t: we follow. Its `init_weights='zero'` is documented as a no-op, which it is not (PX2).
    * Positions: HF peft shifts them by n, AdapterHub does not (`position_shift`).
    * AdapterHub: MLP with c = the width of the model (`input_size`), h = 512, dropped by 'eject'; `leave_out` names
      layers without a prefix.
    * HF peft saves P only, not the MLP, so that training through it cannot go on. So do we in its format.
    * HF peft on encoder-decoders gives layer l of the decoder the blocks 4 l and 4 l + 1 modulo 2 L of P as P_K, P_V:
      half of P is never used, for even L. A non-conformance: neither imitated, read nor written here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refpeft.hollow import hollow
from refpeft.hooks import Hooks, Memory
from refpeft.method import Phi, as_dtype, narrows
from refpeft.methods.lora import kaiming
from refpeft.ops import Array, is_half, linear, tanh
from refpeft.part import Grads, Lazy, Once, Want, join, link
from refpeft.stacks import STACKS, attentions, task_type

Columns = tuple[Array, Callable[[Lazy, Want], Grads]]
KEYS: Mapping[str, tuple[str | None, str | None]] = {}
FROZEN = ()
NAMES = {
    "P": "prompt_embeddings",
    "E": "prompt_encoder.embedding.weight",
    "W1": "prompt_encoder.transform.0.weight",
    "b1": "prompt_encoder.transform.0.bias",
    "W2": "prompt_encoder.transform.2.weight",
    "b2": "prompt_encoder.transform.2.bias",
}
SHARED = {stack + name: stack + key for stack in STACKS for name, key in NAMES.items()}


@dataclass(frozen=True)
class Config:
    """HF peft's PrefixTuningConfig, and below the line what AdapterHub has besides. None: as the model has it."""

    num_virtual_tokens: int = 10
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    init_weights: str | None = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None

    input_size: int | None = None
    position_shift: bool = True
    leave_out: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "encoder_hidden_size", "input_size"):
            if (n := getattr(self, name)) is not None and not (isinstance(n, int) and n > 0):
                raise ValueError(f"{name} must be a positive integer, found {n!r}")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None or 'zero', found {self.init_weights!r}")


def complete(cfg: Config, model: Any) -> Config:
    """The config with the facts of the model, which must not say otherwise; as in HF peft, h = c = t if not given."""
    c = model.config
    t = c.num_kv_heads * c.head_dim
    facts = {"token_dim": t, "num_layers": c.num_layers, "num_attention_heads": c.num_kv_heads}
    for name, value in facts.items():
        if getattr(cfg, name) not in (None, value):
            raise ValueError(f"{name} must be {value}, as the keys of this model have it, found {getattr(cfg, name)}")
    return replace(
        cfg,
        encoder_hidden_size=cfg.encoder_hidden_size or t,
        input_size=cfg.input_size or t,
        task_type=cfg.task_type or task_type(model),
        **facts,
    )


def places(cfg: Config, model: Any) -> dict[str, list[str]]:
    """The attentions of each stack that get a prefix."""
    return {stack: [at for n, at in ats.items() if n not in cfg.leave_out] for stack, ats in attentions(model).items()}


def init_model(cfg: Config, model: Any, chosen: Sequence[str], rng: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """E (or P) from N(0, 1), linear layers from U(−1/√i, 1/√i); P = 0 with init_weights='zero'."""
    outline, _ = outline_model(cfg, model, chosen)
    params: dict[str, Array] = {}
    nil = 0 if cfg.init_weights == "zero" else 1
    for stack in places(cfg, model):
        shape = {name: a.shape for name in NAMES if (a := outline.get(SHARED[stack + name])) is not None}
        if cfg.prefix_projection:
            first, second = shape["W1"], shape["W2"]
            φ = {"E": rng.normal(size=shape["E"]), "W1": kaiming(rng, first), "b1": kaiming(rng, first)[:, 0]}
            φ |= {"W2": nil * kaiming(rng, second), "b2": nil * kaiming(rng, second)[:, 0]}
        else:
            φ = {"P": nil * rng.normal(size=shape["P"])}
        params |= {key: φ[name].astype(outline[key].dtype) for name in φ for key in [SHARED[stack + name]]}
    return params, {}


def outline_model(cfg: Config, model: Any, chosen: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """P [n, 2 L t], or E [n, c], W₁ [h, c], b₁ [h], W₂ [2 L t, h], b₂ [2 L t], of each stack."""
    n, t = cfg.num_virtual_tokens, model.config.num_kv_heads * model.config.head_dim
    c, h = cfg.input_size or t, cfg.encoder_hidden_size or t
    like = model.params[model.sites["embed.token"].weight].dtype
    params: dict[str, Array] = {}
    for stack, ats in places(cfg, model).items():
        w = 2 * len(ats) * t
        shapes: dict[str, tuple[int, ...]] = {"P": (n, w)}
        if cfg.prefix_projection:
            shapes = {"E": (n, c), "W1": (h, c), "b1": (h,), "W2": (w, h), "b2": (w,)}
        dtype = np.float32 if is_half(like) else like
        params |= {SHARED[stack + name]: hollow(shape, dtype) for name, shape in shapes.items()}
    return params, {}


def kept(adapter: Any) -> Any:
    """P [n, 2 L t] of each stack: n is the length of E, 2 L t that of b₂."""
    params = dict(adapter.params)
    for stack in STACKS:
        if SHARED[stack + "E"] in adapter.params:
            E, _, _, _, b2 = (params.pop(stack + key) for name, key in NAMES.items() if name != "P")
            params[SHARED[stack + "P"]] = hollow((E.shape[0], b2.shape[0]), E.dtype)
    return adapter.replace(config=replace(adapter.config, prefix_projection=False), params=params)


def hooks(adapter: Any, k: int, model: Any) -> Hooks:
    """Each attention sees its part of P; the tokens make room."""
    cfg, like = adapter.config, model.params[model.sites["embed.token"].weight]
    n: int = next(a.shape[0] for name, a in adapter.params.items() if name.endswith((NAMES["P"], NAMES["E"])))
    shape = (n, model.config.num_kv_heads, model.config.head_dim)
    parts: dict[str, Callable[[], Memory]] = {}
    for stack, ats in places(cfg, model).items():
        names = {name: stack + key for name, key in NAMES.items() if stack + key in adapter.params}
        φ = Phi({name: adapter.params[full] for name, full in names.items()}, {n: (k, f) for n, f in names.items()})
        hidden = Once(mlp, φ) if cfg.prefix_projection else None
        parts |= {at: Once(memory, φ, hidden, layer, shape, like, cfg.position_shift) for layer, at in enumerate(ats)}
    return Hooks(memory=lambda at: [parts[at]()] if at in parts else [], shift=shape[0] if cfg.position_shift else 0)


def memory(φ: Phi, hidden: Lazy | None, layer: int, shape: tuple[int, int, int], like: Array, placed: bool) -> Memory:
    """P_K and P_V of one layer, in the dtype of a 16-bit model."""
    n, t = shape[0], shape[1] * shape[2]
    P, back_P = columns(φ, hidden, 2 * layer * t, 2 * (layer + 1) * t)
    y = as_dtype(P, like).reshape(n, 2, *shape[1:])

    def back(dk: Lazy, dv: Lazy, want: Want) -> Grads:
        def dP() -> Array:
            d = np.concatenate([dk().sum(0).reshape(n, t), dv().sum(0).reshape(n, t)], axis=1)
            return d.astype(P.dtype) if narrows(P, like) else d

        return back_P(Once(dP), want)

    return Memory(y[None, :, 0], y[None, :, 1], back, placed=placed)


def columns(φ: Phi, hidden: Lazy | None, a: int, z: int) -> Columns:
    """P[:, a:z], of an MLP u W₂[a:z]ᵀ + b₂[a:z]; what others of P's columns give joins in `part.join`."""
    if hidden is None:
        P = φ["P"]
        return P[:, a:z], lambda d, want: φ.grads(want, {"P": Once(lambda: among(d().T, P.T, a).T)})
    u, back_u = hidden()
    W2, b2 = φ["W2"], φ["b2"]
    y, vjp = linear(u, W2[a:z], b2[a:z])

    def back(d: Lazy, want: Want) -> Grads:
        du, dW2, db2 = link(vjp, d, 3)
        own = φ.grads(want, {"W2": Once(lambda: among(dW2(), W2, a)), "b2": Once(lambda: among(db2(), b2, a))})
        return join(own, back_u(du, want))

    return y, back


def mlp(φ: Phi) -> Columns:
    """u = tanh(E W₁ᵀ + b₁)      [n, h]"""
    z, vjp_z = linear(φ["E"], φ["W1"], φ["b1"])
    u, vjp_u = tanh(z)

    def back(du: Lazy, want: Want) -> Grads:
        dE, dW1, db1 = link(vjp_z, link(vjp_u, du, 1)[0], 3)
        return φ.grads(want, {"E": dE, "W1": dW1, "b1": db1})

    return u, back


def among(d: Array, like: Array, a: int) -> Array:
    """Zeros like that array, with d in the place of its rows from a on."""
    zeros = np.zeros_like(like, dtype=d.dtype)
    return np.concatenate([zeros[:a], d, zeros[a + d.shape[0] :]])


def flat(adapter: Any) -> Any:
    """The same adapter without its MLP, if it has one: P is what the MLP made of E."""
    params = dict(adapter.params)
    for stack in STACKS:
        if SHARED[stack + "E"] in adapter.params:
            φ = Phi({name: params.pop(stack + key) for name, key in NAMES.items() if name != "P"}, {})
            P, _ = linear(mlp(φ)[0], φ["W2"], φ["b2"])
            params[SHARED[stack + "P"]] = P
    return adapter.replace(config=replace(adapter.config, prefix_projection=False), params=params)


def of_cache(cache: Sequence[tuple[Array, Array]]) -> Array:
    """P [n, 2 L t] of the keys and values [1, n, g, e] that a model keeps of a text: `model.decode(ids)[1]`."""
    return np.concatenate([a[0].reshape(a.shape[1], -1) for layer in cache for a in layer], axis=1)
