"""`refpeft count`: how many parameters a method trains in a model, and what papers say."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from refpeft.count import Count
    from refpeft.tables import Derived, Table

Json = dict[str, Any]
DTYPES = ("float32", "float16", "bfloat16")


def count(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", show_default=False,
            help="An HF folder, a config.json, or a name: roberta-base, llama2-7b, gpt3 … (an unknown one lists all).",
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="See [b]refpeft methods[/].")] = "lora",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="FIELD=VALUE", help="A field of the method's config (repeatable)."),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another head than the model's own: RobertaForSequenceClassification."),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            "--table", "-t", metavar="NAME", show_default=False,
            help="Instead: the counts that a paper published, and ours. lora-glue, lora-gpt2, lora-gpt3, "
            "lora-gpt3-more, dora or prompt-tuning.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:  # fmt: skip
    """Count what a method trains: parameters, share of the model, size of the files. From shapes alone: no weights are
    read and none are made, so GPT-3 needs no more than a laptop.

    LoRA on the queries and values of LLaMA-2 7B, with rank 16:
    [cyan]refpeft count llama2-7b --set r=16[/cyan]

    DoRA on five kinds of layers of a model at hand:
    [cyan]refpeft count my-model -m dora -s target_modules=q_proj,k_proj,v_proj,up_proj,down_proj[/cyan]

    P-tuning v2 trains the head of a classifier too:
    [cyan]refpeft count roberta-large -m p_tuning_v2 --architecture RobertaForSequenceClassification[/cyan]

    The tables of papers, each number derived again, and what differs:
    [cyan]refpeft count --table lora-glue[/cyan]
    """
    from rich.console import Console

    console = Console(highlight=False)
    if (model is None) == (table is None):
        raise ValueError("expected a MODEL, or --table NAME, and not both; see refpeft count --help")
    if table is not None:
        found = published(table, console)
    else:
        assert model is not None
        found = counted(model, architecture, method, set_ or (), console)
    if json_file:
        json_file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")


# ── one method in one model ──────────────────────────────────────────────────────────────────────────────────────────


def counted(name: str, architecture: str | None, method: str, words: Sequence[str], console: Any) -> Json:
    from refpeft.checkpoint import outlines
    from refpeft.cli.asked import method_fields
    from refpeft.count import count, outline

    base = outlines.model(name, architecture)
    adapter = outline(method, method_fields(method, words, "", base), base)
    found = count(adapter, base)
    sizes = {
        dtype: {"adapter": adapter_bytes(adapter, dtype), "model": outlines.model_bytes(base, dtype)}
        for dtype in DTYPES
    }
    console.print(f"[bold]{method}[/] in [bold]{name}[/]\n")
    console.print(by_kind(found, wide=console.width >= 100))
    console.print("\n" + summary(found))
    console.print(files(sizes))
    return {
        "model": name,
        "method": method,
        "config": json.loads(json.dumps(asdict(adapter.config), default=list)),
        "parameters": {"model": found.model, "trained": found.trained, "companions": found.companions},
        "share": found.share,
        "share_of_model_and_adapter": found.share_of_both,
        "modules": [asdict(kind) | {"parameters": kind.parameters} for kind in found.kinds],
        "bytes": sizes,
    }


def adapter_bytes(adapter: Any, dtype: str) -> int | None:
    """None where the method has no file format for such an adapter."""
    from refpeft.checkpoint import outlines

    try:
        return outlines.adapter_bytes(adapter, dtype)
    except ValueError:
        return None


def by_kind(found: "Count", wide: bool) -> Any:
    table = plain_table()
    table.add_column("module", style="cyan", overflow="fold", no_wrap=wide)
    table.add_column("×", justify="right")
    table.add_column("trained tensors", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("of the model", justify="right", no_wrap=True)
    for kind in found.kinds:
        tensors = ", ".join(f"{name} [{' × '.join(map(str, shape))}]" for name, shape in kind.tensors.items())
        share = percent(kind.parameters / found.model)
        table.add_row(kind.module or "(the model)", str(kind.modules), text(tensors), f"{kind.parameters:,}", share)
    return table


def summary(found: "Count") -> str:
    lines = [f"[bold]{found.trained:,}[/] trained, {percent(found.share)} of the model's {found.model:,}"]
    if found.added and percent(found.share_of_both) != percent(found.share):
        lines.append(f"({percent(found.share_of_both)} of model and adapter together, which is how HF peft counts)")
    if found.companions:
        lines.append(f"and {found.companions:,} entries of arrays that are kept beside them and never trained")
    return "\n".join(lines) + "\n"


def files(sizes: Mapping[str, Mapping[str, int | None]]) -> Any:
    table = plain_table()
    table.add_column("size of the file", style="cyan")
    for dtype in DTYPES:
        table.add_column(dtype, justify="right", no_wrap=True)
    for which in ("adapter", "model"):
        table.add_row(which, *(readable(sizes[dtype][which]) for dtype in DTYPES))
    return table


def percent(share: float) -> str:
    """Three digits that count: 0.236 %, 12.3 %, 0.0000123 %"""
    return f"{100 * share:#.3g}".rstrip(".") + " %" if share >= 1e-6 else f"{100 * share:.3e} %"


def readable(size: int | None) -> str:
    """In units of 1000 bytes, as disks and papers have it."""
    if size is None:
        return "no format"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:.4g} {unit}" if unit != "B" else f"{size} B"


# ── the tables of papers ─────────────────────────────────────────────────────────────────────────────────────────────


def published(name: str, console: Any) -> Json:
    from refpeft.checkpoint import outlines
    from refpeft.tables import MODELS, TABLES, derive

    if name not in TABLES:
        raise ValueError(f"--table: there is no {name!r}, but {', '.join(TABLES)}")
    table = TABLES[name]
    models = {
        row: outlines.of_config({**outlines.config(MODELS[row][0]), **MODELS[row][1]})
        for row in dict.fromkeys(row.model for row in table.rows)
    }
    found = [derive(row, models[row.model]) for row in table.rows]
    show(console, table, found)
    rows = [
        {
            "model": d.row.model, "method": d.row.label, "published": d.row.published, "derived": d.value,
            "unit": d.unit, "difference": d.difference, "agrees": d.agrees, "how": d.row.how, "why": d.row.why,
        }
        for d in found
    ]  # fmt: skip
    return {"table": name, "source": table.source, "rows": rows}


def show(console: Any, table: "Table", found: Sequence["Derived"]) -> None:
    """A line for each row under its model, and below what differs, by number."""
    grid, notes = plain_table(), list(dict.fromkeys(d.row.why for d in found if d.row.why))
    grid.add_column("method", style="cyan", no_wrap=True)
    for column in ("published", "derived", "difference"):
        grid.add_column(column, justify="right", no_wrap=True)
    grid.add_column("", style="yellow", no_wrap=True)
    grid.add_column("how derived")
    last = ""
    for d in found:
        if d.row.model != last:
            grid.add_row(f"[bold not cyan]{d.row.model}[/]")
        last, digits = d.row.model, max(d.digits, 0) + 1 if d.unit else 0
        difference = "" if d.agrees else f"{d.difference:+,.{digits}f}{d.unit}"
        note = f"({notes.index(d.row.why) + 1})" if d.row.why else ""
        derived = f"{d.value:,.{digits}f}{d.unit}"
        grid.add_row("  " + d.row.label, d.row.published, derived, difference, note, text(d.row.how))
    console.print(text(table.source, style="bold"), "\n")
    console.print(grid, "")
    agree = sum(d.agrees for d in found)
    console.print(
        f"{agree} of {len(found)} agree, rounded as they were published." + (" Of the others:" if notes else "")
    )
    console.print(numbered(notes))


def numbered(notes: Sequence[str]) -> Any:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="yellow", justify="right", no_wrap=True)
    grid.add_column()
    for n, note in enumerate(notes, 1):
        grid.add_row(f"({n})", text(note))
    return grid


def plain_table() -> Any:
    from rich.table import Table

    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")


def text(words: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(words, style=style)
