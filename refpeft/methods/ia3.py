"""(IA)³: Infused Adapter by Inhibiting and Amplifying Inner Activations.      Liu et al. 2022, arXiv 2205.05638, §3.3

    W′ = diag(l) W,   b′ = l ⊙ b         y = l ⊙ y₀           keys and values: l [o, 1], what the layer gives is scaled
    W′ = W diag(l),   b′ = b             y = f(l ⊙ x)         feed-forward: l [1, i], what the layer takes is scaled

y₀ = f(x) = x Wᵀ + b. As the paper writes it: softmax(Q (l_k ⊙ Kᵀ)/√d) (l_v ⊙ V), and (l_ff ⊙ γ(W₁ x)) W₂, γ being the
activation; so l_ff belongs to the input of the second matrix of the feed-forward network. Init: l = 1.

With G = ∂L/∂W′:   dl = Σᵢ G ⊙ W + db′ ⊙ b,   db = l ⊙ db′      or   dl = Σₒ G ⊙ W,   db = db′;      dW = l ⊙ G.
In the run-time form:   dl = Σ dy ⊙ y₀,   dy₀ = l ⊙ dy      or, with du = f's own dx,   dl = Σ du ⊙ x,   dx = l ⊙ du.

Claims:
    IA1  l = 1 at init, hence W′ = W and b′ = b exactly.
    IA2  wrap ≡ merge: both forms give the same outputs and gradients.
    IA3  Several adapters multiply: l = l₁ ⊙ l₂, in any order, where they scale the same side of a layer.
    IA4  l = 0 silences: all that a layer gives is zero, its bias too; or all that it takes, and b is left.
    IA5  To scale what one layer gives, or what the next takes, is the same where nothing but sums is between them.

Which layers are feed-forward is said by `feedforward_modules`, as in HF peft: names are the ends of paths there (of
their letters, with no dot needed), and a string is a regular expression for the whole path.

Where implementations differ:
    * AdapterHub scales what the first matrix of the feed-forward network gives, before the activation: its `ia3` is not
      the paper's. Its merge leaves the bias as it was.
    * LyCORIS has 1 + w for l, w = 0 at first, and leaves the bias as it was, except in its bypass mode; two at once are
      l₁ + l₂ − 1, merged l₁ l₂. InvokeAI reads its files, and leaves the bias too.
    * HF peft divides by l + 10⁻⁸ when it unmerges: a merged l of 0 cannot be taken out again.
    * HF peft's own feed-forward modules of BERT, 'output.dense', are the outputs of attentions too.
    * In HF peft, whether a layer is feed-forward is settled by the first adapter there; later ones follow it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from refpeft.method import Base, Merged, Phi, Targets, Values, as_dtype, narrows, targeted
from refpeft.ops import Array, is_half, rows
from refpeft.part import Back, Grads, Lazy, Once, Part, Want

if TYPE_CHECKING:
    from refpeft.model import Model

KEYS: Mapping[str, tuple[str | None, str | None]] = {"l": ("ia3_l", None)}
FROZEN = ()
DEFAULTS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {  # HF peft's: targets, and the feed-forward ones
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt3": (("k_proj", "v_proj", "fc_out"), ("fc_out",)),  # the paper's; for HF peft there is no such model
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "bert": (("key", "value", "output.dense"), ("output.dense",)),
    "roberta": (("key", "value", "output.dense"), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "t5": (("k", "v", "wo"), ("wo",)),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
}


@dataclass(frozen=True)
class Config(Targets):
    """HF peft's IA3Config. `at(path)` says of one module whether it is feed-forward."""

    feedforward_modules: str | Sequence[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None:
                raise ValueError(f"(IA)³ has no {name}: name the modules themselves in target_modules")

    def at(self, path: str) -> "Place":
        names = self.feedforward_modules
        if isinstance(names, str):
            return Place(re.fullmatch(names, path) is not None, self.init_ia3_weights)
        return Place(path.endswith(tuple(names or ())), self.init_ia3_weights)


@dataclass(frozen=True)
class Place:
    """The config at one module: `takes`, if what the layer takes is scaled, and not what it gives."""

    takes: bool
    init_ia3_weights: bool = True


def complete(cfg: Config, model: "Model") -> Config:
    """With HF peft's targets for the family, where none are named. A name that no targeted module ends in is refused,
    unless it is among the family's own."""
    targets, forward = DEFAULTS.get(model.config.family, (None, ()))
    cfg = cfg if cfg.target_modules is not None else replace(cfg, target_modules=targets)
    cfg = cfg if cfg.feedforward_modules is not None else replace(cfg, feedforward_modules=forward)
    names = [] if isinstance(cfg.feedforward_modules, str) else cfg.feedforward_modules or []
    paths = [site.path for site in model.sites.values() if all_linear(cfg) or targeted(cfg, site.path)]
    for name in names:
        if name not in forward and not any(path.endswith(name) for path in paths):
            raise ValueError(f"feedforward_modules: no module that target_modules names ends in {name!r}")
    return cfg


def all_linear(cfg: Config) -> bool:
    return isinstance(cfg.target_modules, str) and cfg.target_modules.lower() == "all-linear"


def shapes(cfg: Place, part: Part) -> dict[str, tuple[int, ...]]:
    """l [1, i] or [o, 1]."""
    if part.kind == "embedding":
        raise ValueError(f"{part.path}: (IA)³ is defined for linear layers, not for embeddings")
    o, i = part.W.shape
    return {"l": (1, i) if cfg.takes else (o, 1)}


def init(cfg: Place, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """l = 1; with init_ia3_weights=False it is drawn from N(0, 1)."""
    shape = shapes(cfg, part)["l"]
    dtype = np.float32 if is_half(part.W.dtype) else part.W.dtype
    return {"l": (np.ones(shape) if cfg.init_ia3_weights else rng.normal(size=shape)).astype(dtype)}


def merge(cfg: Place, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = diag(l) W,   b′ = l ⊙ b;      or   W′ = W diag(l),   b′ = b."""
    l = φ["l"]  # noqa: E741
    given = b is not None and not cfg.takes
    b1 = as_dtype(l[:, 0] * b, b) if b is not None and given else b

    def dl(dW1: Lazy, db1: Lazy) -> Array:
        d = (widened(dW1(), l) * W).sum(0 if cfg.takes else 1).reshape(l.shape)
        return d + (widened(db1(), l) * b)[:, None] if given else d

    def vjp(dW1: Lazy, db1: Lazy) -> tuple[Lazy, dict[str, Lazy]]:
        db = {"b": Once(lambda: l[:, 0] * db1())} if given else {}
        return Once(lambda: l * dW1()), {"l": Once(dl, dW1, db1), **db}

    return as_dtype(l * W, W), b1, vjp


def wrap(cfg: Place, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = l ⊙ f(x),   or   y = f(l ⊙ x)"""
    l = φ["l"][0] if cfg.takes else φ["l"][:, 0]  # noqa: E741

    def dl(d: Lazy, x: Array) -> Array:
        d1 = rows(widened(d(), l) * x).sum(0)
        return d1[None] if cfg.takes else d1[:, None]

    def takes(x: Array) -> tuple[Array, Back]:
        y, back_f = part.run(as_dtype(l * x, x))

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            du, grads = back_f(dy, want)
            return Once(lambda: as_dtype(l * du(), x)), {**grads, **φ.grads(want, {"l": Once(dl, du, x)})}

        return y, back

    def gives(x: Array) -> tuple[Array, Back]:
        y, back_f = part.run(x)

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, grads = back_f(Once(lambda: as_dtype(l * dy(), y)), want)
            return dx, {**grads, **φ.grads(want, {"l": Once(dl, dy, y)})}

        return as_dtype(l * y, y), back

    return part.wrapped(takes if cfg.takes else gives)


def widened(d: Array, like: Array) -> Array:
    """The cotangent of a 16-bit layer as its float32 adapter takes it, before anything is summed."""
    return d.astype(like.dtype) if narrows(like, d) else d
