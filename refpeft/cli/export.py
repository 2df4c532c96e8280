"""`refpeft export`: a model with its adapters as an ONNX folder."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from refpeft.cli import stop
from refpeft.cli.errors import put

WHAT, FORM, NUMBERS = "What is exported", "Its form", "Numbers: how many bits, and in which arithmetic"
DECODING, WHERE, SAFETY = "Writing text, and speed", "Where it goes", "Safety"


def option(panel: str, *names: str, about: str, meta: str | None = None, default: str | bool = True) -> Any:
    return typer.Option(*names, help=about, rich_help_panel=panel, metavar=meta, show_default=default)


def export(
    *,
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="The base model: an HF folder (config.json, *.safetensors)."),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        option(WHAT, "--adapter", "-a", meta="DIR", about="A PEFT adapter folder. Give several to combine them."),
    ] = None,
    adapter_only: Annotated[
        Path | None,
        option(
            WHAT, "--adapter-only", meta="FOLDER",
            about="Make no model, but a file of the adapter for this folder: of the form inputs, prompt or prefix. "
            "Of the form training: an adapter folder of what was trained, the safetensors file that --adapter names.",
        ),
    ] = None,
    form: Annotated[
        str, option(FORM, "--form", "-f", meta="FORM", about="What is in the graph, and what is not: see above.")
    ] = "merged",
    optimizer: Annotated[
        str | None,
        option(FORM, "--optimizer", meta="NAME", about="Of training: adamw, adam or sgd.", default="adamw"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        option(
            FORM, "--set", "-s", meta="NAME=VALUE",
            about="Of training: weight_decay=0.1, betas=\\[0.9,0.95], eps, momentum, dampening, nesterov, clip, "
            "loraplus_ratio (repeatable).",
        ),
    ] = None,
    dtype: Annotated[
        str,
        option(
            NUMBERS, "--dtype", meta="DTYPE",
            about="[b]float32[/], [b]float16[/]; [b]bfloat16[/]: weights of 16 bits, arithmetic in float32; "
            "[b]int4[/]: the layers' matrices of 4 bits, adapters, embeddings, heads and arithmetic in float32.",
        ),
    ] = "float32",
    block_size: Annotated[
        int | None,
        option(NUMBERS, "--block-size", meta="N", about="Of int4: numbers of a row that share a scale.", default="128"),
    ] = None,
    zero_points: Annotated[
        bool, option(NUMBERS, "--zero-points", about="Of int4: blocks have a zero point too, of 4 bits.")
    ] = False,
    int4_head: Annotated[
        bool,
        option(NUMBERS, "--int4-head", about="Of int4: a language model's head too, and the embedding if it is tied."),
    ] = False,
    accuracy_level: Annotated[
        int | None,
        option(
            NUMBERS, "--accuracy-level", meta="N", default="1",
            about="Of int4: 1 multiplies in float32; 4 lets onnxruntime round activations to 8 bits, which is faster "
            "and measured, not verified.",
        ),
    ] = None,
    decode: Annotated[
        bool, option(DECODING, "--decode", about="Keys and values as inputs and outputs, to write token by token.")
    ] = False,
    last_logits: Annotated[
        bool,
        option(DECODING, "--last-logits", about="With --decode: logits of the last position only, which is faster."),
    ] = False,
    graph: Annotated[
        str,
        option(
            DECODING, "--graph", meta="GRAPH",
            about="[b]portable[/], or [b]fast[/]: the same function by fewer nodes, in the shape that onnxruntime's "
            "CPU kernels run quickest; any dtype, any form.",
        ),
    ] = "portable",
    out: Annotated[
        Path, option(WHERE, "--out", "-o", meta="DIR", about="The folder (or file) to make. It must not exist.")
    ],
    weights: Annotated[
        str,
        option(
            WHERE, "--weights", meta="HOW",
            about="[b]copy[/]: all are in the folder. [b]link[/]: what no adapter changes stays in MODEL's own files, "
            "which get a second name (a hard link) in the folder and must not be edited in place.",
        ),
    ] = "copy",
    external_data: Annotated[
        bool | None,
        option(
            WHERE, "--external-data/--no-external-data", default="above 100 MB",
            about="Keep the weights in model.onnx.data beside the graph, or within it.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, option(WHERE, "--json", meta="FILE", about="Write what was made, and measured, as JSON.")
    ] = None,
    verify: Annotated[
        bool, option(SAFETY, "--verify/--no-verify", about="Run the result on onnxruntime against the specification.")
    ] = True,
    device: Annotated[
        str | None,
        option(
            SAFETY, "--device", meta="DEVICE", about="Where that runs: [b]cpu[/] or [b]cuda[/].",
            default="cuda, else cpu",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Export a model, with or without adapters, as an [b]ONNX[/] folder that is proven equal to what was trained.

    The folder holds model.onnx (opset 23, standard operators, any batch and
    sequence length), the tokenizer, and refpeft.json, which says what it is.
    With [b]--decode[/] an encoder-decoder has encoder_model.onnx and
    decoder_model_merged.onnx in its place, as optimum has them.
    Before it counts as done it is run on onnxruntime and compared with the
    specification in float64. A ratio of about 1 means: off by no more than
    rounding explains; above 10 nothing is kept. bfloat16 and int4 are compared
    with the specification on the rounded weights, and how far these are from
    the others is said. The folder loads as it is in optimum, transformers.js and,
    with --decode, onnxruntime-genai (docs/export.md says which forms).

    [b]--form[/]
    merged     the adapters folded into the weights: nothing to pay when it runs
    unmerged   base weights untouched, the adapters beside them: every method
    inputs     the adapter from outside: one session for the base model and many
    prompt     a soft prompt from outside, its rows named by ids
    prefix     as --decode, a prefix as the keys and values before the first token
    multi      several adapters, another one for each row of a batch
    training   loss, gradients and a step of the optimiser: what goes in as
               adapter.… and state.… comes out as next.adapter.…, next.state.…

    [cyan]refpeft export bert-base --out exported[/cyan]
    [cyan]refpeft export gpt2 --adapter my-lora --out exported --dtype float16[/cyan]
    [cyan]refpeft export gpt2 --adapter my-lora --form inputs --out served[/cyan]
    [cyan]refpeft export --adapter-only served --adapter my-other-lora --out other.onnx_adapter[/cyan]
    [cyan]refpeft export gpt2 --adapter my-lora --decode --out writer[/cyan]
    [cyan]refpeft export llama --adapter my-lora --form inputs --dtype int4 --weights link --out small[/cyan]
    [cyan]refpeft export gpt2 --adapter my-lora --form training --set weight_decay=0 --out trainer[/cyan]
    [cyan]refpeft export --adapter-only trainer --adapter trained.safetensors --out my-trained-lora[/cyan]

    Exit code 0: exported. 1: not equal to the specification, so not kept.
    2: could not run.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    if (model is None) == (adapter_only is None):
        raise ValueError("give either MODEL, to export it, or --adapter-only FOLDER")
    if model is not None:
        result = export_model(
            model, adapter or [], out, form=form, dtype=dtype, external=external_data, verify=verify, decode=decode,
            last_logits=last_logits, options=given(optimizer, set_ or []), link=linked(weights),
            blocks=blocks(block_size, zero_points, accuracy_level, int4_head), graph=graph, device=device,
        )  # fmt: skip
        show(result, Console())
        content = result.as_json()
    else:
        content = export_adapter(adapter_only, adapter or [], out)
    if json_file:
        put(json_file, json.dumps(content, indent=2) + "\n")


def export_model(model: Path, adapters: list[Path], out: Path, **options: Any) -> Any:
    import refpeft
    from refpeft.export.program import export as run

    with Console(stderr=True).status("reading the checkpoint") as status:
        base = refpeft.load(model)
        loaded = [refpeft.load_adapter(folder, base) for folder in adapters]
        try:
            return run(base, loaded, out, source=model, report=status.update, **options)
        except ArithmeticError as error:
            stop(str(error), 1)


def linked(weights: str) -> bool:
    if weights not in ("copy", "link"):
        raise ValueError(f"--weights must be copy or link, found {weights!r}")
    return weights == "link"


def blocks(size: int | None, zero_points: bool, accuracy_level: int | None, head: bool) -> dict[str, Any]:
    """What was said of int4."""
    found = {"size": size, "zero_points": zero_points or None, "accuracy_level": accuracy_level, "head": head or None}
    return {name: value for name, value in found.items() if value is not None}


def given(optimizer: str | None, words: list[str]) -> dict[str, Any]:
    from refpeft.cli.asked import assigned

    options = dict(assigned("--set", word) for word in words)
    return options if optimizer is None else {"optimizer": optimizer, **options}


def export_adapter(folder: Any, adapters: list[Path], out: Path) -> dict[str, Any]:
    from refpeft.export.card import read_card
    from refpeft.export.readapter import adapter_only

    if read_card(folder)["form"] == "training":
        return export_trained(folder, adapters, out)
    tensors = adapter_only(folder, adapters, out)
    Console().print(f"{out}: {len(tensors)} tensors for the graph in {folder}, {out.stat().st_size / 1e6:,.2f} MB")
    return {"file": str(out), "tensors": tensors}


def export_trained(folder: Path, files: list[Path], out: Path) -> dict[str, Any]:
    from refpeft.export import training

    if len(files) != 1:
        raise ValueError(f"{folder} trains one adapter: give one file of its tensors by --adapter, found {len(files)}")
    adapter = training.save(folder, files[0], out)
    Console().print(f"{out}: the {adapter.method} adapter that {files[0]} holds, {len(adapter.params)} tensors")
    return {"folder": str(out), "tensors": {n: list(a.shape) for n, a in adapter.params.items()}}


def show(result: Any, console: Console) -> None:
    table = Table(title=f"{result.folder}: {result.form}, {result.dtype}", show_header=False, title_justify="left")
    encoder = [(f"encoder's {what}", values) for what, values in result.encoder.items()]
    for what, values in (*encoder, ("inputs", result.inputs), ("outputs", result.outputs)):
        table.add_row(what, "\n".join(f"{name} \\[{', '.join(map(str, shape))}]" for name, shape in values.items()))
    where = f"weights in {', '.join(result.weight_files)}" if result.external_data else "weights inside"
    table.add_row("graph", f"{result.nodes} nodes, {where}")
    linked = sum((result.folder / f).stat().st_size for f in result.weight_files if f != "model.onnx.data")
    shared = f", {linked / 1e6:,.1f} MB of it shared with the model" if linked else ""
    table.add_row("size", f"{result.bytes / 1e6:,.1f} MB{shared}")
    for case in result.cases:
        what = f"{case['what']}, " if case["what"] else ""
        table.add_row(f"{what}batch {case['batch']} × length {case['length']}", f"ratio {case['ratio']:.2f}")
    console.print(table)
    if result.cases:
        worst = max(case["ratio"] for case in result.cases)
        same = " on the rounded weights" if "rounding" in result.cases[0] else ""
        console.print(f"Equal to the specification{same} on {result.provider}: ratio {worst:.2f} at most (limit 10).")
        if result.on_cpu:
            kept = ", ".join(f"{count} {name}" for name, count in sorted(result.on_cpu.items()))
            console.print(f"On the CPU stayed {kept}.")
        if same:
            far = max(case["rounding"] for case in result.cases)
            console.print(
                f"From what the weights give before they are rounded, outputs differ by {far:.2g} of their size."
            )
    else:
        console.print("Not verified.")
