"""Vocabulary extension: rows for new tokens.      Cui, Yang & Yao 2023, arXiv 2304.08177, §2.2

    E′ = [E; R],   W′ = [W; S],   b′ = [b; β]      E, W [v, d], b [v]: embedding, head, its bias;   R, S [k, d], β [k]

    mean           R_j = mean_i E_i over all old tokens i                              Hewitt 2021
    subword_mean   R_j = mean_i E_i over the old tokens i that token j was made of     Koto et al. 2021
    normal         R_j ~ N(0, σ² I),   β = 0;   σ = initializer_range of config.json   transformers' older default

S and β are made of W and b as R is of E; a head that is tied to the embedding is one tensor with it.
Hewitt: nlp.stanford.edu/~johnhew/vocab-expansion.html. Koto, Lau & Baldwin: arXiv 2109.04607.

With `pad_to_multiple_of` n there are as many rows more as make v′ a multiple of n. They belong to no token, and get the
mean, or are drawn. A model may have such rows already (v above the tokenizer's size t): then the new tokens take those
first, and "old" means: below t.

Claims:
    V1  The rows of old tokens stay as they are, to the bit, so that on old ids nothing changes but that there are more
        logits: the first v are those of before (to the bit as well, as far as the order in which BLAS adds up the terms
        of one does not depend on how many others there are).
    V2  From t on, ids are valid that were not, as many as there are new tokens, and each is one token of a text.
    V3  subword_mean: the embedding of a new token, and its logit, are the means of those of the tokens it was made of.
    V4  mean: whatever the text, no old token's log-probability falls by more than log(1 + k/v), k with padding (for
        Z′ = Z + k e^z̄, and by Jensen e^z̄ ≤ Z/v of the mean logit z̄). The other two promise nothing.
    V5  A tied head stays tied.
    V6  v′ is the least multiple of n that holds all tokens.
    V7  dE′ is 0 in the rows of tokens that a batch lacks, unless the head is tied: training the embedding on a new
        language moves what that has, and no other row (stage 1 below; weight decay would).

The stages that follow (§3.1 for Chinese LLaMA 7B; each is an adapter, which is merged to be the base of the next):

    1  the embedding alone       partial, layers=0, head=False, modules_to_save=["embed_tokens"]
    2  attention, and E, W       lora on q_proj, k_proj, v_proj, o_proj, modules_to_save=["embed_tokens", "lm_head"]
    3  instructions              lora on those and gate_proj, up_proj, down_proj (their run_sft.sh: E, W whole again)

`refpeft extend`, and `refpeft train` and `refpeft merge` in turns, are these steps; examples/staged_vocabulary.py runs
them. trainable_tokens with the new ids is a stage 1 that leaves all old rows alone, tied or not.

Where implementations differ:
    * `mean` in transformers (resize_token_embeddings, whose default it is since 4.46) is a draw from N(μ, 10⁻⁹ Σ) with
      the old rows' covariance Σ, and μ itself where Σ is singular, as it is for v ≤ d. Hewitt draws from N(μ, Σ)
      scaled down; that new rows differ at first does not matter, since their gradients do. Here it is μ.
    * In transformers (5.24) the bias of a tied masked LM (BERT) gets zeros even so, and V4 does not hold there.
    * transformers takes the number of rows wanted, which is less than the model has where it was padded (Qwen2), and
      then cuts rows off. Here nothing is ever cut.
    * transformers takes the mean over padding rows too; here over those below t.
    * Cui et al. use transformers' resize of that time, hence normal (scripts/training/run_clm_pt_with_peft.py); their
      run_pt.sh adapts the MLP in stage 2 as well, as the paper does in one stage for its larger models.
    * Cui et al. merge the pieces of a new sentencepiece model into the old one, with score 0, above all old ones: a
      text is cut by merging pairs whose union is a piece, highest score first. See `refpeft.checkpoint.tokens` for what
      added tokens and merged BPE do instead.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from refpeft.model import Model
from refpeft.ops import Array
from refpeft.selection import tensors
from refpeft.tune import language

Pieces = Sequence[int]  # the old tokens that a new one was made of
INITS = ("mean", "subword_mean", "normal")


class Words(Protocol):
    """What is asked of a tokenizer; those of the library `tokenizers` have it."""

    def get_vocab(self) -> Mapping[str, int]: ...
    def encode(self, sequence: Any, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class Growth:
    """From v rows to `size`: new tokens at `old`, `old` + 1, …, each with its pieces or None; the rest is padding."""

    old: int  # t
    pieces: Sequence[Pieces | None]
    size: int  # v′

    def filled(self, v: int) -> Sequence[int]:
        """The rows that are made: of new tokens, then of padding, which begins after all there was."""
        end = self.old + len(self.pieces)
        return [*range(self.old, end), *range(max(v, end), self.size)]


def extend_vocabulary(
    model: Model,
    new: int | Sequence[str | Pieces],
    init: str = "mean",
    tokenizer: Words | None = None,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> Model:
    """The model with rows for new tokens, in the embedding and the head.

    `new`: how many, or the tokens themselves, or of each the ids of the old tokens that it is made of. `tokenizer`: the
    old one; it cuts the tokens into old ones for subword_mean, and says where ids begin that no token has (else v).
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, found {init!r}")
    roles = tables(model)
    v = len(model.params[model.sites[roles[0]].weight])
    growth = planned(v, new, init, tokenizer, pad_to_multiple_of)
    σ, rng = model.source.get("initializer_range", 0.02), np.random.default_rng(seed)
    params = dict(model.params)
    for name in tensors(model, roles):
        params[name] = extended(params[name], growth, init, σ, rng)
    source = {**model.source, "vocab_size": growth.size} if model.source else model.source
    return replace(model, params=params, source=source)


def tables(model: Model) -> list[str]:
    """The sites with a row for every token: the embeddings of tokens, and the head of a language model."""
    roles = [role for role in model.sites if role.endswith("embed.token")]
    if not roles:
        raise ValueError(f"a {model.config.family} model has no embedding of tokens that could be extended")
    return roles + (["head.out"] if "head.out" in model.sites and language(model) else [])


def planned(v: int, new: Any, init: str, tokenizer: Words | None, n: int | None) -> Growth:
    """How the tables grow; what cannot be is refused."""
    old = v if tokenizer is None else 1 + max(tokenizer.get_vocab().values(), default=-1)
    if old > v:
        raise ValueError(
            f"the tokenizer has ids up to {old - 1}, but the model has {v} rows: they do not belong together"
        )
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ValueError(f"pad_to_multiple_of must be a positive integer, found {n!r}")
    pieces = pieces_of(new, init, tokenizer, old)
    size = max(v, old + len(pieces))
    return Growth(old, pieces, size if n is None else -(-size // n) * n)


def pieces_of(new: Any, init: str, tokenizer: Words | None, old: int) -> Sequence[Pieces | None]:
    """For each new token the old ones that it is made of, where they are needed."""
    if isinstance(new, int) and not isinstance(new, bool):
        if init == "subword_mean":
            raise ValueError("init 'subword_mean' needs the tokens, or the old ids that each is made of, not a number")
        if not 0 <= new < 2**31:
            raise ValueError(f"the number of new tokens must lie between 0 and {2**31 - 1}, found {new}")
        return [None] * new
    if not isinstance(new, Sequence) or isinstance(new, str | bytes):
        raise ValueError(f"new must be a number, a list of tokens, or a list of lists of old ids, found {new!r}")
    once(new, {} if tokenizer is None else tokenizer.get_vocab())
    return [cut(token, tokenizer, old) if init == "subword_mean" else None for token in new]


def once(new: Sequence[str | Pieces], known: Collection[str]) -> None:
    """No new token twice, and none that is there already."""
    seen: set[str] = set()
    for token in new:
        if isinstance(token, str) and (token in seen or token in known):
            why = "is named twice" if token in seen else "has a place in the vocabulary already"
            raise ValueError(f"the new token {token!r} {why}")
        seen |= {token} if isinstance(token, str) else set()


def cut(token: str | Pieces, tokenizer: Words | None, old: int) -> Pieces:
    """The old tokens of one new token."""
    ids: Any = token
    if isinstance(token, str):
        if tokenizer is None:
            raise ValueError(f"init 'subword_mean' needs the old tokenizer to cut {token!r} into old tokens")
        ids = tokenizer.encode(token, add_special_tokens=False).ids
    if not ids or not all(isinstance(i, int | np.integer) and 0 <= i < old for i in ids):
        raise ValueError(f"the new token {token!r} must be made of old tokens, ids 0 to {old - 1}, found {ids!r}")
    return list(ids)


def extended(a: Array, growth: Growth, init: str, σ: float, rng: np.random.Generator) -> Array:
    """[a; new rows], in the dtype of a, which is a table [v, d] or a bias [v]."""
    rows = growth.filled(len(a))
    b = np.empty((growth.size, *a.shape[1:]), a.dtype)
    b[: len(a)] = a
    if not rows:
        return b
    if init == "normal":
        new = rng.normal(0, σ, (len(rows), *a.shape[1:])) if a.ndim > 1 else np.zeros(len(rows))
    else:
        μ = a[: growth.old].mean(0, dtype=np.float64)
        pieces = [*growth.pieces, *[None] * (len(rows) - len(growth.pieces))]
        new = np.stack([μ if p is None else a[p].mean(0, dtype=np.float64) for p in pieces])
    b[rows] = new.astype(a.dtype)
    return b
