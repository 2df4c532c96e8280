"""refpeft.json, which says what an exported folder is; a folder may come from anywhere, so it is not trusted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refpeft.checkpoint.safetensors import Malformed, read_json, show

CARD = "refpeft.json"
FIELDS: Mapping[str, type] = {
    "form": str, "dtype": str, "decode": bool, "inputs": dict, "optional_inputs": dict, "adapters": list,
}  # fmt: skip
OWN: Mapping[str, type] = {"facts": list, "unread": list, "prompt": str, "training": dict}  # of some forms


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
    return card


def needed(folder: Path, card: Mapping[str, Any], *names: str) -> list[Any]:
    """Fields that this form has."""
    for name in names:
        if name not in card:
            raise Malformed(f"{folder / CARD}: {name} is missing, which the form {card['form']} has")
    return [card[name] for name in names]
