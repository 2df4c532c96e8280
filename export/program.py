"""What is exported: from a model with adapters to a folder that runs on any ONNX runtime.

    model.onnx (model.onnx.data)    the graph; its weights beside it where they are large
    encoder_model.onnx, decoder_model_merged.onnx       of an encoder-decoder that decodes, in place of model.onnx
    refpeft.json                    what it is: form, adapters, dtype, inputs and outputs, and how it was verified
    config.json, tokenizer.json …   carried over from the checkpoint
    genai_config.json               the same for onnxruntime-genai, where the graph decodes

A form (`refpeft.export.forms`) traces the specification with the inputs it wants; the rest is the same for all. An
export is written into a hidden folder beside its place and moved there when it is complete and verified, so there is
either all of it or none.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, checker, helper

import refpeft
from refpeft.adapter import Adapter, fits, stepwise
from refpeft.checkpoint import tokens
from refpeft.checkpoint.folder import new_folder
from refpeft.export import genai, graphs, initialisers, runtime, signature, verification, weights
from refpeft.export.card import CARD, digest, write_json
from refpeft.export.fast import fast
from refpeft.export.form import Form, Made, Outputs, Subject, fingerprint
from refpeft.export.forms import FORMS
from refpeft.export.lowering import RULES
from refpeft.export.precision import DTYPES, Tensor, encoded, matrices, precision
from refpeft.export.proto import IR_VERSION, OPSET, to_model
from refpeft.export.rewriting import Stored, relevel, rewritten
from refpeft.export.symbols import Graph
from refpeft.export.verification import Verified
from refpeft.model import Model, adapter_list

GRAPHS: Mapping[str, Callable[[Graph, Outputs, Collection[str]], Outputs]] = {
    "portable": lambda graph, outputs, blocked: outputs,
    "fast": fast,
}
INLINE_LIMIT = 100_000_000  # bytes; who loads a graph holds what is within it, and maps what lies beside
PROTOBUF_LIMIT = 2_000_000_000
Report = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What `export` made. `cases` are the measured ratios, empty if it was not verified; with the distance from what
    weights that are not rounded give, where they are; `on_cpu` counts, where that was on CUDA, the operators of the
    nodes that stayed on the CPU. Where there are two graphs, `inputs` and `outputs` are the
    decoder's, and `encoder` has those of the other."""

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
    weight_files: Sequence[str]
    provider: str | None
    cases: Sequence[Mapping[str, Any]]
    encoder: Mapping[str, Mapping[str, Sequence[int | str]]] = field(default_factory=dict)
    on_cpu: Mapping[str, int] = field(default_factory=dict)

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
    link: bool = False,
    blocks: Mapping[str, Any] | None = None,
    graph: str = "portable",
    device: str | None = None,
) -> Exported:
    """Write the model with its adapters as an ONNX folder at `out`, which must not exist.

    `external`: keep the weights in a file beside the graph (default: above 100 MB, so that neither the export nor
    whoever loads it needs them in memory). `source`: the checkpoint's folder, whose tokenizer is carried over.
    `verify`: run it on onnxruntime against the specification; a graph that is not equal to rounding is not kept.
    `report` is told each step. `decode`: a graph with keys and values as inputs and outputs, to write token by token;
    `last_logits`: with the logits of the last position only. `options`: of the form, if it has any. `link`: what no
    adapter changes stays in the files of `source`, which are linked into the folder. `blocks`: of the dtype int4, its
    size, zero_points, accuracy_level and head. `graph`: portable, or fast, which is rewritten for speed on CPUs
    (`refpeft.export.fast`). `device`: cpu or cuda, where it is verified (default: cuda where there is one).
    """
    chosen(form, FORMS, "form")
    chosen(graph, GRAPHS, "graph")
    chosen(dtype, DTYPES, "dtype")
    if verify:
        verification.ready(device)
    elif device is not None:
        raise ValueError(f"device says where an export is verified, and this one is not to be, found {device}")
    elif hasattr(FORMS[form], "values"):
        runtime.require()  # which writes the adapter's file
    adapters = adapter_list(adapter)
    representable(model, adapters)
    if options and not getattr(FORMS[form], "OPTIONS", False):
        raise ValueError(f"the form {form} has no options, found {', '.join(options)}")
    decode = decode or getattr(FORMS[form], "DECODES", False)
    subject = Subject(model, adapters, DTYPES[dtype], decode, last_logits, options or {}, precision(dtype, blocks))
    if link and (source is None or external is False):
        raise ValueError("linked weights lie in the files of `source`, beside the graph")
    checked(FORMS[form], subject)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already: an export never overwrites anything")
    own = held(subject, FORMS[form])
    beside = link or outside(subject, external, own)
    size = own if link else own + weights.size(model, subject.precision)
    with new_folder(out, needs=size if beside else 2 * size) as folder:
        report(f"tracing the specification, writing {size / 1e6:,.1f} MB of weights")
        symbols = Graph(RULES)
        frozen = Path(source) if link and source is not None else None
        data = folder / weights.DATA
        made = traced(form, subject, symbols, data, frozen)
        protos = modelled(subject, symbols, made, graph)
        for name, proto in protos.items():
            save(proto, folder / name, beside)
        carry_over(folder, made, source)
        finish(FORMS[form], folder, subject, made)
        genai.write(folder, form, subject, made)
        if verify:
            report("running it on onnxruntime")
        verified = proven(folder, subject, FORMS[form], protos, beside, verify, device)
        if not beside or not data.stat().st_size:
            data.unlink()
        result = described(folder, Path(out), form, subject, made, protos, beside, verified)
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
        stepwise(subject.adapters)
    elif subject.last_logits:
        raise ValueError("last_logits is for graphs that decode, and this one does not")
    form.check(subject)


def traced(form: str, subject: Subject, graph: Graph, data: Path, frozen: Path | None) -> Made:
    """The specification run on symbols. What has no form in ONNX is refused."""
    p = subject.precision
    blocked = matrices(subject.model.sites, p.blocks)

    def store(tensors: Iterable[Tensor]) -> dict[str, TensorProto]:
        return weights.store(chain.from_iterable(encoded(p, blocked, t) for t in tensors), data, frozen)

    try:
        return FORMS[form].make(subject, graph, store)
    except NotImplementedError as error:
        methods = " and ".join(dict.fromkeys(a.method for a in subject.adapters)) or "the model"
        raise ValueError(f"{methods} cannot be exported in the form {form}: {error}") from None


def modelled(subject: Subject, symbols: Graph, made: Made, graph: str) -> dict[str, ModelProto]:
    """Each file's part of the trace: in the shape that is wanted, with weights as they are stored."""
    p = subject.precision
    stored = Stored(made.tensors, matrices(subject.model.sites, p.blocks), p.blocks)
    protos: dict[str, ModelProto] = {}
    for name, f in graphs.files(made, subject).items():
        f.tell(symbols)
        outputs = rewritten(symbols, GRAPHS[graph](symbols, f.outputs, stored.blocked), stored)
        protos[name] = to_model(symbols, f.inputs, outputs, made.tensors, f.optional)
    return protos


def held(subject: Subject, form: Form) -> int:
    """Bytes of what the adapters bring, about; folded into the weights it takes no room."""
    tensors = [a for adapter in subject.adapters for a in (*adapter.params.values(), *adapter.frozen.values())]
    return 0 if form.FOLDS else sum(a.nbytes for a in tensors)


def outside(subject: Subject, external: bool | None, own: int) -> bool:
    """Do the weights lie beside the graph, `own` bytes of which the adapters bring? Those of two graphs do, so that
    both share them."""
    size = weights.size(subject.model, subject.precision) + own
    if external is False and size > PROTOBUF_LIMIT:
        raise ValueError(
            f"{size / 1e9:.1f} GB of weights do not fit into model.onnx, which can hold 2 GB: keep them beside it"
        )
    return graphs.apart(subject) or size > INLINE_LIMIT if external is None else external


def proven(
    folder: Path,
    subject: Subject,
    form: Form,
    protos: Mapping[str, ModelProto],
    beside: bool,
    verify: bool,
    device: str | None,
) -> Verified:
    """What verification found. Graphs whose accuracy level lets activations be rounded too are verified without."""
    p = subject.precision
    verified = verification.verify(folder, subject, form, device) if verify else Verified()
    if p.blocks and p.blocks.accuracy_level != 1:
        for name, proto in protos.items():
            relevel(proto, p.blocks.accuracy_level)
            save(proto, folder / name, beside)
    if p.exact or not verify:
        return verified
    far = verification.rounding(folder, subject, form, device)
    return replace(verified, cases=[{**case, "rounding": r} for case, r in zip(verified.cases, far, strict=True)])


def finish(form: Form, folder: Path, subject: Subject, made: Made) -> None:
    """What else belongs into the folder."""
    complete = getattr(form, "complete", None)
    if complete is not None:
        complete(folder, subject, made)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def save(proto: ModelProto, path: Path, beside: bool) -> None:
    """Written, weights `beside` it or within, and checked: where tensors lie by us, all else by onnx's checker, with
    shape inference. That one refuses files of several names, and holds what is within: both are inputs to it."""
    if beside:
        path.write_bytes(proto.SerializeToString())
        if all(location(t) in ("", weights.DATA) for t in proto.graph.initializer):
            checker.check_model(str(path), full_check=True)
            return
        initialisers.read(path)
    else:
        weights.inline(proto, path.parent / weights.DATA, path)
    seen = ModelProto()
    seen.CopyFrom(proto)
    del seen.graph.initializer[:]
    seen.graph.initializer.extend(t for t in proto.graph.initializer if not location(t))
    others = [t for t in proto.graph.initializer if location(t) and t.name not in {i.name for i in seen.graph.input}]
    seen.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in others)
    checker.check_model(seen, full_check=True)


def location(t: TensorProto) -> str:
    """The file that a tensor lies in, if it is another one than the graph's."""
    return next((e.value for e in t.external_data if e.key == "location"), "")


def described(
    folder: Path, out: Path, form: str, subject: Subject, made: Made, protos: Mapping[str, ModelProto], beside: bool,
    verified: Verified,
) -> Exported:  # fmt: skip
    def shapes(values: Any) -> dict[str, list[int | str]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    *before, proto = protos.values()
    inputs = shapes(proto.graph.input)
    optional = {name: inputs.pop(name) for name in made.optional}
    encoder: dict[str, Any] = {}
    for other in before:
        own = {name: shape for name, shape in shapes(other.graph.input).items() if name not in optional}
        encoder = {"inputs": own, "outputs": shapes(other.graph.output)}
    size = sum(f.stat().st_size for f in folder.iterdir())
    files = sorted({location(t) for p in protos.values() for t in p.graph.initializer if beside} - {""})
    return Exported(
        out, form, subject.precision.name, subject.decode, subject.last_logits, inputs, optional,
        shapes(proto.graph.output), sum(len(p.graph.node) for p in protos.values()), size, bool(files), files,
        verified.provider, verified.cases, encoder, verified.on_cpu,
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
        "base": fingerprint(subject),
        **made.card,
        "files": {f.name: digest(f) for f in sorted(folder.iterdir())},
    }
    write_json(folder / CARD, card)
