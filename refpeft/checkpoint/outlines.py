"""Models and files of which only the shapes are known: hollow models from a config.json, and how long a file would be.

Two descriptions here are of models that the transformer does not compute, and serve for counting only:

    deberta-v2   He et al. 2020, arXiv 2006.03654: BERT's layers, relative positions that all layers share, and a
                 convolution after the first layer
    gpt3         Brown et al. 2020, arXiv 2005.14165: GPT-2 with queries, keys and values in three layers, as papers
                 that adapt "W_q and W_v" see it. HF's GPT-2 has one layer for all three, of as many parameters.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from refpeft.adapter import Adapter
from refpeft.checkpoint import adapters, models, safetensors
from refpeft.checkpoint.configs import Json, always, bert_config, bert_width, natural, require
from refpeft.checkpoint.families import FAMILIES, Family, Head, Plan, bert_layer, plan
from refpeft.config import Site
from refpeft.hollow import hollow
from refpeft.methods import METHODS
from refpeft.model import Model
from refpeft.ops import Array, is_half
from refpeft.presets import ALIASES, PRESETS

SELF = "encoder.layer.{}.attention.self."
ONLY_SHAPES: Mapping[str, Family] = {
    "deberta-v2": Family(
        base="deberta.",
        sites={
            "embed.token": ("embeddings.word_embeddings", "embedding"),
            "embed.norm": ("embeddings.LayerNorm", "layer_norm"),
        },
        layer=bert_layer() | {f"attn.{x[0]}": (f"{SELF}{x}_proj", "linear") for x in ("query", "key", "value")},
        heads={
            "Model": Head((), {}),
            "ForSequenceClassification": Head(
                ("first", "pooler", "gelu", "head.out"),
                {"pooler": ("pooler.dense", "linear"), "head.out": ("classifier", "linear")},
            ),
        },
        config=bert_config,
        biased=always,
        intermediate=bert_width,
    ),
    "gpt3": replace(
        FAMILIES["gpt2"],
        layer={
            "attn.norm": ("h.{}.ln_1", "layer_norm"),
            "attn.q": ("h.{}.attn.q_proj", "linear"),
            "attn.k": ("h.{}.attn.k_proj", "linear"),
            "attn.v": ("h.{}.attn.v_proj", "linear"),
            "attn.o": ("h.{}.attn.out_proj", "linear"),
            "mlp.norm": ("h.{}.ln_2", "layer_norm"),
            "mlp.up": ("h.{}.mlp.fc_in", "linear"),
            "mlp.down": ("h.{}.mlp.fc_out", "linear"),
        },
    ),
}


def model(name: str | Path, architecture: str | None = None, dtype: Any = "float32") -> Model:
    """The hollow model of an HF folder, of a config.json, or of a preset. `architecture`: another head than its own."""
    return of_config(config(name) | ({"architectures": [architecture]} if architecture else {}), dtype)


def config(name: str | Path) -> dict[str, Any]:
    """The config.json that this name stands for."""
    where = Path(name)
    if (where / "config.json").is_file() or where.is_file():
        return safetensors.read_json(where if where.is_file() else where / "config.json")
    preset = str(name).lower()
    preset = ALIASES.get(preset, preset)
    if preset not in PRESETS:
        raise ValueError(f"{name}: neither a folder with a config.json nor a known model: {', '.join(PRESETS)}")
    return dict(PRESETS[preset])


def of_config(source: Json, dtype: Any = "float32") -> Model:
    p, kind = planned(source), models.float_dtype(dtype)
    return Model(p.config, p.sites, {name: hollow(shape, kind) for name, shape in p.shapes.items()}, source)


def planned(source: Json) -> Plan:
    p = plan(source, {**FAMILIES, **ONLY_SHAPES})
    return deberta(source, p) if source["model_type"] == "deberta-v2" else p


def deberta(c: Json, p: Plan) -> Plan:
    """The plan with what DeBERTa has besides BERT's layers."""
    require(c, relative_attention=True, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False)
    d, k = natural(c, "hidden_size"), natural(c, "conv_kernel_size")
    more = {
        "embed.relative": ("encoder.rel_embeddings", "embedding", (2 * natural(c, "position_buckets"), d)),
        "embed.relative_norm": ("encoder.LayerNorm", "layer_norm", (d,)),
        "embed.conv": ("encoder.conv.conv", "convolution", (d, d, k)),
        "embed.conv_norm": ("encoder.conv.LayerNorm", "layer_norm", (d,)),
    }
    sites, shapes = dict(p.sites), dict(p.shapes)
    for role, (path, kind, shape) in more.items():
        path = p.base + path
        sites[role] = Site(path, kind, path + ".weight", path + ".bias")
        shapes[path + ".weight"] = shape
        if kind != "embedding":
            shapes[path + ".bias"] = (d,)
    return replace(p, sites=sites, shapes=shapes)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def model_bytes(model: Model, dtype: Any) -> int:
    """The length of the model.safetensors that `save` would write, of this dtype. Where a head of its own stands beside
    shared embeddings (T5 1.1), these are in it under each of their names."""
    tensors = model.params if model.config.family in ONLY_SHAPES else models.planned_tensors(model)
    return safetensors.size(as_floats(tensors, dtype))


def adapter_bytes(adapter: Adapter, dtype: Any) -> int:
    """The length of its adapter_model.safetensors, with all floats of this dtype; the adapter may be hollow."""
    kept = getattr(METHODS[adapter.method], "kept", None)
    _, tensors = adapters.contents(adapter if kept is None else kept(adapter))
    return safetensors.size(as_floats(tensors, dtype))


def as_floats(tensors: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    to = models.float_dtype(dtype)
    return {n: hollow(a.shape, to if a.dtype.kind == "f" or is_half(a.dtype) else a.dtype) for n, a in tensors.items()}
