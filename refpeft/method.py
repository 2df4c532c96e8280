"""What the methods share: reading a config's patterns and targets, and the lifts from one matrix to a part.

A method is one module in `methods/`, registered there by one line, with

    Config                             frozen; fields named as in HF's adapter_config.json
    KEYS                               its parameters' names in the formulae → in checkpoints (linear, embedding)
    FROZEN                             which of them are never trained
    shapes(cfg, part) → φ's shapes     of its parameters for one part, named as in the formulae; where the method is
                                       not defined for the part, it is here that it says so
    init(cfg, part, rng) → φ           these parameters
    merge(cfg, W, b, φ) → W′, b′, vjp  the definition, where the method is a reparametrisation of weights
    wrap(cfg, φ, part, …) → part       the run-time form

A method that takes hold of a model elsewhere than at its layers has

    hooks(adapter, k, model) → Hooks   instead of `wrap` and `merge`: see `refpeft.hooks`
    init_model(cfg, model, chosen, rng) → params, frozen      instead of `init`, by their names in checkpoints, if they
                                       belong to no module; `chosen` are the roles of the targeted sites
    outline_model(cfg, model, chosen) → params, frozen        the same arrays, hollow (`refpeft.hollow`) or the model's
    merge_model(adapter, model) → model      where it puts tensors in the place of the model's own, before all other
                                       methods act (`refpeft.selection`)
    complete(cfg, model) → cfg         if some fields of its config are facts of the model (None: as the model has it)
    kept(adapter) → adapter            of hollow arrays: what a file keeps of the adapter, if not all
    masks(cfg, model, rng, ids_shape, decoder_shape) → masks      its dropout masks, if they are of its own parts and
                                       not of the model's layers
    flat(adapter), rotations(adapter) → adapter      the same function without the network that makes its prefix, or
                                       with the rotations that its parameters make in their place
    reads_all(cfg) → field             the field of its config, if any, that makes a position depend on all others: such
                                       an adapter cannot decode step by step
    remembered(cfg, params) → memory, penalty(cfg, params) → R, grads, follow(cfg, t, params, grads, memory) → params,
    memory, finished(adapter, memory) → adapter        what it does in training besides: see `refpeft.methods.adalora`
    SHARED                             names in the formulae → in checkpoints, of parameters that all modules share;
                                       'mlp_head.' with its dot stands for all names that begin so

Where both exist they must agree on outputs and gradients: wrap ≡ merge, a theorem every method is tested for
(`weight` below runs a part by its `merge`). `φ` arrives as a `Phi`: values by name, and under which key to return
each gradient.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from refpeft.ops import Array, is_half
from refpeft.part import Back, Grads, Key, Lazy, Once, Part, Run, Want, join, link, plus

Values = Mapping[str, Array]


@dataclass(frozen=True)
class Phi:
    """A method's parameters for one part: values by their names in the formulae; keys of those that are trained."""

    values: Values
    keys: Mapping[str, Key]

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    def get(self, name: str) -> Array | None:
        return self.values.get(name)

    def grads(self, want: Want, lazies: Mapping[str, Lazy]) -> Grads:
        keys = self.keys
        return {keys[name]: d for name, d in lazies.items() if name in keys and keys[name] in want}


MergeVjp = Callable[[Lazy, Lazy], tuple[Lazy, Mapping[str, Lazy]]]  # (dW′, db′) → dW, dφ;   db = dφ['b'], else db′
Merged = tuple[Array, Array | None, MergeVjp]
Base = tuple[Array, Array | None]  # the part's own W and b, where other adapters have changed them before


class Method(Protocol):
    """The shape of a module in `methods/`."""

    Config: Any
    KEYS: Mapping[str, tuple[str | None, str | None]]
    FROZEN: Sequence[str]

    def shapes(self, cfg: Any, part: Part) -> dict[str, tuple[int, ...]]: ...
    def init(self, cfg: Any, part: Part, rng: np.random.Generator) -> dict[str, Array]: ...
    def merge(self, cfg: Any, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged: ...
    def wrap(self, cfg: Any, φ: Phi, part: Part, mask: Array | None = None) -> Part: ...


def shared(method: Any) -> Mapping[str, str]:
    """The names of the parameters that belong to no module: in the formulae → in checkpoints."""
    return getattr(method, "SHARED", {})


# ── lifts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def branch(part: Part, δ: Run) -> Part:
    """y = y₀ + δ(x): what an additive method does to a part, several of them in any order."""
    return part.wrapped(together(part.run, δ))


def together(f: Run, g: Run) -> Run:
    """y = f(x) + g(x), in the dtype of f(x)."""

    def run(x: Array) -> tuple[Array, Back]:
        y, back_f = f(x)
        z, back_g = g(x)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx_f, grads_f = back_f(dy, want)
            dx_g, grads_g = back_g(Once(lambda: dy().astype(z.dtype)) if narrows(z, y) else dy, want)
            return plus(dx_f, dx_g), join(grads_f, grads_g)

        return as_dtype(y + z, y), back

    return run


def weight(part: Part, φ: Phi, merge: Callable[[Array, Array | None, Values], Merged]) -> Part:
    """y = x W′ᵀ + b′, or a norm of gain W′ and shift b′, with W′, b′ = merge(W, b, φ): any reparametrisation of a
    layer's weights, run by its definition."""

    def run(x: Array) -> tuple[Array, Back]:
        W, b, vjp_merge = merge(part.W, part.b, φ.values)
        y, vjp = part.op(x, W, b)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, dW1, db1 = link(vjp, dy, 3)
            dW, dφ = vjp_merge(dW1, db1)
            db = None if part.b is None else dφ.get("b", db1)
            return dx, join(part.base_grads(want, dW, db), φ.grads(want, dφ))

        return y, back

    return part.wrapped(run)


def masked(δ: Run, mask: Array | None) -> Run:
    """δ(x ⊙ mask): dropout with its mask as an argument (zeros, and 1/(1 − p) where kept)."""
    if mask is None:
        return δ

    def run(x: Array) -> tuple[Array, Back]:
        y, backδ = δ(x * mask)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, grads = backδ(dy, want)
            return Once(lambda: dx() * mask), grads

        return y, back

    return run


def as_dtype(y: Array, like: Array) -> Array:
    """A 16-bit layer stays one, though its adapter be float32."""
    return y.astype(like.dtype) if narrows(y, like) else y


def narrows(y: Array, like: Array) -> bool:
    return is_half(like.dtype) and y.dtype != like.dtype


# ── reading configs, as HF peft reads them ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Targets:
    """Which modules a method adapts, and which it trains whole: the fields that all of HF peft's configs share."""

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None


def at(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The entry of a rank_pattern or alpha_pattern for a module: keys are regular expressions for the end of its path
    (from a dot on), the first that matches wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def targeted(cfg: Targets, path: str) -> bool:
    """Does the config target the module at this path? A string is a regular expression for the whole path, a list holds
    paths or their ends (from a dot on); `exclude_modules` likewise; what is trained whole is never adapted;
    `layers_to_transform` picks layers by number, except for modules that the list names in full."""
    if excluded(cfg, path) or not matches(cfg.target_modules, path):
        return False
    return not numbered(cfg) or path in (cfg.target_modules or ()) or layer(cfg, path) in numbered(cfg)


def excluded(cfg: Any, path: str) -> bool:
    """Excluded by name, or inside a module that is trained whole (whose names are regular expressions here)."""
    whole = (rf"(^|.*\.){name}($|\..*)" for name in cfg.modules_to_save or ())
    return matches(cfg.exclude_modules, path) or any(re.match(pattern, path) for pattern in whole)


def numbered(cfg: Targets) -> Sequence[int]:
    """The layers to transform; empty means all."""
    layers = cfg.layers_to_transform
    return [layers] if isinstance(layers, int) else layers or ()


def layer(cfg: Targets, path: str) -> int | None:
    """A module's layer: the first number in its path that follows one of the layers_pattern (any name, if none)."""
    patterns = [cfg.layers_pattern] if isinstance(cfg.layers_pattern, str) else cfg.layers_pattern
    forms = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns and any(patterns) else [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for form in forms if (m := re.match(form, path))), None)
    return int(found[1]) if found else None


def matches(names: str | Sequence[str] | None, path: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names or ())


DEFAULT_TARGETS = {  # HF peft's, where a config names none
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "gpt3": ("q_proj", "v_proj"),  # Hu et al. 2021; for HF peft there is no such model
    "t5": ("q", "v"),
    "bart": ("q_proj", "v_proj"),
}
