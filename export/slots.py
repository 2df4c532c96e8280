"""Slots: the places of a graph where an adapter goes in, as optional inputs that do nothing until they are fed.

    method                        input                     [shape]         what is fed          if it is not fed
    lora, rslora, dora            <module>.lora_A           [r, i]          A, or [A; A₀]        rank 0
                                  <module>.lora_sB          [o, r]          s B, or s [B, −B₀]   rank 0
      with lora_bias              <module>.lora_sbias       [o]             s β                  0
      dora                        <module>.lora_gain        [o]             g = m/‖W + s B A‖    1
    ia3                           <module>.ia3_l            [o, 1], [1, i]  l                    1
    vera                          <module>.vera_lambda_b    [o]             λb                   0
                                  <module>.vera_lambda_d    [r]             λd                   0
    loha                          <module>.hada_sw1_a       [o, r]          s B₁                 rank 0
                                  <module>.hada_w1_b, …     [r, i], …       A₁, B₂, A₂           rank 0
    lokr                          <module>.lokr_sw1(_a)     [l, m]          s C, or s C_b        zeros
                                  <module>.lokr_w2, …       [k, n], …       D, or B, A; C_a      zeros
    oft                           <module>.oft_R.rotation   [n, p, p]       R                    I
    boft                          <module>.boft_R.rotation  [m, n, p, p]    R                    I
                                  <module>.boft_s           [o, 1]          s                    1
    prompt_tuning, p_tuning       prompt_embeddings         [n, d]          P                    no rows
    prefix_tuning, p_tuning_v2    prompt_embeddings         [n, 2 L t]      P                    no rows
    all that replace the model's  <tensor>                  as it is        φ                    the model's own
    own tensors, trained heads    <module>.trainable_tokens_delta  [k, d]   R                    the model's own

Not fed, the graph is the base model. Scale, rank and patterns are in what is fed, hence may differ from adapter to
adapter; the names say that B is not the B of a checkpoint. Of DoRA the gain is fed, not the magnitude: it is the one
thing that the norm of W + s B A is needed for, which would be computed again in every run. y = b + g ⊙ (W x + s B A x).

Of (IA)³ the shape of l says which side of a layer it scales, and an adapter that scales the other is refused. VeRA's
random matrices lie in the graph, and an adapter that has others is refused too.

What is own to a graph, and must be the same in every adapter for it, is its facts.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, each, substitutes, wrapped
from refpeft.checkpoint.adapters import tensor_of
from refpeft.export.form import Array, own, prefixes, trained
from refpeft.hooks import Hooks, Prompt, compose
from refpeft.method import Phi, Values, as_dtype, branch
from refpeft.methods import METHODS, dora, lora, trainable_tokens
from refpeft.model import Model
from refpeft.part import Back, Grads, Lazy, Part, Run, Want
from refpeft.prompts import P, table, virtual

LORA = ("lora", "rslora", "dora")
PRODUCTS = ("loha", "lokr", "oft", "boft")
ROTATIONS = ("oft", "boft")
SCALED = {"B1": "hada_sw1_a", "C": "lokr_sw1", "Cb": "lokr_sw1_a"}  # what is fed with the scale in it
PROMPTS = ("prompt_tuning", "p_tuning")
PREFIXES = ("prefix_tuning", "p_tuning_v2")
VECTORS = {"ia3": 1, "vera": 0}  # what is fed is what the method has, and this where it does nothing
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
    found = [{n: getattr(a.config, n) for n in FACTS if hasattr(a.config, n)} | projection(a) for a in adapters]
    return [{n: list(v) if isinstance(v, tuple) else v for n, v in f.items()} for f in found]


def projection(adapter: Adapter) -> dict[str, Any]:
    """A digest of VeRA's A∗ and B∗, which lie in the graph."""
    values = kept([adapter]).values()
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(v, "<f4").tobytes() for v in values)).hexdigest()
    return {"projection": digest[:16]} if values else {}


def kept(adapters: Sequence[Adapter]) -> dict[str, Array]:
    """What all adapters for a graph must have in common: the projections of VeRA, by their names in a graph."""
    return {
        at + n: np.asarray(v, np.float32)
        for adapter, at in zip(adapters, prefixes(adapters), strict=True)
        for n, v in (adapter.frozen.items() if adapter.method in VECTORS else ())
    }


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
    elif adapter.method in VECTORS:
        for n in sorted(adapter.params.keys() - whole.keys()):
            l = np.asarray(adapter.params[n], np.float32)  # noqa: E741
            found[n] = Slot(l.shape, l, np.full_like(l, VECTORS[adapter.method]), own=True)
    elif adapter.method in PROMPTS + PREFIXES:
        n = adapter.config.num_virtual_tokens
        rows = adapter.params[P][:n]
        found[P] = Slot(("virtual_tokens", rows.shape[1]), rows, rows[:0], own=True)
    elif adapter.method in PRODUCTS:
        found |= products(adapter)
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
            part, cfg = model.part(parts[path]), adapter.at(path)
            fed = scaled(cfg, {n: adapter.value(full) for n, full in names.items()}, part, dtype)
            i, o = fed["A"].shape[1], fed["B"].shape[0]
            rank = f"rank of {path}"
            shapes = {"A": (rank, i), "B": (o, rank), "β": (o,), "g": (o,)}
            nothing = {"A": fed["A"][:0], "B": fed["B"][:, :0], "β": np.zeros(o), "g": np.ones(o)}
            for n, a in fed.items():
                found[f"{path}.{INPUT[n]}"] = Slot(shapes[n], a, nothing[n].astype(a.dtype), own=True)
    return found


def products(adapter: Adapter) -> dict[str, Slot]:
    found: dict[str, Slot] = {}
    for path, (names, _) in adapter.by_module.items():
        cfg, φ = adapter.at(path), {n: adapter.value(full).astype(np.float64) for n, full in names.items()}
        s = 1.0 if adapter.method in ROTATIONS else cfg.scale if adapter.method == "loha" else cfg.scale(φ)
        for n, full in names.items():
            a = (s * φ[n] if n in SCALED else φ[n]).astype(np.float32)
            found[input_of(path, n, full)] = Slot(*unfed(adapter.method, path, n, a), own=True)
    return found


def unfed(method: str, path: str, n: str, a: Array) -> tuple[Sequence[int | str], Array, Array]:
    """The sizes of an input, what is fed, and what does nothing."""
    if method == "loha":
        rank = f"rank of {path}"
        return ((a.shape[0], rank), a, a[:, :0]) if n in ("B1", "B2") else ((rank, a.shape[1]), a, a[:0])
    nothing = np.zeros_like(a)
    neutral = 1 if n == "s" else np.eye(a.shape[-1], dtype=a.dtype) if method in ROTATIONS else 0
    return a.shape, a, nothing + neutral


def input_of(path: str, name: str, full: str) -> str:
    """The input of a parameter: its name in checkpoints, or another where the scale is in it."""
    return f"{path}.{SCALED[name]}" if name in SCALED else full


def scaled(cfg: lora.Config, φ: Values, part: Part, dtype: Any) -> dict[str, Array]:
    """A, s B, s β and g, in float64 until the end."""
    wide = {n: a.astype(np.float64) for n, a in φ.items()}
    A, B, s = wide["A"], wide["B"], cfg.scale
    if "A0" in wide:
        A, B = np.concatenate([A, wide["A0"]]), np.concatenate([B, -wide["B0"]], axis=1)
    fed = {"A": A, "B": s * B}
    if "β" in wide:
        fed["β"] = s * wide["β"]
    if isinstance(cfg, dora.Config):
        V = part.W.astype(dtype).astype(np.float64) + fed["B"] @ A
        fed["g"] = wide["m"] / dora.norm(cfg, V)
    return {n: np.ascontiguousarray(a, np.float32) for n, a in fed.items()}


# ── how a graph reads them ───────────────────────────────────────────────────────────────────────────────────────────


def hooks(adapters: Sequence[Adapter], values: Mapping[str, Any], model: Model) -> Hooks:
    """The specification's own, with what is fed in place of the parameters; what replaces tensors comes first."""
    whole: list[Adapter] = []
    then: list[Hooks] = []
    for adapter, at in zip(map(trained, adapters), prefixes(adapters), strict=True):
        fed = {name.removeprefix(at): x for name, x in values.items() if name.startswith(at)}
        still = {n: fed[n] for n in adapter.frozen if n in fed}
        named = adapter.replace(params={n: fed[n] for n in adapter.params if n in fed}, frozen=still)
        others = {n: x for n, x in named.params.items() if not own(adapter, n)}
        whole.append(named.replace(params=others, frozen={}))
        if adapter.method in PROMPTS:
            then.append(prompt(adapter, fed[P], model))
        elif adapter.method in LORA:
            then.append(Hooks(part=layers(adapter, fed)))
        elif adapter.method in PRODUCTS:
            then.append(Hooks(part=product(adapter, fed)))
        elif adapter.method in PREFIXES:
            then.append(each([named.replace(params={P: fed[P]})], model))
        elif adapter.method in VECTORS:
            then.append(each([named.replace(params={n: x for n, x in named.params.items() if own(adapter, n)})], model))
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


def product(adapter: Adapter, fed: Mapping[str, Any]) -> Callable[[Part], Part]:
    """LoHa, LoKr, OFT or BOFT on the layers that have slots; of the former two with s = 1."""
    m, cfg = METHODS[adapter.method], adapter.config
    cfg = cfg if adapter.method in ROTATIONS else replace(cfg, r=1, alpha=1, rank_pattern={}, alpha_pattern={})

    def part(p: Part) -> Part:
        names, _ = adapter.by_module.get(p.path, ({}, {}))
        φ = {n: fed[input_of(p.path, n, full)] for n, full in names.items()}
        return m.wrap(cfg, Phi(φ, {}), p) if φ else p

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
