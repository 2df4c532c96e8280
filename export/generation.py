"""Writing with a graph that decodes: greedy or sampled, several rows at once, token by token.

    writer = open_writer("exported")
    for tokens in write(writer, [[3, 1, 4], [1, 5]], Options(max_new_tokens=20)):
        …                                           # of each row its next token, None where it has ended

A row draws its numbers from `seed` and its own number, so it does not depend on its neighbours. An encoder-decoder
reads the prompts and writes texts of its own (`refpeft.export.steps`), with the ids of generation_config.json, or else
of config.json: decoder_start_token_id before all, forced_bos_token_id as the first token, forced_eos_token_id as the
one that max_new_tokens makes the last.

    p = softmax(logits/temperature);   top_k: the k likeliest;   then top_p: the fewest of these, likeliest first, whose
    probabilities add up to at least top_p;   of what is left one is drawn. Temperature 0: the likeliest.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.checkpoint import tokens
from refpeft.checkpoint.families import Plan, plan
from refpeft.checkpoint.safetensors import read_json
from refpeft.export import adapters as files
from refpeft.export import runtime, steps
from refpeft.export.card import needed, read_card
from refpeft.export.forms.inputs import FILE
from refpeft.export.forms.multi import IDS
from refpeft.export.runtime import Runner

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Options:
    """As in transformers' GenerationConfig; temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")


@dataclass(frozen=True)
class Writer:
    """A graph that decodes, with its adapter. `front`: the ids of a soft prompt that stands before the text; with
    `template` it stands among the ids that are given. `past`: of a prefix, one row. `start`: of an encoder-decoder, the
    token before the first; `forced`: the first token and the last, where they are given."""

    runner: Runner
    plan: Plan
    stop: Sequence[int] = ()
    front: Sequence[int] = ()
    past: Mapping[str, Array] = field(default_factory=dict, repr=False)
    shift: int = 0
    template: bool = False
    start: int | None = None
    forced: tuple[int | None, int | None] = (None, None)

    @property
    def vocabulary(self) -> int:
        return int(self.plan.shapes[self.plan.sites["embed.token"].weight][0])

    def room(self, stack: str = "") -> int | None:
        """How many positions there are, if they are learned."""
        site = self.plan.sites.get(stack + "embed.position")
        return None if site is None else int(self.plan.shapes[site.weight][0]) - self.plan.config.position_offset


def open_writer(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    bare: bool = False,
    device: str | None = None,
    adapter_ids: Sequence[int] | None = None,
) -> Writer:
    """A folder that `refpeft export --decode` made. `adapter`: a file in place of the folder's own; `bare`: none;
    `adapter_ids`: of the form multi, which adapter each row has."""
    folder = Path(folder)
    card = read_card(folder)
    if not card["decode"]:
        raise ValueError(f"{folder}: its graph does not decode: export it with --decode")
    runner = runtime.open_folder(folder, device)
    writer = begun(Writer(runner, plan(read_json(folder / "config.json")), tokens.ends(folder)), folder)
    if card["form"] == "multi":
        which = np.asarray([] if adapter_ids is None else adapter_ids, np.int64)
        if not which.size or which.min() < -1 or which.max() >= len(card["adapters"]):
            raise ValueError(
                f"this graph has {len(card['adapters'])} adapters: adapter_ids must say which one each row has, "
                f"from -1 to {len(card['adapters']) - 1}, found {adapter_ids}"
            )
        return replace(writer, runner=runner.feeding({IDS: which}))
    if adapter_ids is not None:
        raise ValueError(f"{folder}: its form is {card['form']}, which has no adapter_ids")
    file = folder / FILE if adapter is None else Path(adapter)
    if bare or not (adapter is not None or file.is_file()):
        return writer
    if card["form"] == "prefix":
        (facts,) = needed(folder, card, "facts")
        return prefixed(writer, file, all(isinstance(fact, dict) and fact.get("position_shift") for fact in facts))
    loaded = runner.load(file)
    writer = replace(writer, runner=runner.using(loaded))
    if card["form"] != "prompt":
        return writer
    name, facts = needed(folder, card, "prompt", "facts")
    if any(isinstance(fact, dict) and fact.get("placement") == "template" for fact in facts):
        return replace(writer, template=True)
    rows = files.read(file, runner.base).get(name, np.zeros((0, 0)))
    return replace(writer, front=range(writer.vocabulary, writer.vocabulary + len(rows)))


def prefixed(writer: Writer, file: Path, moved: bool) -> Writer:
    """With the prefix of a file: what is a past, and of an encoder-decoder what its graphs take besides."""
    runner, given = writer.runner, files.read(file, writer.runner.base)
    past = {i.name: i for i in runner.session.get_inputs() if i.name.startswith(steps.PAST)}
    if runner.encoder is not None and not moved:  # then the decoder's own is no past
        past = {name: i for name, i in past.items() if ".decoder." not in name}
    besides = {i.name: i for i in runner.session.get_overridable_initializers()}
    wanted = {**past, **besides}
    if wanted.keys() != given.keys():
        raise ValueError(f"{file}: it must hold {', '.join(wanted)}, found {', '.join(given)}")
    for name, a in given.items():
        runtime.fits(file, name, a, wanted[name])
    first = {name: given[name] for name in past}
    n = next(iter(first.values())).shape[2] if moved else 0
    return replace(writer, runner=runner.feeding({name: given[name] for name in besides}), past=first, shift=n)


def begun(writer: Writer, folder: Path) -> Writer:
    """How an encoder-decoder begins, and ends."""
    if writer.runner.encoder is None:
        return writer
    names = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
    start, bos, eos = ([*tokens.ids(folder, name), None][0] for name in names)
    start = writer.plan.config.decoder_start_token_id if start is None else start
    if start is None:
        raise ValueError(f"{folder / 'config.json'}: decoder_start_token_id is missing, with which a text begins")
    return replace(writer, start=start, forced=(bos, eos))


# ── step by step ─────────────────────────────────────────────────────────────────────────────────────────────────────


def write(writer: Writer, prompts: Sequence[Sequence[int]], options: Options) -> Iterator[list[int | None]]:
    """Of each row its next token, as long as one goes on; the token that ends a row is its last."""
    rows = [[*writer.front, *ids] for ids in prompts]
    check_prompts(writer, prompts)
    count, step = min(options.max_new_tokens, left(writer, rows)), stepping(writer, rows)
    draws = [np.random.default_rng([options.seed, k]) for k in range(len(rows))]
    stop, ended = {*writer.stop, *options.stop}, np.zeros(len(rows), bool)
    chosen: Array | None = None
    for n in range(count):
        chosen = pick(step(chosen), options, draws)
        if (forced := at(writer, n, options)) is not None:
            chosen = np.full_like(chosen, forced)
        yield [None if done else int(t) for t, done in zip(chosen, ended, strict=True)]
        ended = ended | np.isin(chosen, list(stop))
        if ended.all():
            return


def stepping(writer: Writer, rows: Sequence[Sequence[int]]) -> steps.Step:
    if writer.start is None:
        return steps.alone(writer.runner, rows, writer.past, writer.shift)
    return steps.across(writer.runner, rows, writer.plan.config, writer.start, writer.past)


def at(writer: Writer, n: int, options: Options) -> int | None:
    """The token that must be the n-th."""
    first, last = writer.forced
    return last if n == options.max_new_tokens - 1 and last is not None else first if n == 0 else None


def check_prompts(writer: Writer, prompts: Sequence[Sequence[int]]) -> None:
    ids = writer.runner.fixed.get(IDS)
    if ids is not None and len(ids) != len(prompts):
        raise ValueError(f"adapter_ids must be given for each of {len(prompts)} prompts, found {len(ids)}")
    if not prompts or any(not ids and not writer.front for ids in prompts):
        raise ValueError("there is nothing to go on from: a prompt must have at least one token")
    top = max((max(ids, default=0) for ids in prompts), default=0)
    if top >= writer.vocabulary and not writer.template:
        raise ValueError(
            f"a prompt has the token {top}, and the model {writer.vocabulary} tokens: wrong tokenizer.json?"
        )


def left(writer: Writer, rows: Sequence[Sequence[int]]) -> int:
    """How many tokens there is room for."""
    longest = max(map(len, rows)) + writer.shift
    apart = writer.start is not None
    room = writer.room("encoder." if apart else "")
    if room is None:
        return 1 << 30
    if longest > room:
        raise ValueError(f"a prompt of {longest} positions does not fit the model, which has {room}")
    return (writer.room("decoder.") or 0) - writer.shift if apart else room - longest + 1


# ── which token ──────────────────────────────────────────────────────────────────────────────────────────────────────


def pick(logits: Array, options: Options, draws: Sequence[np.random.Generator]) -> Array:
    """[b, v] → [b]"""
    if options.temperature == 0:
        return np.asarray(logits.argmax(-1))
    p = probabilities(logits, options)
    u = np.array([draw.random() for draw in draws])[:, None]
    below = (p.cumsum(-1) / p.sum(-1, keepdims=True) <= u).sum(-1)
    last = p.shape[-1] - 1 - (p[:, ::-1] > 0).argmax(-1)  # rounding must not lead past the last that is possible
    return np.asarray(np.minimum(below, last))


def probabilities(logits: Array, options: Options) -> Array:
    """What is left after temperature, top_k and top_p, in this order; the rest is 0.      [b, v]"""
    z = logits / options.temperature
    if options.top_k is not None and options.top_k < z.shape[-1]:
        z = np.where(z < np.partition(z, -options.top_k)[:, -options.top_k, None], -np.inf, z)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if options.top_p is not None and options.top_p < 1:
        order = np.argsort(-p, axis=-1, kind="stable")
        sorted_p = np.take_along_axis(p, order, -1)
        before = sorted_p.cumsum(-1) - sorted_p  # of all that are likelier
        kept = np.zeros_like(p, bool)
        np.put_along_axis(kept, order, before < options.top_p, -1)
        p = np.where(kept, p, 0)
    return np.asarray(p / p.sum(-1, keepdims=True))
