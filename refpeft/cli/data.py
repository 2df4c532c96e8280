"""Training data: the lines of a .jsonl file as rows of token ids.

One JSON object a line, in one of these forms; a file may mix those that its objective takes.

    {"text": "…"}                     {"input_ids": [3, 1, 4]}
    {"input": "…", "target": "…"}     {"input_ids": [3, 1, 4], "labels": [1, 5]}
    {"text": "…", "label": "good"}    {"input_ids": [3, 1, 4], "label": 0}

For a template the names are those of its fields, each text or ids: {"premise": "…", "claim": [3, 1], "label": "yes"}

Words become ids by the model folder's tokenizer.json. Special tokens stand where its post-processor puts them; after
the text, or the target, of a language model comes eos_token_id, if config.json names one. Ids are taken as they are.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refpeft import templates
from refpeft.checkpoint.safetensors import show
from refpeft.objectives import NEEDS_TARGET, Row
from refpeft.templates import Compiled

FORMS = {
    "classification": "text and label",
    "seq2seq": "input and target",
    "span-corruption-sentinel": "input and target",
    "causal": "text, or input and target",
}
Encode = Callable[[str, bool], list[int]]  # text, with special tokens? → ids


class Reading(NamedTuple):
    """What a line must fit: the objective, the model's vocabulary and classes, and how long a row may be."""

    objective: str
    vocab: int
    classes: Mapping[str, int] | int | None  # names → numbers, how many, or None: a number is predicted
    eos_id: int | None
    longest: int | None
    encoder_decoder: bool
    encode: Encode | None
    template: Compiled = ()


def read_rows(path: Path, r: Reading) -> tuple[list[Row], int]:
    """The rows of a file, and how many of them were cut to the longest length."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    rows: list[Row] = []
    cut = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = read_row(parse(line), r)
                row, shorter = shortened(row, r)
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
            rows.append(row)
            cut += shorter
    if not rows:
        raise ValueError(f"{path}: there is no line in it")
    return rows, cut


def parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError(f"expected a JSON object in UTF-8, found {show(line.strip()[:80])}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {show(value)}")
    return value


def read_fields(line: Mapping[str, Any], r: Reading) -> Row:
    """What stands in a template, and the answer."""
    names = list(dict.fromkeys(i for i in r.template if isinstance(i, str)))
    form = ", ".join([*names, "label"])
    found: dict[str, list[int]] = {}
    for name in names:
        value = given(line, name, form)
        found[name] = ids(name, value, r.vocab) if isinstance(value, list) else words(name, value, r, special=False)
    return {"fields": found, "label": label(given(line, "label", form), r)}


def read_row(line: Mapping[str, Any], r: Reading) -> Row:
    if r.objective == "template":
        return read_fields(line, r)
    form = FORMS.get(r.objective, "text")
    pair = r.objective in NEEDS_TARGET or (r.objective == "causal" and bool({"input", "target", "labels"} & set(line)))
    if "input_ids" in line:
        row: dict[str, Any] = {"input_ids": ids("input_ids", line["input_ids"], r.vocab)}
        if pair:
            row["labels"] = ids("labels", given(line, "labels", form), r.vocab)
    elif pair:
        start, end = given(line, "input", form), given(line, "target", form)
        x = words("input", start, r, special=True)
        if r.encoder_decoder:
            row = {"input_ids": x, "labels": words("target", end, r, special=True)}
        else:
            row = {"input_ids": x, "labels": ended(words("target", end, r, special=False), r)}
    else:
        text = words(
            "text", given(line, "text", form), r, special=r.objective not in ("span-corruption", "lm-adaptation")
        )
        row = {"input_ids": ended(text, r) if r.objective == "causal" else text}
    if r.objective == "classification":
        row["label"] = label(given(line, "label", form), r)
    if not row["input_ids"] or row.get("labels") == []:
        raise ValueError("there is no token in it")
    return row


def given(line: Mapping[str, Any], name: str, form: str) -> Any:
    if name not in line:
        raise ValueError(f"expected {form}, found {', '.join(map(show, line)) or 'an empty object'}")
    return line[name]


def ids(name: str, value: Any, vocab: int) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise ValueError(f"{name} must be a list of integers, found {show(value)}")
    for n in value:
        if not 0 <= n < vocab:
            raise ValueError(f"{name} must lie between 0 and {vocab - 1}, found {n}")
    return value


def words(name: str, text: Any, r: Reading, special: bool) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, found {show(text)}")
    if r.encode is None:
        raise ValueError(f"{name} needs a tokenizer.json in the model's folder; without one give input_ids")
    return ids(f"the ids of {name}, by tokenizer.json,", r.encode(text, special), r.vocab)


def ended(row: list[int], r: Reading) -> list[int]:
    return [*row, r.eos_id] if r.eos_id is not None and row and row[-1] != r.eos_id else row


def label(value: Any, r: Reading) -> int | float:
    if r.classes is None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"label must be a number, found {show(value)}")
        return float(value)
    count = r.classes if isinstance(r.classes, int) else len(r.classes)
    if isinstance(value, str) and not isinstance(r.classes, int):
        if value not in r.classes:
            raise ValueError(f"label must be one of {', '.join(map(show, r.classes))}, found {show(value)}")
        return r.classes[value]
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"label must be an integer from 0 to {count - 1}, found {show(value)}")
    return value


def shortened(row: Row, r: Reading) -> tuple[Row, bool]:
    """Cut at the end to what the model can take."""
    if r.longest is None:
        return row, False
    if r.objective == "template":
        whole, cut = (templates.row(r.template, row["fields"], longest) for longest in (None, r.longest))
        return row, len(cut) < len(whole)  # where a batch is made, it is cut in the same way
    x: Sequence[int] = row["input_ids"]
    y: Sequence[int] = row.get("labels", ())
    room = r.longest if r.encoder_decoder or not y else r.longest - len(x)
    if y and room <= 0:
        raise ValueError(f"the input alone has {len(x)} tokens, which leaves none of {r.longest} for the target")
    new = {**row, "input_ids": x[: r.longest]} | ({"labels": y[:room]} if y else {})
    return new, len(x) > r.longest or len(y) > room
