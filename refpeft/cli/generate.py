"""`refpeft generate`: text from an exported model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from refpeft.cli.errors import put


def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by [b]refpeft export --decode[/].")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="What to go on from; several at once.")],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", "-a", metavar="FILE", help="An .onnx_adapter file, instead of the folder's own."),
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="The base model, without the folder's adapter.")] = False,
    adapter_id: Annotated[
        list[int] | None,
        typer.Option(
            "--adapter-id", metavar="K", help="Of a folder in the form multi: once for each prompt, -1: none."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Draw among the K likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Draw among the fewest whose probabilities reach P.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws: the same seed, the same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN", help="Stop at this token too, as tokenizer.json writes it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="[b]cpu[/] or [b]cuda[/].", show_default="cuda, else cpu")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Write on from a prompt with an exported model, token by token, as it comes.

    An encoder-decoder (T5, BART) reads the prompt, and writes a text of its own.

    [cyan]refpeft export gpt2 --adapter my-lora --decode --out writer[/cyan]
    [cyan]refpeft generate writer "Once upon a time"[/cyan]
    [cyan]refpeft generate writer "Once" "Twice" --temperature 0.8 --top-p 0.9 --seed 7[/cyan]
    """
    from refpeft.checkpoint.prompts import tokenizer
    from refpeft.export.generation import Options, open_writer, write

    words = tokenizer(folder)
    ends = [identified(words, token) for token in stop or ()]
    options = Options(max_new_tokens, temperature, top_k, top_p, seed, ends)
    if adapter is not None and bare:
        raise ValueError("--adapter and --bare exclude each other")
    writer = open_writer(folder, adapter, bare, device, adapter_id or None)
    if writer.template:
        raise ValueError(f"{folder}: its prompt stands in a template, which text cannot show: use it from Python")
    read = [words.encode(prompt).ids for prompt in prompts]
    before = read if writer.start is None else [[] for _ in prompts]  # an encoder-decoder begins a text of its own
    written: list[list[int]] = [[] for _ in prompts]
    shown = ""
    for tokens in write(writer, read, options):
        for row, token in zip(written, tokens, strict=True):
            row += [] if token is None else [token]
        if len(prompts) == 1:
            shown = stream(said(words, before[0], written[0]), shown)
    results = [finished(words, *each) for each in zip(prompts, read, before, written, strict=True)]
    for result in results if len(prompts) > 1 else ():
        typer.secho(result["prompt"], bold=True)
        typer.echo(result["text"] + "\n")
    if len(prompts) == 1:
        typer.echo(results[0]["text"].removeprefix(shown))
    if json_file:
        put(json_file, json.dumps({"results": results}, indent=2, ensure_ascii=False) + "\n")


def identified(words: Any, token: str) -> int:
    found = words.token_to_id(token)
    if found is None:
        raise ValueError(f"--stop {token!r} is no token of tokenizer.json")
    return int(found)


def said(words: Any, ids: list[int], new: list[int]) -> str:
    """The text of the new tokens, as they read behind the others: some tokenizers drop a space where a text begins."""
    whole, before = words.decode(ids + new), words.decode(ids)
    text: str = whole.removeprefix(before) if whole.startswith(before) else words.decode(new)
    return text


def stream(text: str, shown: str) -> str:
    """Show what is new, unless it ends within a character: then with the tokens that complete it."""
    if text.endswith("\ufffd") or not text.startswith(shown):
        return shown
    typer.echo(text.removeprefix(shown), nl=False)
    return text


def finished(words: Any, prompt: str, ids: list[int], before: list[int], new: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "text": said(words, before, new), "prompt_ids": ids, "ids": new}
