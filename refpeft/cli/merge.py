"""`refpeft merge`: a model with its adapters as a model without."""

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from refpeft.model import Model


def merge(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The base model: an HF folder (config.json, *.safetensors).")
    ],
    adapter: Annotated[
        list[Path],
        typer.Option(
            "--adapter", "-a", metavar="DIR", help="A PEFT adapter folder. Several, in order, are all merged."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make. It must not exist.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float64, float32, float16 or bfloat16.", show_default="as the base model has it"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Fold adapters into a model's weights: an HF folder, with the tokenizer beside it, that needs no adapter.

    The result is the base of whatever comes next: another [cyan]refpeft train[/cyan],
    an export, transformers. Adapters that train embeddings or a head whole
    (modules_to_save) put them in the place of the base's. What cannot be
    written as weights, such as a prompt, is refused.

    [cyan]refpeft merge llama --adapter my-lora --out merged[/cyan]

    In stages, each on top of the one before:
    [cyan]refpeft train llama -m partial --set layers=0 --set head=false \\
        --set modules_to_save=embed_tokens --data texts.jsonl --out stage1[/cyan]
    [cyan]refpeft merge llama --adapter stage1 --out base1[/cyan]
    [cyan]refpeft train base1 --set target_modules=q_proj,k_proj,v_proj,o_proj \\
        --set modules_to_save=embed_tokens,lm_head --data texts.jsonl --out stage2[/cyan]
    [cyan]refpeft merge base1 --adapter stage2 --out base2[/cyan]

    [cyan]refpeft audit merged --base llama --adapter my-lora[/cyan] checks what came out.

    Exit code 0: merged. 2: could not run.
    """
    import refpeft
    from refpeft.checkpoint import folder, models, tokens
    from refpeft.cli.output import writable

    writable(json_file)
    folder.check_free(out.absolute())
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    base = refpeft.load(model)
    adapters = [refpeft.load_adapter(a, base) for a in adapter]
    merged = refpeft.merge(base, adapters)
    if dtype is not None:
        merged = merged.astype(models.float_dtype(dtype))
    with folder.new_folder(out, needs=models.size(merged)) as new:
        models.write(merged, new)
        tokens.carry(model, new)
    result = summary(base, merged, out) | {
        "adapters": [f"{a.method}: {d}" for a, d in zip(adapters, adapter, strict=True)]
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)


def summary(base: "Model", merged: "Model", out: Path) -> dict[str, Any]:
    """What became of the model's tensors."""
    changed = [n for n, a in merged.params.items() if n not in base.params or a is not base.params[n]]
    return {
        "model": str(out),
        "changed": [n for n in changed if n in base.params],
        "untied": [n for n in changed if n not in base.params],
        "tensors": len(merged.params),
        "parameters": sum(a.size for a in merged.params.values()),
        "dtypes": sorted({a.dtype.name for a in merged.params.values()}),
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
    }


def show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=result["model"], title_justify="left", show_header=False)
    table.add_row("merged", "\n".join(result["adapters"]))
    table.add_row("changed", f"{len(result['changed'])} of {result['tensors']} tensors")
    if result["untied"]:
        table.add_row("no longer tied", ", ".join(result["untied"]))
    table.add_row("parameters", f"{result['parameters']:,}, {', '.join(result['dtypes'])}")
    table.add_row("size", f"{result['bytes'] / 1e6:,.1f} MB")
    Console(highlight=False).print(table)
