"""`refpeft extend`: a language model gets rows for new tokens, and its tokenizer the tokens."""

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def extend(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model: an HF folder, with tokenizer.json.")],
    tokens: Annotated[
        Path,
        typer.Option(
            "--tokens", "-t", metavar="FILE",
            help="The new tokens: a text file, one a line; or a BPE tokenizer.json trained on the new texts.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make. It must not exist.")],
    init: Annotated[
        str,
        typer.Option(
            help="What their rows start from: the [b]mean[/] of all rows, [b]subword_mean[/], of the tokens that each "
            "was made of so far, or [b]normal[/], drawn."
        ),
    ] = "mean",
    pad_to_multiple_of: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Add rows until their number is a multiple of N.")
    ] = None,
    single_word: Annotated[
        bool, typer.Option("--single-word", help="Find the tokens of a text file as whole words only.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="What [b]normal[/] draws from.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:  # fmt: skip
    """Extend a model's vocabulary: embedding, LM head and tokenizer, for another language or a field's own words.

    The rows and the tokenization of old tokens stay as they are, to the bit.

    A line of a text file is a token as it stands, spaces and all; it is found
    wherever its letters are, before the old tokenizer cuts the rest (so a short
    one in Latin letters had better be whole words: --single-word).
    [cyan]refpeft extend llama --tokens words.txt --out llama-long[/cyan]

    A tokenizer.json is merged: its pieces that are new, and its merges after
    the old ones. That is what Chinese-LLaMA did with 20,000 pieces.
    [cyan]refpeft extend llama --tokens chinese/tokenizer.json --out llama-zh --pad-to-multiple-of 64[/cyan]

    The new rows know nothing yet. Train the embedding alone first, then the rest
    ([cyan]refpeft merge --help[/cyan] has the whole chain):
    [cyan]refpeft train llama-zh -m partial --set layers=0 --set head=false \\
        --set modules_to_save=embed_tokens --data texts.jsonl --out stage1[/cyan]

    Exit code 0: extended. 2: could not run.
    """
    import refpeft
    from refpeft.checkpoint import folder, models
    from refpeft.checkpoint import tokens as words
    from refpeft.cli.output import writable

    writable(json_file)
    folder.check_free(out.absolute())
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    base, old = refpeft.load(model), words.read(model)
    given, names, new, tokenizer = extension(old, tokens, single_word)
    extended = refpeft.extend_vocabulary(base, new, init, old, pad_to_multiple_of, seed)
    with folder.new_folder(out, needs=models.size(extended)) as made:
        models.write(extended, made)
        words.carry(model, made, (*words.ABOUT, *words.SETTINGS))
        tokenizer.save(str(made / words.FILE))
    before, after = base.sizes()[0] or 0, extended.sizes()[0] or 0
    result = {
        "model": str(out), "init": init, "rows_before": before, "rows": after, "first_id": words.following(old),
        "tokens": names, "known_already": given - len(names), "padding": after - words.following(tokenizer),
        "tables": [n for n, a in extended.params.items() if a is not base.params[n]],
        "parameters_before": parameters(base), "parameters": parameters(extended),
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
    }  # fmt: skip
    if json_file:
        json_file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show(result)


def extension(old: Any, path: Path, single_word: bool) -> tuple[int, list[str], list[Any], Any]:
    """How many tokens the file gives; the new ones; what `extend_vocabulary` takes for them; the new tokenizer."""
    from refpeft.checkpoint import tokens as words

    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix != ".json":
        found = words.lines(path)
        names = [t for t in found if old.token_to_id(t) is None]
        count, new, tokenizer = len(found), list[Any](names), words.added(old, names, single_word)
    elif single_word:
        raise ValueError("--single-word is for the tokens of a text file, not for the pieces of a tokenizer")
    else:
        other = words.read(path)
        tokenizer, names, made = words.merged(old, other)
        count, new = other.get_vocab_size(with_added_tokens=False), list[Any](made)
    if not names:
        raise ValueError(f"{path}: there is no token in it that the model does not have")
    return count, names, new, tokenizer


def parameters(model: Any) -> int:
    return sum(a.size for a in model.params.values())


def show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=result["model"], title_justify="left", show_header=False)
    names, first = result["tokens"], result["first_id"]
    some = "  ".join(repr(n) for n in names[:8]) + (" …" if len(names) > 8 else "")
    known = f" ({result['known_already']:,} more were there already)" if result["known_already"] else ""
    table.add_row("new tokens", f"{len(names):,}, ids {first:,} to {first + len(names) - 1:,}{known}")
    table.add_row("", Text(some))
    padding = f", {result['padding']:,} of them of no token" if result["padding"] else ""
    table.add_row("rows", f"{result['rows_before']:,} → {result['rows']:,}{padding}")
    table.add_row("in", ", ".join(result["tables"]))
    table.add_row("start", result["init"])
    table.add_row("parameters", f"{result['parameters_before']:,} → {result['parameters']:,}")
    table.add_row("size", f"{result['bytes'] / 1e6:,.1f} MB")
    Console(highlight=False).print(table)
