"""Trainable tokens: some rows of the embedding are trained.      HF peft, TRAINABLE_TOKENS (there is no paper)

    E′[t_j] = R_j,   E′[k] = E[k] for all other k            E [v, d], t [k] = `token_indices`, R [k, d]

R starts as a copy of the rows (its name in files, `trainable_tokens_delta`, notwithstanding).
In the backward pass dR_j = dE′[t_j], summed over all layers that share E; the other rows of E are not touched.

Claims:
    S1  At init the model is unchanged, to the bit (S1 to S4 hold for all such methods: `refpeft.selection`).
    W1  A head that is tied to the embedding uses the same new rows.
    W2  Ids that are not in t are embedded as before, to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.hollow import hollow
from refpeft.hooks import Hooks
from refpeft.method import matches
from refpeft.ops import Array, linear, rows
from refpeft.part import BASE, Back, Grads, Key, Lazy, Once, Part, Want, join, plus

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.model import Model

__all__ = ["FROZEN", "KEYS", "Config", "hooks", "init_model", "merge_model"]

KEYS: Mapping[str, tuple[str | None, str | None]] = {"R": (None, "trainable_tokens_delta")}
FROZEN = ()


@dataclass(frozen=True)
class Config:
    token_indices: Sequence[int] = ()
    target_modules: str | Sequence[str] | None = None  # the input embedding, where nothing is named
    init_weights: bool = True  # R starts from the rows; False: from N(0, 1)

    def __post_init__(self) -> None:
        if not self.token_indices or any(not isinstance(t, int) or t < 0 for t in self.token_indices):
            raise ValueError(f"token_indices must be ids of tokens, at least one, found {self.token_indices!r}")
        if len(set(self.token_indices)) < len(self.token_indices):
            raise ValueError(f"token_indices must name each token once, found {self.token_indices!r}")


def init_model(cfg: Config, model: "Model", chosen: Sequence[str], rng: np.random.Generator) -> Any:
    """R = E[t]"""
    params, _ = outline_model(cfg, model, chosen)
    for role in targets(cfg, model):
        site = model.sites[role]
        E, t = model.params[site.weight], list(cfg.token_indices)
        R = E[t] if cfg.init_weights else rng.normal(size=(len(t), E.shape[1])).astype(E.dtype)
        params[f"{site.path}.trainable_tokens_delta"] = R.copy()
    return params, {}


def outline_model(cfg: Config, model: "Model", chosen: Sequence[str]) -> Any:
    """R [k, d]"""
    params = {}
    for role in targets(cfg, model):
        site = model.sites[role]
        (v, d), t = model.params[site.weight].shape, cfg.token_indices
        if max(t) >= v:
            raise ValueError(f"token_indices holds {max(t)}, but {site.path} has {v} rows")
        params[f"{site.path}.trainable_tokens_delta"] = hollow((len(t), d), model.params[site.weight].dtype)
    return params, {}


def targets(cfg: Config, model: "Model") -> list[str]:
    if cfg.target_modules is None:
        return ["embed.token"]
    found = [r for r, s in model.sites.items() if s.kind == "embedding" and matches(cfg.target_modules, s.path)]
    if not found:
        raise ValueError(f"target_modules {cfg.target_modules!r} matches no embedding of the model")
    return found


def hooks(adapter: "Adapter", k: int, model: "Model") -> Hooks:
    """Every part that uses the tensor of an adapted embedding: the embedding itself, and a head that is tied to it."""
    tables = {tensor: (k, name) for tensor, name in tensors(adapter, model).items()}

    def part(p: Part) -> Part:
        key = tables.get(p.W_key[1]) if p.W_key[0] == BASE else None
        return p if key is None else renewed(p, adapter.params[key[1]], np.array(adapter.config.token_indices), key)

    return Hooks(part=part)


def tensors(adapter: "Adapter", model: "Model") -> dict[str, str]:
    """The model's tensors of which rows are trained → the adapter's names of these rows."""
    weights = {site.path: site.weight for site in model.sites.values()}
    found = {}
    for name, R in adapter.params.items():
        path = name.removesuffix(".trainable_tokens_delta")
        if path not in weights:
            raise ValueError(f"the adapter has parameters for {path}, a module that the model does not have")
        E, t = model.params[weights[path]], adapter.config.token_indices
        if R.shape != (len(t), E.shape[1]) or max(t) >= E.shape[0]:
            raise ValueError(f"the adapter has rows {R.shape} for {path}, which is {E.shape}")
        found[weights[path]] = name
    return found


def renewed(p: Part, R: Array, t: Array, key: Key) -> Part:
    """y = y₀ + onehot(x) (R − E[t]) for an embedding;   y[t] = x Rᵀ + b[t] for a head."""
    return p.wrapped(looked_up(p, R, t, key) if p.kind == "embedding" else multiplied(p, R, t, key))


def looked_up(p: Part, R: Array, t: Array, key: Key) -> Any:
    def run(ids: Array) -> tuple[Array, Back]:
        y, back_y = p.run(ids)
        hit = ids[..., None] == t  # […, k]
        new = hit.max(-1)[..., None]
        z, vjp = linear(hit.astype(y.dtype), R.T.astype(y.dtype))

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, grads = back_y(Once(lambda: np.where(new, 0, dy())), want)
            own: Grads = {key: Once(lambda: vjp(dy())[1]().T)} if key in want else {}  # type: ignore[misc]
            return dx, join(grads, own)

        return np.where(new, z, y), back

    return run


def multiplied(p: Part, R: Array, t: Array, key: Key) -> Any:
    """The rows t of W are R: what the old ones gave is replaced by where(·), a column at a time."""

    def run(x: Array) -> tuple[Array, Back]:
        y, back_y = p.run(x)
        hit = (np.arange(y.shape[-1])[:, None] == t).astype(y.dtype)  # [v, k]
        new = hit.max(-1) > 0
        z = rows(x) @ R.T.astype(x.dtype) @ hit.T
        z = z.reshape(y.shape) if p.b is None else z.reshape(y.shape) + p.b

        def back(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx_y, grads = back_y(Once(lambda: np.where(new, 0, dy())), want)
            dz = Once(lambda: rows(dy()) @ hit)  # [n, k]
            own: Grads = {key: Once(lambda: dz().T @ rows(x))} if key in want else {}
            if p.b is not None and p.b_key in want:
                own = join(own, {p.b_key: Once(lambda: rows(np.where(new, dy(), 0)).sum(0))})
            return plus(dx_y, Once(lambda: (dz() @ R.astype(x.dtype)).reshape(x.shape))), join(grads, own)

        return np.where(new, z, y), back

    return run


def merge_model(adapter: "Adapter", model: "Model") -> "Model":
    """E′ = E with the rows t replaced by R."""
    params = dict(model.params)
    for tensor, name in tensors(adapter, model).items():
        E = params[tensor].copy()
        E[list(adapter.config.token_indices)] = adapter.params[name]
        params[tensor] = E
    return replace(model, params=params)
