"""Slots: the places of a graph where an adapter goes in, as optional inputs that do nothing until they are fed.

    method                        input                     [shape]         what is fed          if it is not fed
    lora, rslora, dora            <module>.lora_A           [r, i]          A, or [A; A₀]        rank 0
                                  <module>.lora_sB          [o, r]          s B, or s [B, −B₀]   rank 0
      with lora_bias              <module>.lora_sbias       [o]             s β                  0
      dora                        <module>.lora_gain        [o]             g = m/‖W + s B A‖    1
    prompt_tuning, p_tuning       prompt_embeddings         [n, d]          P                    no rows
    prefix_tuning, p_tuning_v2    prompt_embeddings         [n, 2 L t]      P                    no rows
    all that replace the model's  <tensor>                  as it is        φ                    the model's own
    own tensors, trained heads    <module>.trainable_tokens_delta  [k, d]   R                    the model's own

Not fed, the graph is the base model. Scale, rank and patterns are in what is fed, hence may differ from adapter to
adapter; the names say that B is not the B of a checkpoint. Of DoRA the gain is fed, not the magnitude: it is the one
thing that the norm of W + s B A is needed for, which would be computed again in every run. y = b + g ⊙ (W x + s B A x).

What is own to a graph, and must be the same in every adapter for it, is its facts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, each, substitutes, wrapped
from refpeft.checkpoint.adapters import tensor_of
from refpeft.export.form import Array, own, prefixes, trained
from refpeft.hooks import Hooks, Prompt, compose
from refpeft.method import Phi, Values, as_dtype, branch
from refpeft.methods import dora, lora, trainable_tokens
from refpeft.model import Model
from refpeft.part import Back, Grads, Lazy, Part, Run, Want
from refpeft.prompts import P, table, virtual

LORA = ("lora", "rslora", "dora")
PROMPTS = ("prompt_tuning", "p_tuning")
PREFIXES = ("prefix_tuning", "p_tuning_v2")
INPUT = {"A": "lora_A", "B": "lora_sB", "β": "lora_sbias", "g": "lora_gain"}
FACTS = ("token_indices", "placement", "position_shift", "leave_out")
UNIT = lora.Config(r=1, lora_alpha=1)  # s = 1: the scale is in what is fed


@dataclass(frozen=True)
class Slot:
    """One input: its sizes (a str: any), what an adapter feeds, and what does nothing."""

    shape: Sequence[int | str]
    value: Array
    neutral: Array
    own: bool  # the method's, and no tensor of the model


def facts(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    found = [{n: getattr(a.config, n) for n in FACTS if hasattr(a.config, n)} for a in adapters]
    return [{n: list(v) if isinstance(v, tuple) else v for n, v in f.items()} for f in found]


def slots(adapters: Sequence[Adapter], model: Model, dtype: Any) -> dict[str, Slot]:
    """All inputs of these adapters by name, for a graph of the model in this dtype."""
    found: dict[str, Slot] = {}
    for adapter, at in zip(map(trained, adapters), prefixes(adapters), strict=True):
        found |= {at + name: slot for name, slot in of_one(adapter, model, dtype).items()}
    return found


def of_one(adapter: Adapter, model: Model, dtype: Any) -> dict[str, Slot]:
    whole = {n: a for n, a in adapter.params.items() if not own(adapter, n)}
    found = {n: Slot(a.shape, a, original(adapter, n, model), own=False) for n, a in whole.items()}
    if adapter.method in LORA:
        found |= low_rank(adapter, model, dtype)
    elif adapter.method in PROMPTS + PREFIXES:
        n = adapter.config.num_virtual_tokens
        rows = adapter.params[P][:n]
        found[P] = Slot(("virtual_tokens", rows.shape[1]), rows, rows[:0], own=True)
    elif not substitutes(adapter):
        raise NotImplementedError(f"{adapter.method} has no slots: its parameters are not what a layer runs with")
    return found


def original(adapter: Adapter, name: str, model: Model) -> Array:
    """What the model itself has in the place of an adapter's tensor."""
    if adapter.method == "trainable_tokens":
        tables = {own: tensor for tensor, own in trainable_tokens.tensors(adapter, model).items()}
        return np.asarray(model.params[tables[name]][list(adapter.config.token_indices)])
    return np.asarray(model.params[tensor_of(model, name) or name])


def low_rank(adapter: Adapter, model: Model, dtype: Any) -> dict[str, Slot]:
    found: dict[str, Slot] = {}
    parts = {site.path: role for role, site in model.sites.items()}
    for path, (names, _) in adapter.by_module.items():
        if names:
            role, cfg = parts[path], adapter.at(path)
            fed = scaled(cfg, {n: adapter.value(full) for n, full in names.items()}, model, role, dtype)
            i, o = fed["A"].shape[1], fed["B"].shape[0]
            rank = f"rank of {path}"
            shapes = {"A": (rank, i), "B": (o, rank), "β": (o,), "g": (o,)}
            nothing = {"A": fed["A"][:0], "B": fed["B"][:, :0], "β": np.zeros(o), "g": np.ones(o)}
            for n, a in fed.items():
                found[f"{path}.{INPUT[n]}"] = Slot(shapes[n], a, nothing[n].astype(a.dtype), own=True)
    return found


def scaled(cfg: lora.Config, φ: Values, model: Model, role: str, dtype: Any) -> dict[str, Array]:
    """A, s B, s β and g, in float64 until the end."""
    wide = {n: a.astype(np.float64) for n, a in φ.items()}
    A, B, s = wide["A"], wide["B"], cfg.scale
    if "A0" in wide:
        A, B = np.concatenate([A, wide["A0"]]), np.concatenate([B, -wide["B0"]], axis=1)
    fed = {"A": A, "B": s * B}
    if "β" in wide:
        fed["β"] = s * wide["β"]
    if isinstance(cfg, dora.Config):
        V = model.part(role).W.astype(dtype).astype(np.float64) + fed["B"] @ A
        fed["g"] = wide["m"] / dora.norm(cfg, V)
    return {n: np.ascontiguousarray(a, np.float32) for n, a in fed.items()}


# ── how a graph reads them ───────────────────────────────────────────────────────────────────────────────────────────


def hooks(adapters: Sequence[Adapter], values: Mapping[str, Any], model: Model) -> Hooks:
    """The specification's own, with what is fed in place of the parameters; what replaces tensors comes first."""
    whole: list[Adapter] = []
    then: list[Hooks] = []
    for adapter, at in zip(map(trained, adapters), prefixes(adapters), strict=True):
        fed = {name.removeprefix(at): x for name, x in values.items() if name.startswith(at)}
        named = adapter.replace(params={n: fed[n] for n in adapter.params if n in fed}, frozen={})
        whole.append(named.replace(params={n: x for n, x in named.params.items() if not own(adapter, n)}))
        if adapter.method in PROMPTS:
            then.append(prompt(adapter, fed[P], model))
        elif adapter.method in LORA:
            then.append(Hooks(part=layers(adapter, fed)))
        elif adapter.method in PREFIXES:
            then.append(each([named.replace(params={P: fed[P]})], model))
    first = [each([a], model) for a in whole if substitutes(a)]
    return compose([*first, Hooks(part=wrapped(whole)), *then])


def layers(adapter: Adapter, fed: Mapping[str, Any]) -> Callable[[Part], Part]:
    """LoRA or DoRA on the layers that have slots."""

    def part(p: Part) -> Part:
        names, _ = adapter.by_module.get(p.path, ({}, {}))
        if not names:
            return p
        φ = {n: fed[f"{p.path}.{key}"] for n, key in INPUT.items() if f"{p.path}.{key}" in fed}
        δ = lora.low_rank(UNIT, Phi(φ, {}), p)
        return dora.biased(p, gained(φ["g"], dora.unbiased(p), δ)) if "g" in φ else branch(p, δ)

    return part


def gained(g: Any, f: Run, δ: Run) -> Run:
    """y = g ⊙ (f(x) + δ(x)), to be run only."""

    def run(x: Any) -> tuple[Any, Back]:
        (h, _), (z, _) = f(x), δ(x)
        return as_dtype(g * (h + z), h), untrained

    return run


def untrained(dy: Lazy, want: Want) -> tuple[Lazy, Grads]:
    raise NotImplementedError("a graph that takes its adapter as inputs has no backward pass")


def prompt(adapter: Adapter, rows: Any, model: Model) -> Hooks:
    """P [n, d] for any n, 0 too: a row of zeros behind it is what no id asks for."""
    v, d = table(model).shape
    wide = np.concatenate([rows, np.zeros((1, d), np.float32)])
    path, n = model.sites["embed.token"].path, rows.shape[0]
    at = np.arange(n if adapter.config.placement != "template" else 0, like=rows)
    return Hooks(
        part=lambda p: virtual(p, wide, lambda dP, want: {}) if p.path == path and p.kind == "embedding" else p,
        prompt=Prompt(v + at, n + 1, placed=adapter.config.placement != "after_embedding"),
    )
