"""Objectives: from rows of token ids to a batch, and from a model's output to a loss and its gradient.

    objective = objectives.make("masked", Setting(mask_id=4, vocab=30522))
    batch = objective.batch(rows, rng)                 # arrays, named and laid out as HF's data collators do
    logits, vjp = model(batch["input_ids"], adapter, attention_mask=batch["attention_mask"])
    loss, dlogits, n = objective.loss(logits, batch)   # n: of how many terms the loss is the mean

A row holds `input_ids` (for a template `fields`, ids by name), and where there is something to answer, `labels` (the
target's ids) or `label` (a class, or a number). A batch is padded on the right; labels are −100 where nothing is
predicted, and not yet shifted. All that is random comes from `rng`. Whoever writes an objective of their own writes
such a pair of functions; a third gives the scores of the labels, where each row has one.

    causal                    L = −mean log p(xₜ | x<t)                       Radford et al. 2018, eq. (1)
    masked                    L = −mean over t in M of log p(xₜ | x̃)          Devlin et al. 2019, arXiv 1810.04805, §3.1
    seq2seq                   L = −mean log p(yₜ | x, y<t)                    Raffel et al. 2020, arXiv 1910.10683, §2.1
    span-corruption           seq2seq: x with spans cut out → the spans       Raffel et al. 2020, §3.1.4
    span-corruption-sentinel  seq2seq: x → sentinel, y                        Lester et al. 2021, arXiv 2104.08691, §3.2
    lm-adaptation             seq2seq: x≤s → x>s, s uniform                   Raffel et al. 2020, §3.2.3; Lester §3.2
    classification            L = −mean log p(c | x), or mean (f(x) − c)² for a number
    template                  L = −mean log p(c | T(x)), p over the labels' words where T(x) has its [MASK]
                                                                              Liu et al. 2021, arXiv 2103.10385, §3

In a decoder-only model x → y means x followed by y, with labels on y alone.

Claims:
    J1  The loss and its gradient are those of HF's model classes given the same labels.
    J2  Padding changes neither: a row's terms are those it has alone.
    J3  Nothing is lost by span corruption: input and target together give the text back.
    J4  The noise masks of one length all have as many noise tokens and spans, and all such masks are equally likely.
    J5  Where every word of the vocabulary is the word of a label of its own, `template` is `masked`, or in a model that
        reads from left to right `causal`, with only the [MASK] to predict.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refpeft import templates
from refpeft.inputs import shift_right
from refpeft.ops import Array, Op, cross_entropy, mse

Ids = Sequence[int]
Row = Mapping[str, Any]
Batch = dict[str, Array]
Loss = tuple[Array, Array, Any]
IGNORE = -100
NAMES = (
    "causal", "masked", "seq2seq", "span-corruption", "span-corruption-sentinel", "lm-adaptation", "classification",
    "template",
)  # fmt: skip
NEEDS_TARGET = ("seq2seq", "span-corruption-sentinel")


@dataclass(frozen=True)
class Setting:
    """What an objective must know of a vocabulary, and its numbers. Sentinels count down from `sentinel_id`."""

    pad_id: int = 0
    eos_id: int | None = None
    mask_id: int | None = None
    start_id: int | None = None
    sentinel_id: int | None = None
    vocab: int | None = None
    special_ids: Sequence[int] = ()
    encoder_decoder: bool = False
    mask_probability: float = 0.15
    noise_density: float = 0.15
    mean_span: float = 3.0
    final_sentinel: bool = True
    question: templates.Question | None = None

    def __post_init__(self) -> None:
        for name in ("mask_probability", "noise_density"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, found {getattr(self, name)!r}")
        if self.mean_span < 1:
            raise ValueError(f"mean_span must be at least 1, found {self.mean_span!r}")


class Objective(NamedTuple):
    batch: Callable[[Sequence[Row], np.random.Generator], Batch]
    loss: Callable[[Array, Batch], Loss]
    scores: Callable[[Array, Batch], Array] | None = None  # [b, labels], where there is one label for each row


def make(name: str, s: Setting) -> Objective:
    """The objective of this name; what it needs and the setting lacks is an error."""
    if name not in NAMES:
        raise ValueError(f"unknown objective {name!r}: there are {', '.join(NAMES)}")
    for field in needed(name, s):
        if getattr(s, field) is None:
            raise ValueError(f"objective {name!r} needs {field}, which is not set")
    loss = loss_of(name, s.encoder_decoder)
    if name == "classification":
        return Objective(lambda rows, rng: classes(rows, s), loss, lambda out, batch: out)
    if name == "template":
        q = s.question
        assert q is not None
        return Objective(
            lambda rows, rng: asked(rows, q, s.pad_id),
            lambda out, batch: answer_loss(out, batch, q),
            lambda out, batch: answered(out, batch, q)[0],
        )
    if name == "masked":
        return Objective(lambda rows, rng: masked(rows, rng, s), loss)
    return Objective(lambda rows, rng: pairs([pair(name, row, rng, s) for row in rows], s), loss)


def loss_of(name: str, encoder_decoder: bool) -> Callable[[Array, Batch], Loss]:
    if name == "classification":
        return class_loss
    return token_loss if name == "masked" or encoder_decoder else next_token_loss


def pair(name: str, row: Row, rng: np.random.Generator, s: Setting) -> tuple[Ids, Ids | None]:
    """x and y of a row; no y where all of x is to be predicted."""
    ids = row["input_ids"]
    if name == "span-corruption":
        return span_corruption(ids, rng, s)
    if name == "lm-adaptation":
        return lm_adaptation(ids, rng, s)
    if name == "span-corruption-sentinel":
        return ids, [s.sentinel_id, *row["labels"]]
    return ids, row.get("labels")


def needed(name: str, s: Setting) -> list[str]:
    if name == "template":
        return ["question"]
    fields = ["mask_id", "vocab"] if name == "masked" else ["sentinel_id"] if name.startswith("span") else []
    return fields + ["start_id"] * (s.encoder_decoder and name not in ("masked", "classification"))


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def padded(rows: Sequence[Ids], value: int) -> Array:
    """[b, s]: every row as long as the longest."""
    s = max(map(len, rows))
    return np.array([[*row, *[value] * (s - len(row))] for row in rows], np.int64)


def inputs(rows: Sequence[Ids], pad_id: int) -> Batch:
    return {"input_ids": padded(rows, pad_id), "attention_mask": padded([[1] * len(row) for row in rows], 0)}


def pairs(rows: Sequence[tuple[Ids, Ids | None]], s: Setting) -> Batch:
    """x → y, as the kind of model wants it; without y, all of x is predicted."""
    if s.encoder_decoder:
        return seq2seq([x for x, _ in rows], [y or () for _, y in rows], s)
    return causal([x for x, _ in rows], [y for _, y in rows], s)


def causal(xs: Sequence[Ids], ys: Sequence[Ids | None], s: Setting) -> Batch:
    """Text, labels its own ids; or x followed by y, with labels on y.     transformers: DataCollatorForLanguageModeling

    Where implementations differ: transformers takes the label away wherever the id is that of padding, hence from the
    end of text too if they share an id; here only padding is padding.
    """
    rows = [([*x, *(y or ())], 0 if y is None else len(x)) for x, y in zip(xs, ys, strict=True)]
    labels = padded([[IGNORE] * n + ids[n:] for ids, n in rows], IGNORE)
    return inputs([ids for ids, _ in rows], s.pad_id) | {"labels": labels}


def seq2seq(xs: Sequence[Ids], ys: Sequence[Ids], s: Setting) -> Batch:
    """x to the encoder, y shifted to the right to the decoder.     HF: DataCollatorForSeq2Seq, _shift_right"""
    assert s.start_id is not None
    labels = padded(ys, IGNORE)
    shifted = shift_right(labels, s.start_id, s.pad_id, IGNORE)
    return inputs(xs, s.pad_id) | {"labels": labels, "decoder_input_ids": shifted}


def classes(rows: Sequence[Row], s: Setting) -> Batch:
    """One label for each row."""
    return inputs([row["input_ids"] for row in rows], s.pad_id) | {"labels": np.array([row["label"] for row in rows])}


def asked(rows: Sequence[Row], q: templates.Question, pad_id: int) -> Batch:
    """The template filled, where its [MASK] is, and the label of each row."""
    ids, keep, at = templates.posed(q, [row["fields"] for row in rows], pad_id)
    return {"input_ids": ids, "attention_mask": keep, "at": at, "labels": np.array([row["label"] for row in rows])}


# ── masked language models ───────────────────────────────────────────────────────────────────────────────────────────


class Draws(NamedTuple):
    """What chance decides, all [b, s]: M, the places to predict; of those, where [MASK] stands, where another word."""

    chosen: Array
    masked: Array
    random: Array
    words: Array


def draw(rng: np.random.Generator, maskable: Array, vocab: int, p: float = 0.15) -> Draws:
    """M with probability p each; in M 80 % [MASK], 10 % a random word, 10 % as it was.      arXiv 1810.04805, §3.1

    Drawn in the order in which transformers' DataCollatorForLanguageModeling draws, so one seed gives one batch.
    """
    chosen = rng.binomial(1, np.where(maskable, p, 0.0)) == 1
    masked_ = (rng.binomial(1, 0.8, maskable.shape) == 1) & chosen
    half = 0.1 / (1 - 0.8)  # not 0.5 to the last bit, and NumPy draws otherwise above 0.5
    random = (rng.binomial(1, half, maskable.shape) == 1) & chosen & ~masked_
    words = np.zeros(maskable.shape, np.int64)
    words[random] = rng.integers(0, vocab, int(random.sum()))
    return Draws(chosen, masked_, random, words)


def mask_tokens(ids: Array, draws: Draws, mask_id: int) -> tuple[Array, Array]:
    """x̃ and the labels: x where chosen, −100 elsewhere."""
    corrupted = np.where(draws.masked, mask_id, np.where(draws.random, draws.words, ids))
    return corrupted, np.where(draws.chosen, ids, IGNORE)


def masked(rows: Sequence[Row], rng: np.random.Generator, s: Setting) -> Batch:
    assert s.vocab is not None
    assert s.mask_id is not None
    batch = inputs([row["input_ids"] for row in rows], s.pad_id)
    ids = batch["input_ids"]
    maskable = (batch["attention_mask"] == 1) & ~np.isin(ids, list(s.special_ids))
    corrupted, labels = mask_tokens(ids, draw(rng, maskable, s.vocab, s.mask_probability), s.mask_id)
    return batch | {"input_ids": corrupted, "labels": labels}


# ── span corruption ──────────────────────────────────────────────────────────────────────────────────────────────────


def noise_mask(rng: np.random.Generator, length: int, density: float = 0.15, mean_span: float = 3.0) -> Array:
    """Which of `length` tokens are noise.      t5.data.preprocessors.random_spans_noise_mask

    Noise tokens n = round(length · density), in [1, length − 1]; spans k = round(n/mean_span), at least 1. Both the n
    noise tokens and the length − n others are cut into k pieces at random places; the pieces alternate, noise second.
    Where implementations differ: k may exceed length − n with a high density, where T5's code fails; here k is bounded
    by it (transformers' example script divides min(n, length − n) by mean_span).
    """
    size = max(length, 2)
    n = min(max(round(size * density), 1), size - 1)
    k = min(max(round(n / mean_span), 1), size - n)
    spans = np.stack([pieces(rng, size - n, k), pieces(rng, n, k)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * k) % 2 == 1, spans)[:length]


def pieces(rng: np.random.Generator, items: int, k: int) -> Array:
    """The lengths of k non-empty pieces of `items`, every way of cutting equally likely."""
    cuts = np.sort(rng.permutation(items - 1)[: k - 1]) + 1
    return np.diff([0, *cuts, items])


def corrupt(ids: Ids, noise: Array, sentinel_id: int, final: bool = True) -> tuple[list[int], list[int]]:
    """The text with the k-th span of noise replaced by the k-th sentinel; and each sentinel followed by its span.

    Where implementations differ: the paper ends the target with one more sentinel (`final`); T5's own code with its
    masks, which end in noise, does not.
    """
    x: list[int] = []
    y: list[int] = []
    spans = 0
    for at, (token, hidden) in enumerate(zip(ids, noise.tolist(), strict=True)):
        if hidden and (at == 0 or not noise[at - 1]):
            x.append(sentinel_id - spans)
            y.append(sentinel_id - spans)
            spans += 1
        (y if hidden else x).append(int(token))
    return x, [*y, sentinel_id - spans] if final else y


def span_corruption(ids: Ids, rng: np.random.Generator, s: Setting) -> tuple[Ids, Ids]:
    """Input and target, the end of text after both.      Raffel et al. 2020, §3.1.4 and figure 2"""
    assert s.sentinel_id is not None
    noise = noise_mask(rng, len(ids), s.noise_density, s.mean_span)
    x, y = corrupt(ids, noise, s.sentinel_id, s.final_sentinel)
    return ended(x, s), ended(y, s)


def lm_adaptation(ids: Ids, rng: np.random.Generator, s: Setting) -> tuple[Ids, Ids]:
    """The first m tokens → the rest, m uniform in [1, length − 1].      t5.data.preprocessors.random_prefix_noise_mask

    "Given a natural text prefix as input, the model must produce the natural text continuation" (Lester et al., §3.2).
    """
    m = int(rng.integers(min(1, len(ids) - 1), len(ids)))
    return ended(ids[:m], s), ended(ids[m:], s) if s.encoder_decoder else ids[m:]


def ended(ids: Ids, s: Setting) -> Ids:
    return [*ids, s.eos_id] if s.eos_id is not None and s.encoder_decoder else ids


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def aligned(out: Array, labels: Array) -> Array:
    """Virtual tokens of a prompt stand first and have nothing to predict."""
    b, s = labels.shape
    if out.shape[1] == s:
        return labels
    nothing = np.broadcast_to(np.full_like(labels[:, :1], IGNORE), (b, out.shape[1] - s))
    return np.concatenate([nothing, labels], axis=1)


def token_loss(out: Array, batch: Batch) -> Loss:
    """L = −mean log p_t(label_t), and dL/dlogits.      logits [b, s, v]"""
    return mean_of(cross_entropy, out, aligned(out, batch["labels"]))


def next_token_loss(out: Array, batch: Batch) -> Loss:
    """L = −mean log p_t(label_{t+1}), and dL/dlogits."""
    labels = aligned(out, batch["labels"])
    shifted = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORE)], axis=1)
    return mean_of(cross_entropy, out, shifted)


def class_loss(out: Array, batch: Batch) -> Loss:
    """Cross entropy of logits [b, labels]; with one output, the squared distance to a number."""
    labels = batch["labels"]
    if out.shape[-1] == 1:
        return mean_of(mse, out, labels.astype(out.dtype)[:, None])
    return mean_of(cross_entropy, out, labels)


def answered(out: Array, batch: Batch, q: templates.Question) -> tuple[Array, Callable[[Array], Array]]:
    """y [b, labels], and from dy to dlogits [b, s, v]. Virtual tokens put before the text move the [MASK]."""
    return templates.answers(out, batch["at"] + out.shape[1] - batch["input_ids"].shape[1], q.words, q.first)


def answer_loss(out: Array, batch: Batch, q: templates.Question) -> Loss:
    """L = −mean log softmax(y)_c,   y the scores of the labels by their words at the [MASK].      logits [b, s, v]"""
    y, back = answered(out, batch, q)
    L, dy, n = mean_of(cross_entropy, y, batch["labels"])
    return L, back(dy), n


def mean_of(op: Op, out: Array, labels: Array) -> Loss:
    """The loss, its gradient, and how many terms it is the mean of: their weight beside others (`optim.accumulate`)."""
    L, vjp = op(out, labels)
    dout = vjp(np.ones_like(L))[0]
    assert dout is not None
    return L, dout(), (labels != IGNORE).sum() if op is cross_entropy else labels.shape[0]
