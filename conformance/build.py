"""From a drawn structure to a case: the numbers, and the fields that say what is asked."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

import refpeft
from refpeft.conformance import tiny
from refpeft.conformance.case import DTYPES, Case
from refpeft.conformance.numbers import generator, integers, normal
from refpeft.conformance.targets.spec import LATIN, part
from refpeft.methods import METHODS
from refpeft.model import Model
from refpeft.ops import Array
from refpeft.quantisation import rounded

Meta = dict[str, Any]


def meta(method: str, level: str, prop: str, s: Mapping[str, Any], seed: int) -> Meta:
    return {
        "spec_version": refpeft.SPEC_VERSION, "id": f"{method}/{level}/{prop}", "method": method, "level": level,
        "property": prop, "regime": s.get("regime", "float"), "edge": s.get("edge", "none"), "seed": seed,
        "dtype": s["dtype"],
    }  # fmt: skip


# ── one layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


def layer(method: str, prop: str, s: Mapping[str, Any], seed: int, want: Sequence[str]) -> Case:
    """x, dy, W, b and the method's parameters, for one layer."""
    exact, edge, dtype = s["regime"] == "exact", s["edge"], DTYPES[s["dtype"]]
    draw: Draw = small_integers(seed + s["draw"]) if exact else gaussian(seed + s["draw"])
    shape = [0, s["batch"][1]] if edge == "empty-batch" else [1, 1] if edge == "one-token" else s["batch"]
    o, i = s["o"], s["i"]
    arrays = {"W": draw("W", (o, i)), "dy": draw("dy", (*shape, o)), "x": inputs(s["kind"], seed, draw, shape, i)}
    if s["bias"]:
        arrays["b"] = draw("b", (o,))
    params = parameters(method, s, arrays, draw, seed)
    if exact and method == "dora":
        exact_dora(arrays, params, METHODS[method].Config(**s["config"]).scale)
    if edge == "zeros":
        params = {n: v if n == "m" else v * 0 for n, v in params.items()}
    if edge == "zero-row":
        arrays["W"][0] = params["B"][0] = 0
    if edge == "repeated-rows" and arrays["x"].size:
        arrays["x"][:] = arrays["x"][:1, :1]
    if "stored" in s:
        arrays["W"] = storable(arrays["W"], dtype, exact)
    if s["kind"] != "linear":
        arrays["W"] = arrays["W"].T.copy()
    arrays |= params
    if "changed" in want:
        arrays |= {f"new/{n}": v for n, v in other(params, exact and method == "dora").items()}
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype  # parameters of adapters on 16-bit layers are float32
    typed = {n: typed_as(a, wide if n.removeprefix("new/") in params else dtype) for n, a in arrays.items()}
    if edge == "strided":
        typed["x"] = np.repeat(typed["x"], 2, axis=-1)[..., ::2] if typed["x"].ndim > 2 else typed["x"]
    asked = {
        "layer": {"kind": s["kind"], "path": "layer", **({"stored": s["stored"]} if "stored" in s else {})},
        "config": s["config"],
        "params": list(params),
        "want": list(want),
    }
    return Case(meta(method, "layer", prop, s, seed) | asked, typed)


def storable(W: Array, dtype: Any, exact: bool) -> Array:
    """A matrix that storing in NF4 does not change; of whole numbers −2, 0 and 2."""
    return 2 * np.sign(W) if exact else rounded(typed_as(W, dtype))


def other(params: Mapping[str, Array], only_m: bool) -> dict[str, Array]:
    """Other values of the same parameters; of m only where the rest must stay for the norm to be exact."""
    return {n: v * 2 if n == "m" or not only_m else v for n, v in params.items()}


Draw = Callable[[str, tuple[int, ...]], Array]


def gaussian(seed: int) -> Draw:
    return lambda name, shape: normal(seed, name, shape)


def small_integers(seed: int) -> Draw:
    return lambda name, shape: integers(seed, name, shape, -3, 3).astype(np.float64)


def typed_as(a: Array, dtype: Any) -> Array:
    return a if a.dtype.kind in "iu" else a.astype(dtype)


def inputs(kind: str, seed: int, draw: Draw, shape: Sequence[int], i: int) -> Array:
    return integers(seed, "ids", tuple(shape), 0, i - 1) if kind == "embedding" else draw("x", (*shape, i))


def parameters(
    method: str, s: Mapping[str, Any], arrays: Mapping[str, Array], draw: Draw, seed: int
) -> dict[str, Array]:
    """Those that the method's own `init` makes, moved away from where it starts them."""
    m = METHODS[method]
    W = arrays["W"].T if s["kind"] != "linear" else arrays["W"]
    φ = m.init(m.Config(**s["config"]).at("layer"), part(s["kind"], W, arrays.get("b")), generator(seed, "init"))
    if s["regime"] == "exact":
        return {LATIN.get(n, n): draw(n, v.shape) for n, v in φ.items()}
    return {LATIN.get(n, n): v + 0.5 * draw(n, v.shape) for n, v in φ.items()}


def exact_dora(arrays: dict[str, Array], φ: dict[str, Array], s: float) -> None:
    """V = W + s B A with one entry in each row, a power of two: its norm, and m over it, are exact."""
    (r, i), o = φ["A"].shape, len(φ["B"])
    φ["A"][:] = 0
    φ["A"][np.arange(r), np.arange(r) % i] = 2.0 ** (np.arange(r) % 2)
    k = np.arange(o) % r
    φ["B"] = np.where(np.arange(r) == k[:, None], np.where(φ["B"] < 0, -1.0, 1.0), 0.0)
    V = np.where(np.arange(i) == (k % i)[:, None], 2.0 ** (1 + np.arange(o) % 3)[:, None], 0.0)
    arrays["W"] = V - s * φ["B"] @ φ["A"]
    φ["m"] = V.max(1) * 2.0 ** np.sign(φ["m"])


# ── a whole model ────────────────────────────────────────────────────────────────────────────────────────────────────


def model(
    method: str,
    level: str,
    prop: str,
    s: Mapping[str, Any],
    seed: int,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
    changed: Sequence[str] = (),
    **fields: Any,
) -> Case:
    """A model, adapters by name with their configs (one called 'default' unless given), ids, and what else is asked."""
    seed += s["draw"]
    base = stored_model(s["folder"]) if "folder" in s else tiny_model(s, seed)
    source, vocab = base.source, base.source["vocab_size"]
    adapters = {name: named(config, base) for name, config in (adapters or {"default": s["config"]}).items()}
    ids = integers(seed, "ids", tuple(s["batch"]), 2, vocab - 1)
    arrays: dict[str, Array] = {f"model/{n}": v for n, v in base.params.items()} | {"ids": ids}
    about: dict[str, Any] = {}
    for n, (name, config) in enumerate(adapters.items()):
        values, still = adapter(method, config, base, seed + 10 * n)
        arrays |= {f"{name}/{k}": v for k, v in (values | still).items()}
        about[name] = {"method": method, "config": config} | ({"frozen": list(still)} if still else {})
    for name in changed:
        arrays |= {f"new-{name}/{k}": v for k, v in adapter(method, adapters[name], base, seed + 1000)[0].items()}
    if s.get("padded"):
        arrays |= padded(s, ids, source.get("pad_token_id") or 0)
    if "pulled" in fields.get("want", ()):
        arrays |= {f"g/{n}": normal(seed, "g/" + n, v.shape).astype(v.dtype) for n, v in base.params.items()}
    if "loss" in fields.get("want", ()):
        arrays |= labelled(base, ids, seed)
        source = started(source)
    elif base.config.encoder_decoder:
        arrays["decoder_input_ids"] = decoded(ids, seed, vocab)
    if "rows" in s:
        arrays["rows"] = np.array(s["rows"])
    if "other_logits" in fields.get("want", ()):
        name = "decoder_input_ids" if "decoder_input_ids" in arrays else "ids"
        arrays["other_" + name] = another_end(ids if name == "ids" else arrays[name], vocab)
    asked = {
        "model": source,
        "adapters": about,
        "active": list(adapters),
    }
    case = Case(meta(method, level, prop, s, seed) | asked | fields, arrays)
    return with_dout(case, base, seed) if "grads" in fields.get("want", ()) else case


def tiny_model(s: Mapping[str, Any], seed: int) -> Model:
    source = tiny.config_json(s["family"], s["architecture"], s["layers"], **s.get("more", {}))
    return tiny.model(source, seed, DTYPES[s["dtype"]])


def named(config: Mapping[str, Any], base: Model) -> Mapping[str, Any]:
    """Layers as this model calls them: of T5 v1.1 some have other names than of T5."""
    if base.config.family != "t5" or not base.config.gated or "target_modules" not in config:
        return config
    return {**config, "target_modules": [tiny.GATED.get(name, name) for name in config["target_modules"]]}


@cache
def stored_model(folder: str) -> Model:
    model: Model = refpeft.load(folder)
    return model


def about(folder: str) -> dict[str, Any]:
    """What the structure of a case says of the model in a folder."""
    base = stored_model(folder)
    dtype = next(iter(base.params.values())).dtype.name
    return {
        "folder": folder, "family": base.source["model_type"], "architecture": base.source["architectures"][0],
        "layers": base.config.num_layers, "dtype": dtype,
    }  # fmt: skip


def adapter(
    method: str, config: Mapping[str, Any], base: Model, seed: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Its parameters, moved away from where the method starts them, and what is never trained."""
    fresh = refpeft.init(method, config, base, seed=0)
    moved = {
        n: (v + 0.5 * normal(seed, n, v.shape) / max(v.shape[-1:] or (1,)) ** 0.5).astype(v.dtype)
        for n, v in fresh.params.items()
    }
    return moved, dict(fresh.frozen)


def decoded(ids: Array, seed: int, vocab: int) -> Array:
    """What a decoder reads: nowhere what the encoder reads, and shorter by one where there is room."""
    b, s = ids.shape
    t = max(min(s, 2), s - 1)
    found: Array = 2 + (ids[:, :t] - 2 + integers(seed, "decoder_input_ids", (b, t), 1, vocab - 3)) % (vocab - 2)
    return found


def labelled(base: Model, ids: Array, seed: int) -> dict[str, Array]:
    """Labels, of which some are ignored: of a decoder, which are to be shifted, the last of each row too, as those of a
    batch are whose rows are not equally long; then what its encoder is given has padding."""
    if not base.config.encoder_decoder:
        return {"labels": ignored(ids, seed)}
    if (pad := base.config.pad_token_id) is None:
        raise ValueError("config.json: pad_token_id is missing, which a decoder reads where a label is ignored")
    b, s = ids.shape
    written = ignored(integers(seed, "labels", (b, s + 2), 2, base.source["vocab_size"] - 1), seed)
    there = np.arange(s + 2) < np.maximum(s + 1 - np.arange(b), 1)[:, None]
    return {"labels": np.where(there, written, -100), **padded({}, ids, pad)}


def ignored(ids: Array, seed: int) -> Array:
    """About a quarter of them, but never the first."""
    found: Array = np.where(integers(seed, "ignored", ids.shape, 0, 3) > 0, ids, -100)
    found[:, 0] = ids[:, 0]
    return found


def started(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a model, which says with which token its decoder starts, if it has an encoder and a decoder."""
    family, name = source["model_type"], "decoder_start_token_id"
    return source if family not in tiny.START or source.get(name) is not None else {**source, name: tiny.START[family]}


def another_end(ids: Array, vocab: int) -> Array:
    """The same tokens but for the last."""
    last = np.arange(ids.shape[1]) == ids.shape[1] - 1
    return np.where(last, 2 + (ids - 1) % (vocab - 2), ids)


def padded(s: Mapping[str, Any], ids: Array, pad: int) -> dict[str, Array]:
    """Row n loses its last n positions (BERT's kind: its first), but keeps one."""
    b, t = ids.shape
    keep = np.arange(t) < np.maximum(t - 1 - np.arange(b), 1)[:, None]
    if s.get("left"):
        keep = keep[:, ::-1]
    return {"ids": np.where(keep, ids, pad), "attention_mask": keep.astype(np.int64)}


def with_dout(case: Case, base: Model, seed: int) -> Case:
    from refpeft.conformance.targets.spec import Whole

    out = Whole(case).logits()["logits"]
    return Case(case.meta, {**case.arrays, "dout": normal(seed, "dout", out.shape).astype(out.dtype)})
