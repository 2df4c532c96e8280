"""`refpeft read-prompt`: which words a learned prompt is near to."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def read_prompt(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of a learned prompt.")],
    model: Annotated[
        Path,
        typer.Option("--model", "-m", metavar="DIR", help="The base model: an HF folder, with its tokenizer.json."),
    ],
    words: Annotated[int, typer.Option("--words", "-k", min=1, help="How many words for each row of the prompt.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Read a learned prompt: the words of the vocabulary that each of its rows is nearest to, by cosine.

    [cyan]refpeft read-prompt my-prompt --model t5-base[/cyan]
    """
    import refpeft
    from refpeft.checkpoint import prompts
    from refpeft.prompts import P, nearest, table

    base = refpeft.load(model)
    learned = refpeft.load_adapter(adapter, base)
    if P not in learned.params:
        raise ValueError(f"{adapter}: {learned.method} learns no prompt, so there is nothing to read")
    vocabulary = prompts.tokenizer(model)
    used = learned.params[P][: learned.config.num_virtual_tokens]
    ids, cosines = nearest(used, table(base), words)
    found = [
        [{"id": i, "token": vocabulary.id_to_token(i), "cosine": round(float(c), 4)} for i, c in zip(*row, strict=True)]
        for row in zip(ids.tolist(), cosines, strict=True)
    ]
    if json_file:
        json_file.write_text(json.dumps({"rows": found}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    show(found)


def show(found: list[list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("row", justify="right", style="cyan")
    table.add_column("nearest words, and their cosines")
    for n, row in enumerate(found):
        table.add_row(str(n), Text("   ".join(f"{w['token'] or w['id']} {w['cosine']:.2f}" for w in row)))
    Console(highlight=False).print(table)
