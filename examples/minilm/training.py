"""Fine-tuning a sentence encoder in NumPy: does a short message praise, complain or ask?

    x = encoder(ids)                                [b, s, d], every token's vector; an adapter may change the encoder
    p = Σ_t mask_t x_t / Σ_t mask_t                 [b, d], the sentence: the mean over the tokens that are not padding
    L = cross_entropy(p Hᵀ + c, label)              H [labels, d], c [labels]: a linear head

Backwards:   dp = dlogits H,   dx_t = mask_t dp / Σ mask,   and from dx on `vjp` gives the adapter's gradients.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import refpeft
from refpeft.ops import cross_entropy, linear

Array = np.ndarray[Any, Any]
Named = dict[str, Array]
TONES = ("praise", "complaint", "question")
SENTENCES = Path(__file__).with_name("sentences.jsonl")


def sentences(split: str) -> tuple[list[str], Array]:
    """Texts and labels [n] of a split. The topics of the test split (museum, parcel, …) do not occur in training."""
    rows = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["split"] == split]
    return [row["text"] for row in chosen], np.array([TONES.index(row["tone"]) for row in chosen])


def tokenizer(folder: str | Path) -> Tokenizer:
    t = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    t.no_truncation()
    t.enable_padding()  # to the longest of a batch
    return t


def encode(t: Tokenizer, texts: list[str]) -> tuple[Array, Array]:
    """Token ids and attention mask, both [b, s]."""
    rows = t.encode_batch(texts)
    return np.array([row.ids for row in rows]), np.array([row.attention_mask for row in rows])


def mean_pool(x: Array, mask: Array) -> tuple[Array, Callable[[Array], Array]]:
    """p = Σ_t w_t x_t,   w = mask / Σ mask      x [b, s, d] → p [b, d];      dx_t = w_t dp."""
    w = (mask / mask.sum(1, keepdims=True)).astype(x.dtype)[:, :, None]
    return (w * x).sum(1), lambda dp: w * dp[:, None, :]


def embed(model: refpeft.Model, t: Tokenizer, texts: list[str], adapter: refpeft.Adapter | None = None) -> Array:
    """Sentence vectors [n, d], normalised to length 1."""
    ids, mask = encode(t, texts)
    p, _ = mean_pool(model(ids, adapter, attention_mask=mask)[0], mask)
    return unit(p)


def unit(p: Array) -> Array:
    """Every row at length 1."""
    e: Array = p / np.linalg.norm(p, axis=1, keepdims=True)
    return e


def step(
    model: refpeft.Model, adapter: refpeft.Adapter, head: Named, ids: Array, mask: Array, labels: Array
) -> tuple[float, Named, Named]:
    """The loss, and its gradients with respect to the adapter and the head."""
    x, vjp = model(ids, adapter, attention_mask=mask)
    p, vjp_pool = mean_pool(x, mask)
    logits, vjp_head = linear(p, head["H"], head["c"])
    L, vjp_loss = cross_entropy(logits, labels)
    dlogits = called(vjp_loss(np.ones_like(L)))[0]
    dp, dH, dc = called(vjp_head(dlogits))
    return float(L), vjp(vjp_pool(dp)), {"H": dH, "c": dc}


def called(cotangents: Iterable[Callable[[], Array] | None]) -> list[Array]:
    """An op answers with functions that compute its cotangents; here all of them are wanted."""
    return [d() for d in cotangents if d]


def adam(lr: float, β1: float = 0.9, β2: float = 0.999, ε: float = 1e-8) -> Callable[[Named, Named], Named]:
    """m ← β₁ m + (1−β₁) g,   v ← β₂ v + (1−β₂) g²,   p ← p − lr m̂/(√v̂ + ε).      Kingma & Ba 2015, algorithm 1"""
    m: Named = {}
    v: Named = {}
    n = 0

    def update(params: Named, grads: Named) -> Named:
        nonlocal n
        n += 1
        for k, g in grads.items():
            m[k] = β1 * m.get(k, 0.0) + (1 - β1) * g
            v[k] = β2 * v.get(k, 0.0) + (1 - β2) * g * g
        rate = lr * float(np.sqrt(1 - β2**n) / (1 - β1**n))
        return {k: p - rate * m[k] / (np.sqrt(v[k]) + ε) for k, p in params.items()}

    return update


def train(
    model: refpeft.Model,
    adapter: refpeft.Adapter,
    t: Tokenizer,
    steps: int = 40,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
) -> Iterator[tuple[int, float, refpeft.Adapter]]:
    """Step, loss and adapter, after each step."""
    texts, labels = sentences("train")
    ids, mask = encode(t, texts)
    rng = np.random.default_rng(seed)
    d = model.config.hidden_size
    head: Named = {"H": np.zeros((len(TONES), d), np.float32), "c": np.zeros(len(TONES), np.float32)}
    update_adapter, update_head = adam(lr), adam(lr)
    order: list[int] = []
    for n in range(1, steps + 1):
        order = order if len(order) >= batch else [*rng.permutation(len(texts))]
        rows, order = order[:batch], order[batch:]
        s = int(mask[rows].sum(1).max())  # no longer than the longest of this batch
        loss, grads, dhead = step(model, adapter, head, ids[rows, :s], mask[rows, :s], labels[rows])
        adapter = adapter.replace(params=update_adapter(dict(adapter.params), grads))
        head = update_head(head, dhead)
        yield n, loss, adapter


def nearest_centre(e: Array, known: Array, labels: Array) -> Array:
    """For each vector of e, the label whose known vectors have the nearest mean: no head, only the space's geometry."""
    centres = np.stack([known[labels == k].mean(0) for k in range(len(TONES))])
    nearest: Array = (e @ unit(centres).T).argmax(1)
    return nearest


def alike(e: Array, labels: Array, k: int = 5) -> float:
    """How many of the k nearest neighbours of a vector carry its label, as a share of k, on average."""
    similar = e @ e.T
    np.fill_diagonal(similar, -np.inf)
    near = similar.argsort(1)[:, -k:]
    return float((labels[near] == labels[:, None]).mean())
