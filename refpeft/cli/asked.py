"""What a command line asks of training, as what the specification takes: objective, vocabulary, method, how to read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from refpeft.templates import Question, compiled, virtual_tokens

if TYPE_CHECKING:
    from refpeft.cli.data import Encode, Reading
    from refpeft.model import Model
    from refpeft.objectives import Setting


class Task(NamedTuple):
    """The objective with its setting, how to read the data, and the config of the method."""

    objective: str
    setting: "Setting"
    reading: "Reading"
    config: Mapping[str, Any]


def task(
    folder: Path, model: "Model", objective: str | None, own: Sequence[str], template: str | None,
    answers: Sequence[str], longest: int | None, fields: tuple[str, Sequence[str]],
) -> Task:  # fmt: skip
    chosen = suitable(objective, model)
    words, setting = vocabulary(folder, model)
    setting = replace(setting, **numbers(own))
    labels, virtual = list[str](), 0
    if chosen == "template":
        asked, labels = question(template, answers, model, words)
        virtual = virtual_tokens(asked.template, model.sizes()[0] or 0)
        setting = replace(setting, question=asked)
    elif template or answers:
        raise ValueError(f"--template and --words are of objective 'template', found {chosen!r}")
    reading = to_read(chosen, model, setting, longest, words.encode, labels)
    if setting.question:
        setting = replace(setting, question=setting.question._replace(max_length=reading.longest))
    method, given = fields
    return Task(chosen, setting, reading, method_fields(method, given, chosen, model, virtual))


def suitable(objective: str | None, model: "Model") -> str:
    """The objective, which must fit what the model's head says; without one, the head's own."""
    from refpeft import objectives
    from refpeft.train import fitting

    kind = (model.source.get("architectures") or [model.config.family])[0]
    if "head.out" not in model.sites:
        raise ValueError(f"{kind} has no head to train with: expected a language model or a classifier")
    fit = fitting(model)
    if objective is not None and objective not in fit:
        if objective not in objectives.NAMES:
            raise ValueError(f"unknown objective {objective!r}: there are {', '.join(objectives.NAMES)}")
        raise ValueError(f"objective {objective!r} does not fit {kind}: expected {' or '.join(fit)}")
    return objective or fit[0]


@dataclass(frozen=True)
class Words:
    """The tokenizer of a model's folder: text → ids, and the ids of special tokens by the names that templates use."""

    encode: "Encode | None" = None
    special: Mapping[str, int] = field(default_factory=dict)


NAMED = {"<mask>": "MASK", "<s>": "CLS", "</s>": "SEP", "<pad>": "PAD", "<unk>": "UNK", "<|endoftext|>": "EOS"}


def vocabulary(folder: Path, model: "Model") -> "tuple[Words, Setting]":
    """The tokenizer, if there is one, and what it and config.json say of special tokens."""
    from refpeft.objectives import Setting

    c, ends = model.config, model.source.get("eos_token_id")
    known: dict[str, Any] = {
        "pad_id": c.pad_token_id if c.encoder_decoder else model.source.get("pad_token_id"),
        "eos_id": c.eos_token_id if c.encoder_decoder else ends[0] if isinstance(ends, list) and ends else ends,
        "start_id": c.decoder_start_token_id, "vocab": model.sizes()[0], "encoder_decoder": c.encoder_decoder,
    }  # fmt: skip
    words = Words()
    if (folder / "tokenizer.json").is_file():
        from refpeft.checkpoint.prompts import tokenizer

        t = tokenizer(folder)
        special = {n: token.content for n, token in sorted(t.get_added_tokens_decoder().items()) if token.special}
        known |= {"special_ids": list(special), "vocab": min(t.get_vocab_size(), known["vocab"] or t.get_vocab_size())}
        known["mask_id"] = next((n for n in map(t.token_to_id, ("[MASK]", "<mask>")) if n is not None), None)
        known["sentinel_id"] = t.token_to_id("<extra_id_0>")

        def encode(text: str, special: bool) -> list[int]:
            return list(t.encode(text, add_special_tokens=special).ids)

        words = Words(encode, {NAMED.get(text, text.strip("[]")): n for n, text in special.items()})
    valid = {n: v for n, v in known.items() if v is not None and (n != "pad_id" or v >= 0)}
    return words, Setting(**valid)


def numbers(words: Sequence[str]) -> dict[str, Any]:
    """--objective-set NAME=VALUE …"""
    from refpeft import tune
    from refpeft.objectives import Setting

    hints = {f.name: f.type for f in fields(Setting) if f.name not in ("encoder_decoder", "question")}
    found: dict[str, Any] = {}
    for word in words:
        name, value = assigned("--objective-set", word)
        if name not in hints:
            raise ValueError(f"--objective-set: there is no {name!r}, but {', '.join(hints)}")
        if not tune.fits(value, hints[name]):
            raise ValueError(f"--objective-set {name}: expected {tune.readable(hints[name])}, found {value!r}")
        found[name] = value
    return found


def assigned(flag: str, word: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as JSON where it is JSON (in Python's spelling too), else as it stands."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise ValueError(f"{flag}: expected FIELD=VALUE, found {word!r}")
    constants = {"True": True, "False": False, "None": None}
    try:
        return name, constants[text] if text in constants else json.loads(text)
    except ValueError:
        return name, text


def method_fields(
    method: str, words: Sequence[str], objective: str, model: "Model", virtual: int = 0
) -> dict[str, Any]:  # fmt: skip
    """--set FIELD=VALUE …: 'q,v' is a list where the field takes one, and so is a single plain name. `virtual`: the
    tokens of a template that are to be learned."""
    import typing

    from refpeft import tune
    from refpeft.methods import METHODS

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: there are {', '.join(METHODS)}")
    hints = typing.get_type_hints(METHODS[method].Config)
    found: dict[str, Any] = {}
    for word in words:
        name, value = assigned("--set", word)
        names = value.split(",") if isinstance(value, str) else []
        plain = value != "all-linear" and all(n.replace(".", "_").isidentifier() for n in names)
        if names and plain and name in hints and tune.fits(names, hints[name]):
            value = names
        found[name] = value
    heads = [
        n
        for n in ("classifier", "score", "classification_head")
        if any(n in s.path.split(".") for s in model.sites.values())
    ]
    if objective == "classification" and "modules_to_save" in hints:  # the head is fresh as a rule
        found = {"modules_to_save": heads} | found
    if not virtual:
        return found
    if "placement" not in hints:
        raise ValueError(
            f"--template has virtual tokens, which {method} does not learn, but p_tuning and prompt_tuning"
        )
    fixed = {"placement": "template", "num_virtual_tokens": virtual}
    for name, value in fixed.items():
        if found.get(name, value) != value:
            raise ValueError(f"--set {name}: the template says {value!r}, found {found[name]!r}")
    return fixed | found


def question(template: str | None, answers: Sequence[str], model: "Model", words: Words) -> tuple[Question, list[str]]:
    """--template and --words LABEL=WORD,WORD …: what is asked, and the names of the labels.

    A model that reads from left to right is asked at the end, so there the [MASK] is left away."""
    if template is None or len(answers) < 2:
        raise ValueError("objective 'template' needs --template, and --words LABEL=WORD for two labels or more")
    if words.encode is None:
        raise ValueError("objective 'template' needs a tokenizer.json in the model's folder")
    encode = words.encode
    v = model.sizes()[0] or 0
    special, mask = words.special, words.special.get("MASK")
    if model.config.causal:
        mask, special = None, {**special, "MASK": -1}
    made = list(compiled(template, lambda text: encode(text, False), v, special))
    place = -1 if mask is None else mask
    if made.count(place) != 1 or (mask is None and made[-1] != place):
        where = "one [MASK], at its end," if mask is None else "one [MASK]"
        raise ValueError(f"--template must have {where} found {template!r}")
    if mask is None:
        made.pop()
    labels: dict[str, list[int]] = {}
    for text in answers:
        name, equals, rest = text.partition("=")
        if not equals or name in labels:
            raise ValueError(f"--words: expected LABEL=WORD,WORD, each label once, found {text!r}")
        labels[name] = [one_token(word, encode) for word in rest.split(",")]
    return Question(tuple(made), tuple(map(tuple, labels.values())), mask), list(labels)


def one_token(word: str, encode: "Encode") -> int:
    ids = encode(word, False)
    if len(ids) != 1:
        raise ValueError(f"--words: {word!r} must be one token of the vocabulary, found {len(ids)}: {ids}")
    return ids[0]


def to_read(
    objective: str, model: "Model", setting: "Setting", longest: int | None, encode: "Encode | None",
    labels: Sequence[str] = (),
) -> "Reading":  # fmt: skip
    from refpeft.cli.data import Reading

    c = model.config
    vocab, positions, _ = model.sizes("encoder." if c.encoder_decoder else "")
    if positions is not None:
        positions -= c.position_offset if c.positions == "index" else (c.pad_token_id or 0) + 1
        if longest is not None and longest > positions:
            raise ValueError(f"--max-length must be at most {positions}, the model's positions, found {longest}")
        longest = longest or positions
    classes: Mapping[str, int] | int | None = classes_of(model) if objective == "classification" else None
    if objective == "template":
        classes = {name: n for n, name in enumerate(labels)}
    asked = setting.question.template if setting.question else ()
    return Reading(objective, vocab or 0, classes, setting.eos_id, longest, setting.encoder_decoder, encode, asked)


def classes_of(model: "Model") -> Mapping[str, int] | int | None:
    """The classes by name, or how many there are; None where one number is predicted."""
    site = model.sites["head.out"]
    count = model.params[site.weight].shape[0]
    names = model.source.get("label2id")
    whole = isinstance(names, dict) and sorted(map(str, names.values())) == sorted(map(str, range(count)))
    return None if count == 1 else {n: int(v) for n, v in names.items()} if whole and names else count
