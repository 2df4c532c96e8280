"""Does a merged checkpoint, whoever made it, hold what base and adapters say? Tensor by tensor.

The merged model of the specification streams by (`refpeft.stream`), in float64 where an adapter changes something, and
each of its tensors is held against the one that the file has: `compare` says whether rounding explains the difference,
`diagnosis` what does if not, `names` which tensor of the file it is.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refpeft.adapter import Adapter, substitutes
from refpeft.checkpoint.families import Plan, plan
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.conformance.audit import names
from refpeft.conformance.audit.compare import is_float
from refpeft.conformance.audit.constants import Constants, constants
from refpeft.conformance.audit.diagnosis import RIGHT_ONES, VERDICTS, Expected, Finding, judge
from refpeft.methods import METHODS
from refpeft.model import Model, Site
from refpeft.part import stored
from refpeft.stream import in_float32, merged_by_role
from refpeft.tune import mergeable, merged_part, substituted

__all__ = ["RIGHT_ONES", "VERDICTS", "Expected", "Finding", "Found", "audit", "judge"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Found:
    """What is to be audited: tensors by their names in the file, mapped, and the config.json beside them."""

    tensors: Mapping[str, Array]
    config: Mapping[str, Any] | None = None
    graph: bool = False  # an ONNX graph: names may be the exporter's, and constants may be among the tensors


@dataclass(frozen=True)
class Subject:
    """The model, its adapters in float64, and the tensors of the file by the model's names."""

    model: Model
    placed: Model  # with the tensors in place that adapters substitute for its own
    adapters: Sequence[Adapter]
    labels: Sequence[str]
    plan: Plan
    named: dict[str, Array]
    originals: Mapping[str, str]
    ties: Mapping[str, str]  # those of the audited config.json
    graph: bool
    seen: set[str] = field(default_factory=set)


def audit(model: Model, adapters: Sequence[Adapter], labels: Sequence[str], found: Found) -> Iterator[Finding]:
    """A finding for every tensor of the merged model, then for what else is, or is not, in the file.

    `labels`: what to call the adapters."""
    mergeable(adapters)
    p = plan(model.source)
    adapters = [in_float64(a) for a in model.fitting(adapters)]
    yield from settings(p, found.config)
    named, originals = matched(model, adapters, p, found)
    placed, _ = substituted(model, adapters)
    s = Subject(model, placed, adapters, labels, p, named, originals, ties(p, found.config), found.graph)
    sites = dict(model.sites)
    for name, want, role in merged_by_role(model, adapters, sites):
        own = {n for site in sites.values() for n in (site.weight, site.bias)}
        yield from at_its_name(s, expected(s, sites, name, want, role), own)
    yield from tied(s, found)
    if not found.graph:
        yield from extra(s)


def in_float64(a: Adapter) -> Adapter:
    """So that what is computed with it is exact enough to judge by; tensors that it carries whole stay as they are."""
    whole = {full for _, tensors in a.by_module.values() for full in tensors.values()}

    def wide(values: Mapping[str, Array]) -> dict[str, Array]:
        return {n: v.astype(np.float64) if is_float(v.dtype) and n not in whole else v for n, v in values.items()}

    return a.replace(params=wide(a.params), frozen=wide(a.frozen), masks={})


# ── what the tensor should be, and what it might be ──────────────────────────────────────────────────────────────────


def expected(s: Subject, sites: Mapping[str, Site], name: str, want: Array, role: str | None) -> Expected:
    if role is None:
        return unfolded(s, name, want)
    site, path = s.model.sites[role], s.model.sites[role].path
    weight = name == sites[role].weight
    base = s.model.params[site.weight] if weight else s.model.params.get(site.bias, np.zeros_like(want))
    own = [n for n, a in enumerate(s.adapters) if path in a.by_module and not substitutes(a)]

    def made(adapters: Sequence[Adapter]) -> Array:
        part = in_float32(s.placed.part(role))
        W, b = merged_part(adapters, part)
        value: Array | None = stored(part.kind, W) if weight else b
        return base if value is None else value

    def alone() -> list[Array]:
        return [made([s.adapters[n]]) - base.astype(np.float64) for n in own]

    def mistakes() -> Iterator[tuple[str, Array]]:
        for words, adapters in variants([s.adapters[n] for n in own], [s.labels[n] for n in own], path):
            yield words, made(adapters)

    known = [known_of(s.adapters[n], path) for n in own]
    return Expected(name, want, base, [s.labels[n] for n in own], known, len(s.adapters) == 1, alone, mistakes)


def unfolded(s: Subject, name: str, want: Array) -> Expected:
    """A tensor that is the model's own, or that an adapter substitutes for it."""
    base = s.model.params.get(name, want)
    if base is want or base.shape != want.shape:
        return Expected(name, want, want)
    by = [label for a, label in zip(s.adapters, s.labels, strict=True) if substitutes(a)]
    known: Constants = {"left out": 0.0, "applied twice": 2.0}
    alone = [want.astype(np.float64) - base]
    return Expected(name, want, base, by[-1:], [known], len(s.adapters) == 1, lambda: alone)


def known_of(a: Adapter, path: str) -> Constants:
    return constants(a.config, a.at(path))


def variants(adapters: Sequence[Adapter], labels: Sequence[str], path: str) -> Iterator[tuple[str, Sequence[Adapter]]]:
    """The mistakes that do not just scale ΔW, for methods that are no sum: each as the adapters that it makes."""
    if all(a.method in ("lora", "rslora") for a in adapters):
        return
    for n, (a, label) in enumerate(zip(adapters, labels, strict=True)):
        where = f"{label}: " if len(adapters) > 1 else ""
        for words, altered in altered_ways(a, path):
            yield where + words, [*adapters[:n], altered, *adapters[n + 1 :]]
        if len(adapters) > 1:
            yield f"{label} left out", [*adapters[:n], *adapters[n + 1 :]]
    if len(adapters) > 1:
        yield "the adapters applied in reverse order", adapters[::-1]


def altered_ways(a: Adapter, path: str) -> Iterator[tuple[str, Adapter]]:
    if hasattr(a.config, "alpha_pattern"):
        for words, k in known_of(a, path).items():
            config = replace(a.config, lora_alpha=k * a.at(path).lora_alpha, alpha_pattern={})
            yield (words if k else "B A left out, the magnitude m applied"), a.replace(config=config)
    if a.method == "dora":
        kept = {n: v for n, v in a.params.items() if not n.endswith(".lora_magnitude_vector")}
        fields = METHODS["lora"].Config.__dataclass_fields__
        config = METHODS["lora"].Config(**{f: getattr(a.config, f) for f in fields})
        yield "the magnitude m left out: merged as plain LoRA", a.replace(method="lora", config=config, params=kept)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def matched(
    model: Model, adapters: Sequence[Adapter], p: Plan, found: Found
) -> tuple[dict[str, Array], Mapping[str, str]]:
    """The tensors by the model's names, and what the file calls them where that is something else."""
    if not found.graph:
        return names.by_name(p, found.tensors)
    wanted = [n for site in model.sites.values() for n in (site.weight, site.bias) if n in model.params]
    where = names.by_suffix([*wanted, *p.tied], found.tensors)
    if set(wanted) - where.keys():
        sites = dict(model.sites)
        stream = merged_by_role(model, adapters, sites)
        missing = ((n, (want, model.params.get(n, want))) for n, want, _ in stream if n not in where)
        by_what, flipped = names.by_content(missing, found.tensors, where.values())
        where |= by_what
    else:
        flipped = {}
    named = {n: found.tensors[f].T if flipped.get(n) else found.tensors[f] for n, f in where.items()}
    originals = {n: f + (" (transposed)" if flipped.get(n) else "") for n, f in where.items() if f != n}
    return named, originals


def at_its_name(s: Subject, e: Expected, own: Collection[str]) -> Iterator[Finding]:
    """The tensor where the model has it, and at the second name of a tied one if it is stored there too (and is not,
    by now, the name of a tensor of its `own`)."""
    copies = [c for c, first in s.plan.tied.items() if first == e.name and c in s.named and c not in own]
    name = e.name if e.name in s.named else next(iter(copies), s.ties.get(e.name, e.name))
    s.seen.update((name, e.name, *copies))
    if name not in s.named:
        if not optional(s, e):
            why = ": no tensor has its numbers, which may be folded into others" if s.graph else ""
            words = f"expected of shape {list(e.want.shape)}{why}"
            yield Finding(e.name, "missing", words, adapters=tuple(e.adapters))
        return
    for at in dict.fromkeys((name, *copies)):
        same = at != name and (s.named[at] is s.named[name] or np.array_equal(s.named[at], s.named[name]))
        if not same:
            original = s.originals.get(at, at)
            said = e if at == name else replace(e, name=at)
            yield replace(judge(said, s.named[at]), stored_as=original if original != said.name else None)


def optional(s: Subject, e: Expected) -> bool:
    """A pooler that nothing reads; in a graph also zeros, since exporters drop what adds nothing."""
    site = s.model.sites.get("pooler")
    unread = site is not None and "pooler" not in s.model.config.head and e.name in (site.weight, site.bias)
    return unread or (s.graph and not e.want.any())


def ties(p: Plan, config: Mapping[str, Any] | None) -> Mapping[str, str]:
    try:
        return p.tied if config is None else plan(config).tied
    except Malformed:
        return p.tied


def tied(s: Subject, found: Found) -> Iterator[Finding]:
    """What config.json says about ties, against what is stored."""
    for copy, original in s.ties.items():
        if copy in s.named and original in s.named and not np.array_equal(s.named[copy], s.named[original]):
            words = f"differs from {original}, but config.json ties the two, so that a loader may take either for both"
            yield Finding(copy, "tied", words)
    for copy, original in s.plan.tied.items() if found.config is not None else ():
        if copy not in s.ties and copy not in s.named and copy not in s.seen:
            yield Finding(copy, "missing", f"not stored, and config.json no longer ties it to {original}")


def extra(s: Subject) -> Iterator[Finding]:
    known = [*s.plan.unused, *map(re.escape, (*s.plan.tied, *s.plan.tied.values()))]
    for name in sorted(s.named.keys() - s.seen):
        if any(re.fullmatch(pattern, name) for pattern in known):
            continue
        own = ".lora_" in name or ".modules_to_save." in name
        words = "an adapter's own tensor, which a merge folds in" if own else "the base has no tensor of this name"
        a = s.named[name]
        yield Finding(name, "extra", words, shape=tuple(a.shape), dtype=a.dtype.name, stored_as=s.originals.get(name))


# ── config.json ──────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(p: Plan, config: Mapping[str, Any] | None) -> Iterable[Finding]:
    """What the two config.json say that the model computes."""
    if config is None:
        return
    try:
        other = plan(config).config
    except Malformed as error:
        yield Finding("config.json", "config", str(error))
        return
    for name in p.config.__dataclass_fields__:
        ours, theirs = getattr(p.config, name), getattr(other, name)
        if name == "pad_token_id" or np.array_equal(ours, theirs):
            continue
        words = (
            "the rotary frequencies differ" if name == "inv_freq" else f"expected {show(ours)}, found {show(theirs)}"
        )
        yield Finding("config.json", "config", f"{name}: {words}")
