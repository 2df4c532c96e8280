"""Slots: the places of a graph where an adapter goes in, as optional inputs that do nothing until they are fed.

    method                        input                     [shape]         what is fed          if it is not fed
    lora, rslora, dora            <module>.lora_A           [r, i]          A, or [A; A₀]        rank 0
                                  <module>.lora_sB          [o, r]          s B, or s [B, −B₀]   rank 0
    adalora                       likewise                  A = Λ Q, B = P
      with lora_bias              <module>.lora_sbias       [o]             s β                  0
      dora                        <module>.lora_gain        [o]             g = m/‖W + s B A‖    1
    ia3                           <module>.ia3_l            [o, 1], [1, i]  l                    1
    vera                          <module>.vera_lambda_b    [o]             λb                   0
                                  <module>.vera_lambda_d    [r]             λd                   0
    did, said                     did.theta                 [d]             θ                    0
                                  said.theta, said.lambda   [d − m], [m]    θ, λ                 0
    loha                          <module>.hada_sw1_a       [o, r]          s B₁                 rank 0
                                  <module>.hada_w1_b, …     [r, i], …       A₁, B₂, A₂           rank 0
      with cores                  <module>.hada_t1, …       [r, r, k], …    T₁, T₂               rank 0
    lokr                          <module>.lokr_sw1(_a)     [l, m]          s C, or s C_b        zeros
                                  <module>.lokr_w2, …       [k, n], …       D, or B, A; C_a      zeros
    glora                         <module>.glora_sa1, _sb1  [i, r], [o, r]  s A_u, s B_u         rank 0
                                  <module>.a2.weight, b2  [r, i]          A_d, B_d             rank 0
    oft                           <module>.oft_R.rotation   [n, p, p]       R                    I
    boft                          <module>.boft_R.rotation  [m, n, p, p]    R                    I
      (side="output")             <module>.boft_out_R.rotation              R                    I
                                  <module>.boft_s           [o, 1]          s                    1
    houlsby, pfeiffer, parallel   <module>.adapter_down     [m, d]          D                    rank 0
                                  <module>.adapter_s_up     [d, m]          s U                  rank 0
                                  … and each with _bias     [m], [d]        b_D, s b_U           0
      with gate and norms         <module>.adapter_gate     [1, d] …        w, c; γ, β           0; 1, 0
    prompt_tuning, p_tuning       prompt_embeddings         [n, d]          P                    no rows
    prefix_tuning, p_tuning_v2    prompt_embeddings         [n, 2 L t]      P                    no rows
      of an encoder-decoder       … and encoder.…, cross.…                  of all its attentions
    all that replace the model's  <tensor>                  as it is        φ                    the model's own
    own tensors, trained heads    <module>.trainable_tokens_delta  [k, d]   R                    the model's own

Not fed, the graph is the base model. Scale, rank and patterns are in what is fed, hence may differ from adapter to
adapter; the names say that B is not the B of a checkpoint. Of DoRA the gain is fed, not the magnitude: it is the one
thing that the norm of W + s B A is needed for, which would be computed again in every run. y = b + g ⊙ (W x + s B A x).
A bottleneck adapter of rank 0 gives 0; where the sublayer is not the model's own then, there are no slots for it.

Of (IA)³ the shape of l says which side of a layer it scales, and an adapter that scales the other is refused. VeRA's
random matrices lie in the graph, as the factors of DID's and SAID's projections do, and an adapter that has others is
refused too.

What is own to a graph, and must be the same in every adapter for it, is its facts.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refpeft import bottleneck
from refpeft.adapter import Adapter, each, substitutes, wrapped
from refpeft.checkpoint.wrapper import tensor_of
from refpeft.export.form import Array, own, prefixes, trained
from refpeft.hooks import Block, Hooks, Prompt, compose
from refpeft.method import Phi, Values, as_dtype, branch
from refpeft.methods import METHODS, dora, dylora, lora, trainable_tokens
from refpeft.model import Model
from refpeft.part import Back, Grads, Lazy, Part, Run, Want
from refpeft.prompts import P, table, virtual

LORA = ("lora", "rslora", "dora", "adalora", "dylora")
PRODUCTS = ("loha", "lokr", "glora", "oft", "boft")
ROTATIONS = ("oft", "boft")
SCALED = {  # what is fed with the scale in it
    "B1": "hada_sw1_a", "C": "lokr_sw1", "Cb": "lokr_sw1_a", "Au": "glora_sa1", "Bu": "glora_sb1",
}  # fmt: skip
PROMPTS = ("prompt_tuning", "p_tuning")
PREFIXES = ("prefix_tuning", "p_tuning_v2")
VECTORS = {"ia3": 1, "vera": 0, "did": 0, "said": 0}  # what is fed is what it has, and this where it does nothing
INPUT = {"A": "lora_A", "B": "lora_sB", "β": "lora_sbias", "g": "lora_gain"}
NECKS = ("houlsby", "pfeiffer", "parallel")
NECK = {
    "D": "adapter_down", "b_D": "adapter_down_bias", "U": "adapter_s_up", "b_U": "adapter_s_up_bias",
    "w": "adapter_gate", "c": "adapter_gate_bias", "γ1": "adapter_norm_before", "β1": "adapter_norm_before_bias",
    "γ2": "adapter_norm_after", "β2": "adapter_norm_after_bias",
}  # fmt: skip
ORDER = (  # of what happens in a sublayer with a bottleneck adapter
    "non_linearity", "is_parallel", "normed_input", "original_ln_before", "original_ln_after", "ln_before", "ln_after",
    "residual_before_ln", "adapter_residual_before_ln", "use_gating",
)  # fmt: skip
FACTS = ("token_indices", "placement", "position_shift", "leave_out", *ORDER)
UNIT = lora.Config(r=1, lora_alpha=1)  # s = 1: the scale is in what is fed


@dataclass(frozen=True)
class Slot:
    """One input: its sizes (a str: any), what an adapter feeds, and what does nothing."""

    shape: Sequence[int | str]
    value: Array
    neutral: Array
    own: bool  # the method's, and no tensor of the model


def facts(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """A bottleneck adapter may leave out other layers than another: they are rank 0 there."""
    found = [{n: getattr(a.config, n) for n in FACTS if hasattr(a.config, n)} | projection(a) for a in adapters]
    found = [
        {n: v for n, v in f.items() if n != "leave_out" or a.method not in NECKS}
        for a, f in zip(adapters, found, strict=True)
    ]
    return [{n: list(v) if isinstance(v, tuple) else v for n, v in f.items()} for f in found]


def projection(adapter: Adapter) -> dict[str, Any]:
    """A digest of VeRA's A∗ and B∗, or of DID's and SAID's B, Π and G, which lie in the graph."""
    values = [v for _, v in sorted(kept([adapter]).items())]
    digest = hashlib.sha256(b"".join(v.astype(v.dtype.newbyteorder("<")).tobytes() for v in values)).hexdigest()
    return {"projection": digest[:16]} if values else {}


def kept(adapters: Sequence[Adapter]) -> dict[str, Array]:
    """What all adapters for a graph must have in common: the projections of VeRA, DID and SAID, by their names in a
    graph."""
    return {
        at + n: v if v.dtype.kind in "iub" else np.asarray(v, np.float32)
        for adapter, at in zip(adapters, prefixes(adapters), strict=True)
        for n, v in (adapter.frozen.items() if adapter.method in VECTORS else ())
    }


def slots(adapters: Sequence[Adapter], model: Model, dtype: Any) -> dict[str, Slot]:
    """All inputs of these adapters by name, for a graph of the model in this dtype."""
    found: dict[str, Slot] = {}
    for adapter, at in zip(map(trained, adapters), prefixes(adapters), strict=True):
        found |= {at + name: told_apart(slot, at) for name, slot in of_one(adapter, model, dtype).items()}
    return found


def told_apart(slot: Slot, at: str) -> Slot:
    """With names for its sizes that no other adapter's have, which may be of another rank or length."""
    return replace(slot, shape=[n if isinstance(n, int) else at.removeprefix("adapter.") + n for n in slot.shape])


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
        for name in (n for n in adapter.params if own(adapter, n)):
            rows = adapter.params[name][: adapter.config.num_virtual_tokens]
            found[name] = Slot(("virtual_tokens", rows.shape[1]), rows, rows[:0], own=True)
    elif adapter.method in NECKS:
        found |= necks(adapter, model)
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
            role, cfg = parts[path], adapter.at(path)
            fed = scaled(cfg, {n: adapter.value(full) for n, full in names.items()}, model, role, dtype)
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
        s = 1.0 if adapter.method in ROTATIONS else cfg.scale(φ) if adapter.method == "lokr" else cfg.scale
        for n, full in names.items():
            a = (s * φ[n] if n in SCALED else φ[n]).astype(np.float32)
            found[input_of(path, n, full)] = Slot(*unfed(adapter.method, path, n, a, "T1" in φ), own=True)
    return found


def unfed(method: str, path: str, n: str, a: Array, cores: bool) -> tuple[Sequence[int | str], Array, Array]:
    """The sizes of an input, what is fed, and what does nothing. LoHa with cores has its B the other way round."""
    if method in ("loha", "glora"):
        rank, tall = f"rank of {path}", n in ("B1", "B2", "Au", "Bu") and not cores
        ranks = (0, 1) if n[0] == "T" else (1,) if tall else (0,)
        sizes = [rank if axis in ranks else k for axis, k in enumerate(a.shape)]
        return sizes, a, np.zeros([0 if k == rank else k for k in sizes], a.dtype)
    nothing = np.zeros_like(a)
    neutral = 1 if n == "s" else np.eye(a.shape[-1], dtype=a.dtype) if method in ROTATIONS else 0
    return a.shape, a, nothing + neutral


def input_of(path: str, name: str, full: str) -> str:
    """The input of a parameter: its name in checkpoints, or another where the scale is in it."""
    return f"{path}.{SCALED[name]}" if name in SCALED else full


def scaled(cfg: Any, φ: Values, model: Model, role: str, dtype: Any) -> dict[str, Array]:
    """A, s B, s β and g, in float64 until the end."""
    wide = {n: a.astype(np.float64) for n, a in φ.items()}
    if "Λ" in wide:
        wide |= {"A": wide["Λ"] * wide["Q"], "B": wide["P"]}
    if isinstance(cfg, dylora.Config):
        wide |= dylora.nested(cfg, wide)
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


def necks(adapter: Adapter, model: Model) -> dict[str, Slot]:
    """A bottleneck adapter's: with s in U and b_U, whether it is a number or trained."""
    cfg = adapter.config
    kept = cfg.original_ln_after and (cfg.is_parallel or not cfg.original_ln_before or cfg.residual_before_ln is True)
    if not kept or (cfg.ln_after and cfg.adapter_residual_before_ln and not cfg.is_parallel):
        raise NotImplementedError("with nothing fed, its norms and residuals would not leave the model as it is")
    found: dict[str, Slot] = {}
    for place in bottleneck.places(cfg, model):
        φ = bottleneck.parameters(adapter, 0, place, model).values
        wide = {n: a.astype(np.float64) for n, a in φ.items()}
        s = wide.pop("s", np.float64(1 if isinstance(cfg.scaling, str) else cfg.scaling))
        wide |= {"U": (wide["U"].T * s).T, "b_U": wide["b_U"] * s}
        rank = f"rank of {place.module}"
        for n, a in wide.items():
            shape = tuple(
                rank if (n, axis) in {("D", 0), ("b_D", 0), ("U", 1)} else k for axis, k in enumerate(a.shape)
            )
            nothing = np.full(
                [k if isinstance(k, int) else 0 for k in shape], 1 if n in ("γ1", "γ2") else 0, np.float32
            )
            found[f"{place.module}.{NECK[n]}"] = Slot(shape, np.ascontiguousarray(a, np.float32), nothing, own=True)
    return found


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
        elif adapter.method in NECKS:
            then.append(Hooks(block=sublayers(adapter, fed, model)))
        elif adapter.method in PRODUCTS:
            then.append(Hooks(part=product(adapter, fed)))
        elif adapter.method in PREFIXES:
            then.append(each([named.replace(params={n: fed[n] for n in fed if own(adapter, n)})], model))
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


def sublayers(adapter: Adapter, fed: Mapping[str, Any], model: Model) -> Callable[[Block], Block]:
    """The sublayers with their bottleneck adapters, s = 1: it is in what is fed."""
    cfg, at = replace(adapter.config, scaling=1.0), {p.at: p for p in bottleneck.places(adapter.config, model)}

    def block(b: Block) -> Block:
        if b.at not in at:
            return b
        names = {n: f"{at[b.at].module}.{key}" for n, key in NECK.items()}
        return bottleneck.adapted(cfg, Phi({n: fed[name] for n, name in names.items() if name in fed}, {}), b)

    return block


def product(adapter: Adapter, fed: Mapping[str, Any]) -> Callable[[Part], Part]:
    """LoHa, LoKr, GLoRA, OFT or BOFT on the layers that have slots; of the former three with s = 1."""
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
