"""What is exported: from a model with adapters to a folder that runs on any ONNX runtime.

    model.onnx (model.onnx.data)    the graph; its weights beside it where they are large
    refpeft.json                    what it is: form, adapters, dtype, inputs and outputs, and how it was verified
    config.json, tokenizer.json …   carried over from the checkpoint

A form (`refpeft.export.forms`) traces the specification with the inputs it wants; the rest is the same for all. An
export is written into a hidden folder beside its place and moved there when it is complete and verified, so there is
either all of it or none.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, checker

import refpeft
from refpeft.adapter import Adapter, fits
from refpeft.checkpoint import tokens
from refpeft.checkpoint.folder import new_folder
from refpeft.export import runtime, signature, verification, weights
from refpeft.export.card import CARD, write_json
from refpeft.export.fast import fast
from refpeft.export.form import Form, Made, Outputs, Subject, Tensor
from refpeft.export.forms import FORMS
from refpeft.export.lowering import RULES
from refpeft.export.proto import IR_VERSION, OPSET, to_model
from refpeft.export.symbols import Graph
from refpeft.model import Model, adapter_list

DTYPES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
GRAPHS: Mapping[str, Callable[[Graph, Outputs], Outputs]] = {"portable": lambda graph, outputs: outputs, "fast": fast}
INLINE_LIMIT = 100_000_000  # bytes; inline weights are held in memory twice here, and once more by whoever loads them
PROTOBUF_LIMIT = 2_000_000_000
Report = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What `export` made. `cases` are the measured ratios, empty if it was not verified."""

    folder: Path
    form: str
    dtype: str
    decode: bool
    last_logits: bool
    inputs: Mapping[str, Sequence[int | str]]
    optional_inputs: Mapping[str, Sequence[int | str]]
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
    decode: bool = False,
    last_logits: bool = False,
    options: Mapping[str, Any] | None = None,
    graph: str = "portable",
) -> Exported:
    """Write the model with its adapters as an ONNX folder at `out`, which must not exist.

    `external`: keep the weights in a file beside the graph (default: above 100 MB, so that neither the export nor
    whoever loads it needs them in memory). `source`: the checkpoint's folder, whose tokenizer is carried over.
    `verify`: run it on onnxruntime against the specification; a graph that is not equal to rounding is not kept.
    `report` is told each step. `decode`: a graph with keys and values as inputs and outputs, to write token by token;
    `last_logits`: with the logits of the last position only. `options`: of the form, if it has any. `graph`: portable,
    or fast, which is rewritten for speed on CPUs (`refpeft.export.fast`).
    """
    chosen(form, FORMS, "form")
    chosen(graph, GRAPHS, "graph")
    chosen(dtype, DTYPES, "dtype")
    if verify:
        verification.ready()
    elif hasattr(FORMS[form], "values"):
        runtime.require()  # which writes the adapter's file
    adapters = adapter_list(adapter)
    representable(model, adapters)
    if options and not getattr(FORMS[form], "OPTIONS", False):
        raise ValueError(f"the form {form} has no options, found {', '.join(options)}")
    decode = decode or getattr(FORMS[form], "DECODES", False)
    subject = Subject(model, adapters, DTYPES[dtype], decode, last_logits, options or {})
    checked(FORMS[form], subject)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already: an export never overwrites anything")
    with new_folder(out, needs=weights.size(model, DTYPES[dtype])) as folder:
        report("tracing the specification, writing the weights")
        symbols = Graph(RULES)
        made = traced(form, subject, symbols, folder, external)
        outputs = GRAPHS[graph](symbols, made.outputs)
        proto = to_model(symbols, made.inputs, outputs, made.tensors, made.optional)
        save(proto, folder / "model.onnx")
        carry_over(folder, made, source)
        finish(FORMS[form], folder, subject, made)
        cases: Sequence[Mapping[str, Any]] = ()
        provider = None
        if verify:
            report("running it on onnxruntime")
            provider, cases = verification.verify(folder, subject, FORMS[form])
        result = described(folder, Path(out), form, subject, made, proto, provider, cases)
        write_card(folder, made, subject, result)
    return result


def chosen(value: str, known: Mapping[str, Any], what: str) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, found {value!r}")


def representable(model: Model, adapters: Sequence[Adapter]) -> None:
    """Nothing that an adapter holds may be dropped without a word."""
    modules = {site.path for site in model.sites.values()}
    fits(adapters, modules)
    for a in adapters:
        if a.masks:
            raise ValueError(
                "a dropout mask belongs to one batch and cannot be exported: use adapter.replace(masks={})"
            )
        if a.rows is not None:
            raise ValueError("an adapter for some rows of one batch cannot be exported: use --form multi")


def checked(form: Form, subject: Subject) -> None:
    if subject.decode:
        signature.decodes(subject.model)
    elif subject.last_logits:
        raise ValueError("last_logits is for graphs that decode, and this one does not")
    form.check(subject)


def traced(form: str, subject: Subject, graph: Graph, folder: Path, external: bool | None) -> Made:
    """The specification run on symbols. What has no form in ONNX is refused."""

    def store(tensors: Iterable[Tensor]) -> dict[str, TensorProto]:
        return weights.store(tensors, folder / weights.DATA if beside else None)

    beside = outside(subject, external)
    try:
        return FORMS[form].make(subject, graph, store)
    except NotImplementedError as error:
        methods = " and ".join(dict.fromkeys(a.method for a in subject.adapters)) or "the model"
        raise ValueError(f"{methods} cannot be exported in the form {form}: {error}") from None


def outside(subject: Subject, external: bool | None) -> bool:
    """Do the weights lie beside the graph?"""
    size = weights.size(subject.model, subject.dtype)
    if external is False and size > PROTOBUF_LIMIT:
        raise ValueError(
            f"{size / 1e9:.1f} GB of weights do not fit into model.onnx, which can hold 2 GB: keep them beside it"
        )
    return size > INLINE_LIMIT if external is None else external


def finish(form: Form, folder: Path, subject: Subject, made: Made) -> None:
    """What else belongs into the folder."""
    complete = getattr(form, "complete", None)
    if complete is not None:
        complete(folder, subject, made)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def save(proto: ModelProto, path: Path) -> None:
    """Written, then read back by onnx's checker, with shape inference."""
    path.write_bytes(proto.SerializeToString())
    checker.check_model(str(path), full_check=True)


def described(
    folder: Path, out: Path, form: str, subject: Subject, made: Made, proto: ModelProto, provider: str | None,
    cases: Sequence[Any],
) -> Exported:  # fmt: skip
    def shapes(values: Any) -> dict[str, list[int | str]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    inputs = shapes(proto.graph.input)
    optional = {name: inputs.pop(name) for name in made.optional}
    size = sum(f.stat().st_size for f in folder.iterdir())
    return Exported(
        out, form, str(subject.dtype), subject.decode, subject.last_logits, inputs, optional,
        shapes(proto.graph.output), len(proto.graph.node), size, (folder / weights.DATA).exists(), provider, cases,
    )  # fmt: skip


def carry_over(folder: Path, made: Made, source: Any) -> None:
    if source is not None:
        tokens.carry(source, folder)
    write_json(folder / "config.json", dict(made.model.source))


def write_card(folder: Path, made: Made, subject: Subject, result: Exported) -> None:
    model = made.model
    card = {
        "format": "refpeft export",
        "refpeft": refpeft.__version__,
        "spec_version": refpeft.SPEC_VERSION,
        **{k: v for k, v in result.as_json().items() if k != "folder"},
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "model": {"family": model.config.family, "architecture": (model.source.get("architectures") or [None])[0]},
        "adapters": [{"method": a.method, "config": asdict(a.config)} for a in subject.adapters],
        **made.card,
    }
    write_json(folder / CARD, card)
