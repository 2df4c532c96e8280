"""Soft prompts: virtual tokens, whose rows are learned, among the tokens of the vocabulary; and what is done with them.

    x = E[ids] where ids < v,   P[ids − v] else          E [v, d], P [m, d], ids [b, s] → x [b, s, d]
    dP = onehot(ids − v)ᵀ dx

A virtual token is an id from v, the size of the vocabulary, on. So a prompt is a row of ids as any other, a template
may have virtual tokens anywhere, and each row of a batch may have a prompt of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.hollow import hollow
from refpeft.hooks import Hooks, Prompt
from refpeft.method import as_dtype
from refpeft.methods import METHODS
from refpeft.ops import Array, embedding, is_half, rows
from refpeft.part import Grads, Lazy, Once, Part, Want, join
from refpeft.stacks import task_type

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.model import Model

P = "prompt_embeddings"
PLACEMENTS = ("before", "after_embedding", "template")
Pull = Callable[[Lazy, Want], Grads]  # from dP to the gradients of what P was made from


@dataclass(frozen=True)
class Virtual:
    """The fields that all soft prompts share, named as in HF peft, and one of our own.

    `placement`: 'before' the tokens, with positions that run on from the prompt to the tokens (HF peft);
    'after_embedding', before what the embeddings made of the tokens, so that the prompt has no positions and those of
    the tokens start where they always do (AdapterHub); or in a 'template': the ids of the input hold the virtual tokens
    v, v + 1, …, wherever they stand, and none are added.
    """

    num_virtual_tokens: int = 20
    num_transformer_submodules: int | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    task_type: str | None = None
    modules_to_save: Sequence[str] | None = None
    placement: str = "before"

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "num_transformer_submodules", "token_dim"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and (value is not None or name == "num_virtual_tokens"):
                raise ValueError(f"{name} must be a positive integer, found {value!r}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, found {self.placement!r}")

    @property
    def total(self) -> int:
        """m = n S: the rows of P, of which the first n are used. With S = 2, HF peft's layout for encoder-decoder
        models, the others are allocated and saved, and have no gradient."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)


def complete(cfg: Any, model: "Model") -> Any:
    """The config with what HF peft fills in from the model."""
    c = model.config
    if cfg.token_dim not in (None, c.hidden_size):
        raise ValueError(f"token_dim must be the width of the model, {c.hidden_size}, found {cfg.token_dim}")
    if cfg.placement == "after_embedding" and not any(role.endswith("embed.position") for role in model.sites):
        raise ValueError(
            f"placement 'after_embedding' needs a model with learned positions, which {c.family} models do not have"
        )
    return replace(
        cfg,
        num_transformer_submodules=cfg.num_transformer_submodules or 1,
        token_dim=c.hidden_size,
        num_attention_heads=cfg.num_attention_heads or c.num_heads,
        num_layers=cfg.num_layers or c.num_layers,
        task_type=cfg.task_type or task_type(model),
    )


def table(model: "Model") -> Array:
    """E [v, d]"""
    E: Array = model.params[model.sites["embed.token"].weight]
    return E


def dtype_of(model: "Model") -> Any:
    """Of an adapter's own parameters: the embedding's, but float32 for 16 bits."""
    return np.dtype(np.float32) if is_half(table(model).dtype) else table(model).dtype


def outline(cfg: Virtual, model: "Model") -> Array:
    """P [n S, d], hollow."""
    return hollow((cfg.total, table(model).shape[1]), dtype_of(model))


def hooks(cfg: Virtual, P: Array, pull: Pull, model: "Model", of_rows: Array | None = None) -> Hooks:
    """A prompt P [m, d] in the model. `of_rows` [b]: which of the prompts, n rows each, a row of the batch has."""
    v, d = table(model).shape
    m, n = P.shape[0], cfg.num_virtual_tokens
    if P.shape[1:] != (d,) or m % cfg.total:
        raise ValueError(f"the prompt must have the shape [{cfg.total}, {d}], found {list(P.shape)}")
    at = np.arange(n if cfg.placement != "template" else 0)
    if of_rows is not None:
        of_rows = np.asarray(of_rows) if isinstance(of_rows, list | tuple) else of_rows
        at = of_rows[:, None] * n + at
        if isinstance(at, np.ndarray) and at.size and (at.min() < 0 or at.max() >= m):
            raise ValueError(f"rows must name one of {m // n} prompts (0 to {m // n - 1}), found {of_rows}")
    elif m > cfg.total:
        raise ValueError(f"this adapter holds {m // n} prompts, so `rows` must say which one each row of a batch has")
    path, given = model.sites["embed.token"].path, unscaled(P, pull, model.config.embed_scale)
    return Hooks(
        part=lambda part: virtual(part, *given) if part.path == path and part.kind == "embedding" else part,
        prompt=Prompt(v + at, m, placed=cfg.placement != "after_embedding"),
    )


def unscaled(P: Array, pull: Pull, α: float) -> tuple[Array, Pull]:
    """P/α, for a model that multiplies what it looks up by α, which is not meant for a prompt (BART; HF peft)."""
    return (P, pull) if α == 1 else (P / α, lambda dP, want: pull(Once(lambda: dP() / α), want))


def virtual(part: Part, P: Array, pull: Pull) -> Part:
    """x = E[ids] where ids < v, P[ids − v] else."""
    v = part.W.shape[1]

    def run(ids: Array) -> tuple[Array, Any]:
        on = ids >= v
        k = np.where(on, ids - v, 0)
        y, back_E = part.run(np.where(on, 0, ids))
        p, _ = embedding(k, as_dtype(P, y))
        on = on[..., None]

        def dP(dx: Array) -> Array:
            w = (k[..., None] == np.arange(P.shape[0])) & on
            d = rows(w.astype(dx.dtype)).T @ rows(dx)
            return d.astype(P.dtype) if is_half(d.dtype) else d

        def back(dx: Lazy, want: Want) -> tuple[Lazy, Grads]:
            none, grads = back_E(Once(lambda: np.where(on, 0, dx())), want)
            return none, join(grads, pull(Once(lambda: dP(dx())), want))

        return np.where(on, p, y), back

    return part.wrapped(run)


# ── what is done with prompts ────────────────────────────────────────────────────────────────────────────────────────


def drop_encoder(adapter: "Adapter") -> "Adapter":
    """The same function without the network that made the prompt or prefix: its output is all that is needed then.

    What is trained after that is the prompt itself. A head that was trained beside stays."""
    method = METHODS[adapter.method]
    if hasattr(method, "flat"):
        found: Adapter = method.flat(adapter)
        return found
    plain = getattr(method, "plain", None)
    if plain is None:
        raise ValueError(f"{adapter.method} has no encoder that could be dropped")
    return adapter.replace(params=plain(adapter.config, adapter.params), masks={})


def ensemble(adapters: Sequence["Adapter"]) -> "Adapter":
    """K prompts in one adapter, P = [P₁; …; P_K] [K n, d]: its `rows` say which one each row of a batch has."""
    plain = [drop_encoder(a) for a in adapters]
    kinds = {(a.config.num_virtual_tokens, a.config.placement) for a in plain}
    if len(kinds) != 1 or any(set(a.params) != {P} or a.config.placement == "template" for a in plain):
        raise ValueError("an ensemble needs prompts of one length and placement, and nothing trained beside them")
    n = plain[0].config.num_virtual_tokens
    cfg = replace(plain[0].config, num_transformer_submodules=1)
    return plain[0].replace(config=cfg, params={P: np.concatenate([a.params[P][:n] for a in plain])})


def ensembled(model: "Model", adapters: Sequence["Adapter"], ids: Array, **inputs: Any) -> tuple[Array, Any]:
    """K prompts in one forward pass of batch K b.      ids [b, s] → out [K, b, …];   vjp(dout) gives K gradients.

    Lester et al. 2021, §6: the example is repeated along the batch, and the prompt varies."""
    K, b = len(adapters), ids.shape[0]
    joint = ensemble(adapters).replace(rows=np.repeat(np.arange(K), b))
    wide = {name: a if a is None or a.shape[0] != b else np.tile(a, (K, 1)) for name, a in inputs.items()}
    out, vjp = model(np.tile(ids, (K, 1)), joint, **wide)

    def back(dout: Array) -> list[dict[str, Array]]:
        dP = vjp(dout.reshape(out.shape))[P].reshape(K, -1, joint.params[P].shape[1])
        rest = [np.zeros_like(a.params[P][dP.shape[1] :]) for a in map(drop_encoder, adapters)]
        return [{P: np.concatenate([d, zero])} for d, zero in zip(dP, rest, strict=True)]

    return out.reshape(K, b, *out.shape[1:]), back


def vote(labels: Array) -> Array:
    """The label that most of K members give; of several such, the smallest.      [K, …] of integers → […]"""
    candidates = np.unique(labels)
    counts = (labels[..., None] == candidates).sum(0)
    return candidates[counts.argmax(-1)]


def nearest(P: Array, E: Array, k: int = 5) -> tuple[Array, Array]:
    """The k words that each row of a prompt is nearest to: ids [m, k] and cosines [m, k], the nearest first.

    cos(p, e) = ⟨p, e⟩/(‖p‖ ‖e‖), 0 where either is 0.      P [m, d], E [v, d];   Lester et al. 2021, §7
    """
    P, E = (a.astype(np.float32) if is_half(a.dtype) else a for a in (P, E))
    size = np.sqrt((P * P).sum(1))[:, None] * np.sqrt(np.einsum("vd,vd->v", E, E))
    cos = P @ E.T / np.where(size == 0, 1, size)
    ids = np.argsort(-cos, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(cos, ids, axis=1)


def own_grads(k: int, params: Mapping[str, Array], want: Want, lazies: Mapping[str, Lazy]) -> Grads:
    """Those that are wanted of the parameters of the k-th adapter."""
    return {(k, name): d for name, d in lazies.items() if name in params and (k, name) in want}
