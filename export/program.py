"""What is exported: from a model with adapters to a folder that runs on any ONNX runtime.

    model.onnx (model.onnx.data)    the graph; its weights beside it where they are large
    refpeft.json                    what it is: form, adapters, dtype, inputs and outputs, and how it was verified
    config.json, tokenizer.json …   carried over from the checkpoint

A form is a function that traces the specification with the inputs it wants; the rest is the same for all. An export is
written into a hidden folder beside its place and moved there when it is complete and verified, so there is either all
of it or none.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, checker

import refpeft
from refpeft.adapter import Adapter
from refpeft.checkpoint.folder import new_folder
from refpeft.export import weights
from refpeft.export.lowering import RULES
from refpeft.export.proto import IR_VERSION, OPSET, to_model
from refpeft.export.symbols import Graph, Symbol
from refpeft.hooks import Hooks
from refpeft.model import Model, Site, adapter_list
from refpeft.tune import mergeable, untied_source

DTYPES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
INLINE_LIMIT = 100_000_000  # bytes; inline weights are held in memory twice here, and once more by whoever loads them
PROTOBUF_LIMIT = 2_000_000_000
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
Outputs = Mapping[str, Symbol]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What `export` made. `cases` are the measured ratios, empty if it was not verified."""

    folder: Path
    form: str
    dtype: str
    inputs: Mapping[str, Sequence[int | str]]
    outputs: Mapping[str, Sequence[int | str]]
    nodes: int
    bytes: int
    external_data: bool
    provider: str | None
    cases: Sequence[Mapping[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def export(
    model: Model,
    adapter: Adapter | Sequence[Adapter] | None,
    out: str | os.PathLike[str],
    form: str = "merged",
    dtype: str = "float32",
    external: bool | None = None,
    verify: bool = True,
    source: str | os.PathLike[str] | None = None,
    report: Report = lambda step: None,
) -> Exported:
    """Write the model with its adapters as an ONNX folder at `out`, which must not exist.

    `external`: keep the weights in a file beside the graph (default: above 100 MB, so that neither the export nor
    whoever loads it needs them in memory). `source`: the checkpoint's folder, whose tokenizer is carried over.
    `verify`: run it on onnxruntime against the specification; a graph that is not equal to rounding is not kept.
    `report` is told each step.
    """
    chosen(form, FORMS, "form")
    chosen(dtype, DTYPES, "dtype")
    if verify:
        from refpeft.export import verification

        verification.ready()
    adapters = adapter_list(adapter)
    representable(model, adapters)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already: an export never overwrites anything")
    with new_folder(out, needs=weights.size(model, DTYPES[dtype])) as folder:
        report("writing the weights")
        whole, tensors = stored(model, adapters, DTYPES[dtype], folder, external)
        report("tracing the specification")
        graph = Graph(RULES)
        names, outputs = FORMS[form](graph, symbolic(graph, whole))
        proto = to_model(graph, names, outputs, tensors)
        save(proto, folder / "model.onnx")
        cases: Sequence[Mapping[str, Any]] = ()
        provider = None
        if verify:
            report("running it on onnxruntime")
            provider, cases = verification.verify(folder, model, adapters, DTYPES[dtype])
        result = described(folder, Path(out), form, dtype, proto, provider, cases)
        carry_over(folder, whole, adapters, result, source)
    return result


def chosen(value: str, known: Mapping[str, Any], what: str) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, found {value!r}")


def representable(model: Model, adapters: Sequence[Adapter]) -> None:
    """Nothing that an adapter holds may be dropped without a word."""
    mergeable(adapters)
    modules = {site.path for site in model.sites.values()}
    for a in adapters:
        for path in a.by_module.keys() - modules:
            raise ValueError(f"the {a.method} adapter has parameters for {path}, a module that the model does not have")
        if a.masks:
            raise ValueError(
                "a dropout mask belongs to one batch and cannot be exported: use adapter.replace(masks={})"
            )


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def merged(graph: Graph, model: Model) -> tuple[list[str], Outputs]:
    """The model with its adapters folded into its weights: the base model's graph, node for node."""
    inputs = token_inputs(graph, model)
    ids, attention_mask, types, decoded = (inputs.get(name) for name in NAMES)
    out, _, _ = model.run(Hooks(), ids, attention_mask, types, None, decoded)
    return list(inputs), {output_name(model): out}


FORMS: Mapping[str, Callable[[Graph, Model], tuple[list[str], Outputs]]] = {"merged": merged}


NAMES = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


def token_inputs(graph: Graph, model: Model) -> dict[str, Symbol]:
    """Named as transformers names them."""
    absent = [] if "embed.type" in model.sites else ["token_type_ids"]
    absent += [] if model.config.encoder_decoder else ["decoder_input_ids"]
    sizes = {"decoder_input_ids": "decoder_sequence"}
    names = [name for name in NAMES if name not in absent]
    return {name: graph.input(name, np.int64, ("batch", sizes.get(name, "sequence"))) for name in names}


def output_name(model: Model) -> str:
    return "logits" if "head.out" in model.sites else "last_hidden_state"


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def stored(
    model: Model, adapters: Sequence[Adapter], dtype: np.dtype[Any], folder: Path, external: bool | None
) -> tuple[Model, dict[str, TensorProto]]:
    """Write the merged tensors. Returns the model that they make, its parameters as what was stored of each."""
    sites: dict[str, Site] = dict(model.sites)
    size = weights.size(model, dtype)
    if external is False and size > PROTOBUF_LIMIT:
        raise ValueError(
            f"{size / 1e9:.1f} GB of weights do not fit into model.onnx, which can hold 2 GB: keep them beside it"
        )
    if external is None:
        external = size > INLINE_LIMIT
    tensors = weights.store(weights.merged(model, adapters, sites), dtype, folder / weights.DATA if external else None)
    source = model.source if sites == dict(model.sites) else untied_source(model)
    return replace(model, sites=sites, params=tensors, source=source), tensors


def symbolic(graph: Graph, model: Model) -> Model:
    """The model with symbols in place of its parameters."""
    dtype = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
    params = {name: graph.input(name, dtype[t.data_type], tuple(t.dims)) for name, t in model.params.items()}
    return replace(model, params=params)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def save(proto: ModelProto, path: Path) -> None:
    """Written, then read back by onnx's checker, with shape inference."""
    path.write_bytes(proto.SerializeToString())
    checker.check_model(str(path), full_check=True)


def described(
    folder: Path, out: Path, form: str, dtype: str, proto: ModelProto, provider: str | None, cases: Sequence[Any]
) -> Exported:
    def signature(values: Any) -> dict[str, list[int | str]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    return Exported(
        out, form, dtype, signature(proto.graph.input), signature(proto.graph.output), len(proto.graph.node),
        sum(f.stat().st_size for f in folder.iterdir()), (folder / weights.DATA).exists(), provider, cases,
    )  # fmt: skip


def carry_over(folder: Path, model: Model, adapters: Sequence[Adapter], result: Exported, source: Any) -> None:
    for name in CARRIED if source is not None else ():
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
    card = {
        "format": "refpeft export",
        "refpeft": refpeft.__version__,
        "spec_version": refpeft.SPEC_VERSION,
        **{k: v for k, v in result.as_json().items() if k != "folder"},
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "model": {"family": model.config.family, "architecture": (model.source.get("architectures") or [None])[0]},
        "adapters": [{"method": a.method, "config": asdict(a.config)} for a in adapters],
    }
    for name, content in (("config.json", dict(model.source)), ("refpeft.json", card)):
        (folder / name).write_text(json.dumps(content, indent=2, default=list) + "\n")
