"""The tokenizer of a model's folder, and what belongs beside the weights: read, extended by new tokens, carried over.

Two ways to new tokens, of which the ids run on from the last there is:

* added tokens, for a tokenizer of any kind. They are looked for before all else, in the raw text: the leftmost, and of
  several there the longest, inside words too unless `single_word`. What lies between them is cut as ever. A token may
  begin with a space, and is then found after a space only.
* merged, from BPE into BPE, as Cui et al. 2023 do with sentencepiece models: pieces that the old one lacks join its
  vocabulary, and their merges its own. Here these come after all old ones, in the order in which they were learnt. In
  Cui et al. all new pieces have score 0: they come before all old ones, whose scores are negative, and the leftmost
  pair first, whatever the order was. So a text may be cut otherwise there, an old one too if it has their letters.

Claims:
    K1  A text in which no new token stands is cut as before.
    K2  New tokens are cut out as one token each, with the ids that follow the old ones.
    K3  What was decoded to itself before still is.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refpeft.checkpoint.safetensors import Malformed, read_json, show

FILE = "tokenizer.json"
ABOUT = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # which are true of more tokens too
SLOW = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")  # the same tokens once more
SETTINGS = ("generation_config.json",)


def read(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder, or of a tokenizer.json itself."""
    from tokenizers import Tokenizer

    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise Malformed(f"{file.parent}: there is no {file.name}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # of no particular type
        raise Malformed(f"{file}: not a tokenizer: {' '.join(str(e).split())[:120]}") from None


def carry(source: str | os.PathLike[str], to: Path, names: Iterable[str] = (FILE, *ABOUT, *SLOW, *SETTINGS)) -> None:
    """The files of these names, as far as the folder has them."""
    for name in names:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, to / name)


def lines(path: Path) -> list[str]:
    """A token a line, in UTF-8; spaces belong to it. Empty lines count for nothing, and a second time for none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise Malformed(f"{path}: expected UTF-8, found something else at byte {e.start}") from None
    return list(dict.fromkeys(line.removesuffix("\r") for line in text.split("\n") if line.strip()))


def added(tokenizer: Any, tokens: Sequence[str], single_word: bool = False) -> Any:
    """The tokenizer with these as added tokens."""
    from tokenizers import AddedToken

    new = type(tokenizer).from_str(tokenizer.to_str())
    start = following(tokenizer)
    new.add_tokens([AddedToken(t, single_word=single_word, normalized=as_it_stands(tokenizer, t)) for t in tokens])
    ids = [new.token_to_id(t) for t in tokens]
    if ids != list(range(start, start + len(tokens))):
        wrong = next(n for n, i in enumerate(ids) if i != start + n)
        raise ValueError(f"the token {show(tokens[wrong])} should get the id {start + wrong}, but gets {ids[wrong]}")
    return new


def as_it_stands(tokenizer: Any, token: str) -> bool:
    """Is it found in the normalised text as in the raw? A normaliser that changes it (LLaMA's puts a ▁ in front) would
    keep it from being found elsewhere than there."""
    return tokenizer.normalizer is None or tokenizer.normalizer.normalize_str(token) == token


def following(tokenizer: Any) -> int:
    """The first id after all there are."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


# ── merging BPE into BPE ─────────────────────────────────────────────────────────────────────────────────────────────


def merged(old: Any, other: Any) -> tuple[Any, list[str], list[list[int]]]:
    """The old tokenizer with the other's pieces and merges; the new pieces; and the old ids that each is made of."""
    mine, theirs = json.loads(old.to_str()), json.loads(other.to_str())
    check_alike(mine, theirs)
    apart = {t["content"] for t in theirs["added_tokens"]} | old.get_vocab().keys()
    pieces = [p for p in sorted(theirs["model"]["vocab"], key=theirs["model"]["vocab"].get) if p not in apart]
    while True:  # a piece may lack a way to it, where the old merges cut its letters otherwise: then it is left out
        new = type(old).from_str(json.dumps(joined(mine, theirs, pieces, following(old)), ensure_ascii=False))
        found = [p for p in pieces if [t.value for t in new.model.tokenize(p)] == [p]]
        if found == pieces:
            return new, pieces, [[t.id for t in old.model.tokenize(p)] for p in pieces]
        pieces = found


def joined(mine: Any, theirs: Any, pieces: Sequence[str], start: int) -> Any:
    """tokenizer.json with these pieces from the id `start` on, and after all merges those that make one of them.

    No others: so no merge is new for a text that has none of the pieces (K1)."""
    vocab = {**mine["model"]["vocab"], **{p: start + n for n, p in enumerate(pieces)}}
    fresh = set(pieces)
    merges = [p for p in theirs["model"]["merges"] if "".join(p) in fresh and all(part in vocab for part in p)]
    return {**mine, "model": {**mine["model"], "vocab": vocab, "merges": [*mine["model"]["merges"], *merges]}}


def check_alike(mine: Any, theirs: Any) -> None:
    """Two tokenizers whose pieces are spelt alike."""
    for whose, t in (("the model's tokenizer", mine), ("the new one", theirs)):
        if t["model"].get("type") != "BPE":
            raise ValueError(
                f"only BPE is merged with BPE, and {whose} is {t['model'].get('type')}: give tokens instead"
            )
    for part in ("normalizer", "decoder"):
        ours, other = kinds(mine[part]), kinds(theirs[part])
        if ours != other:
            raise ValueError(
                f"the new tokenizer spells its pieces otherwise: its {part} is {other}, the model's {ours}"
            )


def kinds(part: Any) -> str:
    """What a normaliser or decoder consists of."""
    steps = (part or {}).get("normalizers") or (part or {}).get("decoders") or [part]
    return ", ".join(step["type"] for step in steps if step) or "none"


# ── tokens that a model knows by their ids ───────────────────────────────────────────────────────────────────────────


def ends(folder: Path) -> list[int]:
    """The ids with which a text ends."""
    return ids(folder, "eos_token_id", several=True)


def ids(folder: Path, name: str, several: bool = False) -> list[int]:
    """What generation_config.json, else config.json, says of an id, or of several."""
    for file in ("generation_config.json", "config.json"):
        found = read_json(folder / file).get(name) if (folder / file).is_file() else None
        if isinstance(found, int):
            return [found]
        if several and isinstance(found, list) and all(isinstance(i, int) for i in found):
            return found
        if found is not None:
            wanted = "an integer or a list of them" if several else "an integer"
            raise ValueError(f"{folder / file}: {name} must be {wanted}, found {show(found)}")
    return []
