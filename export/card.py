"""refpeft.json, which says what an exported folder is; a folder may come from anywhere, so it is not trusted.

It lists the files that were exported with their sizes and SHA-256: of a file above 64 MB that of 1024 pieces of 16 kB,
at equal distances from its first byte to its last. So another file is noticed, one that is cut short, another tensor in
the place of one that takes more than a thousandth of it, and any change of what is small, the graph above all; a change
of few bytes in large weights may not be: to see it, all must be read.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from refpeft.checkpoint.safetensors import Malformed, read_json, show

CARD = "refpeft.json"
FIELDS: Mapping[str, type] = {
    "form": str, "dtype": str, "decode": bool, "inputs": dict, "optional_inputs": dict, "adapters": list,
}  # fmt: skip
OWN: Mapping[str, type] = {  # of some forms, or of later releases
    "facts": list, "unread": list, "prompt": str, "training": dict, "base": int, "files": dict,
}  # fmt: skip
SHAPE = "shapes, of numbers and names", lambda s: isinstance(s, list) and all(isinstance(d, (int, str)) for d in s)
WITHIN: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "inputs": SHAPE, "optional_inputs": SHAPE, "unread": ("names", lambda n: isinstance(n, str)),
    "facts": ("what is said of each adapter", lambda f: isinstance(f, dict)),
}  # fmt: skip
WHOLE = 64 << 20  # bytes of a file that are all read
PIECES, PIECE = 1024, 16 << 10


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, default=list) + "\n", "utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """Its fields, each of its type."""
    card = read_json(folder / CARD)
    if card.get("format") != "refpeft export":
        raise Malformed(f"{folder / CARD}: format must be 'refpeft export', found {show(card.get('format'))}")
    for name, kind in {**FIELDS, **{n: k for n, k in OWN.items() if n in card}}.items():
        if not isinstance(card.get(name), kind):
            raise Malformed(f"{folder / CARD}: {name} must be a {kind.__name__}, found {show(card.get(name))}")
    for name, (what, well) in WITHIN.items():
        inside = card.get(name, {})
        for value in inside.values() if isinstance(inside, dict) else inside:
            if not well(value):
                raise Malformed(f"{folder / CARD}: {name} must hold {what}, found {show(value)}")
    if not 0 <= card.get("base", 0) < 1 << 31:
        raise Malformed(f"{folder / CARD}: base must be a natural number below 2³¹, found {show(card['base'])}")
    return card


def needed(folder: Path, card: Mapping[str, Any], *names: str) -> list[Any]:
    """Fields that this form has."""
    for name in names:
        if name not in card:
            raise Malformed(f"{folder / CARD}: {name} is missing, which the form {card['form']} has")
    return [card[name] for name in names]


# ── its files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def digest(file: Path) -> dict[str, Any]:
    """Its size, and the SHA-256 of all or of pieces of it."""
    size = file.stat().st_size
    whole = size <= WHOLE
    starts = range(0, size, PIECE) if whole else [k * (size - PIECE) // (PIECES - 1) for k in range(PIECES)]
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as f:
        for start in starts:
            f.seek(start)
            found.update(f.read(PIECE))
    return {"size": size, "sha256" if whole else "sha256_of_pieces": found.hexdigest()}


def check_files(folder: Path, card: Mapping[str, Any]) -> None:
    """The folder's files are those that were exported; others may be there too."""
    for name, said in card.get("files", {}).items():
        if Path(name).name != name or not isinstance(said, dict):
            raise Malformed(f"{folder / CARD}: files must map names to sizes and hashes, found {show(name)}")
        file = folder / name
        if not file.is_file():
            raise Malformed(f"{folder}: {name} is missing, which was exported")
        now = digest(file)
        if now["size"] != said.get("size"):
            raise Malformed(f"{file}: expected {show(said.get('size'))} bytes, as it was exported, found {now['size']}")
        if now != said:
            raise Malformed(f"{file} was changed since it was exported: its SHA-256 is not that in {CARD}")


def whole(folder: Path) -> dict[str, Any]:
    """The fields of a folder whose files are all there, as they were exported."""
    card = read_card(folder)
    check_files(folder, card)
    return card
