"""What a method's docstring says, in parts.

Title: in words.      Authors year, arXiv number, section, equation

    the formulae, and prose on them

Claims:
    L1  a sentence, perhaps of several lines
Any other heading:
    what stands under it
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import cleandoc

from refpeft.methods import METHODS

CLAIM = re.compile(r"^    ([A-Z]+\d+)  (.*)$")
HEADING = re.compile(r"^((?!.*(?:=|   ))\S.*):$")  # words, and no formula


@dataclass(frozen=True)
class Doc:
    title: str
    paper: str
    formulae: str
    claims: Mapping[str, str]
    sections: Mapping[str, str]


def doc(method: str) -> Doc:
    """The docstring of a method's module, taken apart."""
    head, _, body = cleandoc(METHODS[method].__doc__ or method).partition("\n")
    title, _, paper = head.partition("  ")
    blocks = split(body)
    formulae = blocks.pop("").strip("\n")
    return Doc(title.strip(), paper.strip(), formulae, claims(blocks.pop("Claims", "")), blocks)


def split(body: str) -> dict[str, str]:
    """The text under each heading; under "" what stands at the margin. A heading stands alone on its line, ends in a
    colon, and what follows it is indented."""
    blocks: dict[str, list[str]] = {"": []}
    lines = body.splitlines()
    name, before = "", ""
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        heading = HEADING.match(line)
        if heading and not before.strip() and after.startswith("    "):
            name = heading[1]
            blocks[name] = []
        else:
            if name and line.strip() and not line.startswith(" "):
                name = ""  # prose again, as before the first heading
            blocks[name].append(line)
        before = line
    return {name: "\n".join(lines).rstrip() for name, lines in blocks.items()}


def claims(block: str) -> dict[str, str]:
    """Label → sentence, each on one line."""
    found: dict[str, str] = {}
    for line in block.splitlines():
        if claim := CLAIM.match(line):
            label, found[label] = claim[1], claim[2].strip()
        elif found and line.startswith("     "):
            found[label] += " " + line.strip()
    return found
