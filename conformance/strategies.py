"""Structure, drawn by Hypothesis: shapes, ranks, options, layers. Never numbers; those come from `numbers`.

A structure is a dict that a JSON file can hold, and its simplest values come first, which is where shrinking goes.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from refpeft.conformance import tiny
from refpeft.conformance.traits import LORA, TRAITS

Structure = dict[str, Any]
Strategy = st.SearchStrategy[Structure]
EDGES = ("none", "zeros", "one-token", "full-rank", "repeated-rows", "empty-batch", "strided")


@st.composite
def layer(draw: Any, /, method: str, info: Mapping[str, Any], **fixed: Any) -> Structure:
    """One layer with one adapter. `fixed` fields are not drawn."""
    features, dtypes = info["features"], info["dtypes"]
    kinds = ["linear", *(kind for kind in ("conv1d", "embedding") if kind in features)]
    s: Structure = {"kind": draw(st.sampled_from(kinds)), "regime": draw(st.sampled_from(regimes(method)))}
    s = {**s, **{k: v for k, v in fixed.items() if k in s}}
    s["edge"] = "none" if s["regime"] == "exact" else draw(st.sampled_from(EDGES))
    step = TRAITS[method].step(options(info, method))
    s["o"] = step * draw(st.integers(1, max(7 // step, 2)))
    s["i"] = s["o"] if draw(st.booleans()) else draw(st.integers(1, 7))
    s["dtype"] = draw(st.sampled_from([d for d in (EXACT if s["regime"] == "exact" else FLOAT) if d in dtypes]))
    s["bias"] = s["kind"] != "embedding" and draw(st.booleans())
    s["batch"] = [draw(st.integers(1, 3)), draw(st.integers(1, 4))]
    s["draw"] = draw(st.integers(0, 3))
    if method in LORA:
        s["config"] = draw(config(method, features, s["bias"], s["regime"] == "exact", s["edge"], min(s["o"], s["i"])))
    else:
        own = {name: st.sampled_from(values) for name, values in TRAITS[method].layer.items()}
        s["config"] = draw(st.fixed_dictionaries(own))
    s["config"] |= options(info, method)
    return {**s, **stored(info), **draw(st.sampled_from(settings(info))), **fixed}


def layer_corners(method: str, info: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]]) -> list[Structure]:
    """Every kind of layer, square and not, in both regimes, and every combination of what is `fixed`."""
    kinds = ["linear", *(kind for kind in ("conv1d", "embedding") if kind in info["features"])]
    o = TRAITS[method].outputs
    axes: dict[str, Any] = {"kind": kinds, "regime": regimes(method), "i": [o, o + 1]} | dict(fixed)
    if method not in LORA:
        given = options(info, method)
        free = {name: values for name, values in TRAITS[method].layer.items() if name not in given}
        axes["config"] = [c | given for c in configs(free)]
    found = []
    for n, values in enumerate(itertools.product(*axes.values())):
        s = dict(zip(axes, values, strict=True))
        bias = s["kind"] != "embedding" and (s["i"] == o or s["kind"] == "conv1d")
        own: Structure = {"r": 4 if method == "rslora" else 2, "lora_alpha": 8.0} | FLAGS.get(method, {})
        if bias and "bias" in info["features"] and method != "dora":
            own["lora_bias"] = True
        own |= options(info, method)
        wide = [d for d in EXACT if d in info["dtypes"]] or info["dtypes"]
        dtype = wide[n // 2 % len(wide)]
        found.append(
            {"o": o, "bias": bias, "batch": [2, 2], "draw": n, "dtype": dtype, "edge": "none", "config": own} | s
        )
        found[-1] |= stored(info)
    return [s | setting for s in found for setting in settings(info)]


def regimes(method: str) -> list[str]:
    return ["exact", "float"] if TRAITS[method].exact else ["float"]


def configs(choices: Mapping[str, Sequence[Any]]) -> list[Structure]:
    """All that can be chosen."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def buildable(info: Mapping[str, Any], families: Sequence[str]) -> list[str]:
    """The families that the target has; GPT-2 is made of Conv1D layers."""
    declared = info.get("families", families)
    return [f for f in families if f in declared and ("conv1d" in info["features"] or f != "gpt2")]


def model_corners(
    method: str, info: Mapping[str, Any], families: Sequence[str], architectures: Sequence[str]
) -> list[Structure]:
    """One model of each family, with adapters on two kinds of layers of unlike shapes."""
    given, traits = info.get("model", {}), TRAITS[method]
    heads = able(architectures, traits.architectures)
    possible = headed(able(families, traits.families), heads)
    there = [given["family"]] if given else buildable(info, possible) or ["llama"]
    own: Structure = {"r": 2, "lora_alpha": 6.0} | FLAGS.get(method, {})
    found = []
    for n, family in enumerate(there):
        head = given.get("architecture") or heads[0] or tiny.LM[family]
        linears = linears_of(info, family)
        config = {**own, "target_modules": [*linears[:2], linears[-1]]}
        config = (config if method in LORA else traits.plain(family, head)) | options(info, method)
        found.append(
            {
                "method": method, "family": family, "architecture": head, "layers": 1, "dtype": "float32",
                "config": config, "batch": [2, 3], "draw": n, **given,
            }
        )  # fmt: skip
    return [s | setting for s in found for setting in settings(info)]


def headed(families: Sequence[str], architectures: Sequence[str]) -> list[str]:
    """Those that come with one of these heads: not all have a classifier."""
    return [f for f in families if f in tiny.HEAD or set(architectures) != {tiny.CLASSIFIER}]


def able(wanted: Sequence[str], possible: Sequence[str] | None) -> list[str]:
    """What a property wants, as far as the method knows it; if nothing, what the method knows."""
    return list(wanted) if possible is None else [name for name in wanted if name in possible] or list(possible)


def linears_of(info: Mapping[str, Any], family: str) -> list[str]:
    """The layers of a family that the target can adapt."""
    return list(info.get("linears", {}).get(family, tiny.LINEARS[family]))


def options(info: Mapping[str, Any], method: str) -> Structure:
    """Where a method leaves a choice, what the target declares to have chosen."""
    return dict(info.get("options", {}).get(method, {}))


def stored(info: Mapping[str, Any]) -> Structure:
    """How the target keeps the weights of a layer, where that is not as they are."""
    return {"stored": info["stored"]} if "stored" in info else {}


def settings(info: Mapping[str, Any]) -> list[Structure]:
    """All ways in which the target can be set, which should make no difference."""
    given = info.get("settings", {})
    ways = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
    return [{"settings": way} if way else {} for way in ways]


FLOAT = ("float32", "float64")
EXACT = ("float32", "float64")
HALF = ("bfloat16", "float16")


@st.composite
def config(
    draw: Any, /, method: str, features: list[str], biased: bool, exact: bool, edge: str, smallest: int
) -> Structure:
    """r and α with α ≠ r most of the time; in the exact regime such that the scale is a power of two."""
    root = method == "rslora"
    r = draw(st.sampled_from([4, 1] if exact and root else [2, 1, 3, 4]))
    if edge == "full-rank":
        r = smallest
    if exact:
        s = draw(st.sampled_from([2.0, 0.5, 1.0, 4.0]))
        α = s * (r**0.5 if root else r)
    else:
        α = draw(st.sampled_from([3.0, 16.0, 1.0, 0.5, float(r)]))
    own: Structure = {"r": r, "lora_alpha": α}
    if "bias" in features and method != "dora" and biased:
        own["lora_bias"] = draw(st.booleans())
    return own | FLAGS.get(method, {})


FLAGS: Mapping[str, Structure] = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@st.composite
def model(
    draw: Any,
    /,
    method: str,
    info: Mapping[str, Any],
    families: tuple[str, ...] = tuple(tiny.FAMILIES),
    architectures: tuple[str, ...] = ("", tiny.CLASSIFIER),
    layers: int = 2,
    **fixed: Any,
) -> Structure:
    """A tiny model, or the one in `info["model"]`, and where an adapter goes. '' is the family's language model."""
    given = info.get("model")
    traits = TRAITS[method]
    heads = able(architectures, traits.architectures)
    possible = headed(able(families, traits.families), heads)
    family = given["family"] if given else draw(st.sampled_from(buildable(info, possible)))
    there = [head for head in heads if family in tiny.HEAD or head != tiny.CLASSIFIER]
    architecture = draw(st.sampled_from(there)) or tiny.LM[family]
    architecture = given["architecture"] if given else architecture
    if method in LORA:
        own = draw(config(method, [], False, False, "none", 4))
        linears = linears_of(info, family)
        own["target_modules"] = draw(st.lists(st.sampled_from(linears), min_size=1, max_size=3, unique=True))
    else:
        drawn = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in traits.choices.items()})
        own = draw(drawn) | draw(st.sampled_from(list(traits.variants))) | traits.fixed(family, architecture)
    floats = ["float32"] if family in tiny.ROUNDED else ["float32", "float64"]
    setting = draw(st.sampled_from(settings(info)))
    if family == "t5" and not given and draw(st.booleans()):
        setting = {**setting, "more": tiny.V1_1}
    return {
        "method": method,
        "family": family,
        "architecture": architecture,
        "layers": draw(st.integers(1, layers)),
        "dtype": draw(st.sampled_from([d for d in floats if d in info["dtypes"]])),
        "config": own | options(info, method),
        "batch": [draw(st.integers(1, 2)), draw(st.integers(1, 5))],
        "draw": draw(st.integers(0, 3)),
        **setting,
        **(given or {}),
    } | fixed
