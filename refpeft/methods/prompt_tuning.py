"""Prompt tuning.      Lester et al. 2021, arXiv 2104.08691, §2

    x = [P; E[ids]]                                     P [n, d], E [v, d], ids [b, s] → x [b, n + s, d]
    dP = Σ dx[:, :n]                                    (Σ over the batch)

The prompt stands before the tokens of each sequence and everyone may see it; of an encoder-decoder model, the encoder
has it. Outputs cover all n + s positions, so for a language model the last row of the prompt predicts the first token,
and labels get n places more on their left, −100.

How P begins, by prompt_tuning_init:
    * RANDOM: N(0, 1), HF peft's default, and the default here.
    * UNIFORM: U(−½, ½).
    * SAMPLE_VOCAB: rows of E, drawn from its first `init_vocab_size`, the most common words (the paper: 5,000), or from
      all.
    * TEXT: E[init_token_ids], repeated or cut to fit, as in HF peft.
    * CLASS_LABELS: E[label] for each label, the mean over its tokens (`init_label_ids`), as many as fit, and the rest
      as SAMPLE_VOCAB: the paper's default.

Claims:
    PT1  The gradient of a row is the sum, over the batch, of the cotangents at its place; that of E is not affected.
    PT2  Rows of the batch are independent: K prompts in one batch give what K forward passes give.
    PT3  With P = E[t], the output is that of the model for the ids [t; ids].
    PT4  With num_transformer_submodules S = 2, P has 2n rows, and the gradient of the second half is 0.
    PT5  Padding that is masked, on either side of the tokens, does not change what the other places compute, if
         position_ids say where they stand.

Where implementations differ:
    * Positions. HF peft's run over the whole sequence, 0 … n + s − 1, padding included, and it discards position_ids;
      here they may be given, for the tokens, and are moved by n. AdapterHub puts the prompt behind the embeddings,
      positions and norm included: `placement` 'after_embedding'. The paper's T5 has relative positions.
    * RoBERTa counts positions without padding; HF peft hides the ids from it, so there padding on the left is counted.
    * Classifiers that read the last token that is not padding (GPT-2, LLaMA): in HF peft they read the last place.
    * Sampled rows are drawn without replacement if there are enough (as in the paper's code); HF peft draws with it.
    * The number of rows for an encoder-decoder model: n here and in the paper, 2n in HF peft (PT4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft import prompts
from refpeft.hooks import Hooks
from refpeft.ops import Array, is_half
from refpeft.prompts import Virtual, complete, own_grads

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.model import Model

__all__ = ["Config", "complete", "hooks", "init_model", "outline_model"]

KEYS = {"P": (prompts.P, None)}
SHARED = {"P": prompts.P}
FROZEN = ()
ENSEMBLES = True  # `prompts.ensemble` may put several into one adapter
INITS = ("RANDOM", "UNIFORM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS")


@dataclass(frozen=True)
class Config(Virtual):
    """HF peft's PromptTuningConfig. The ids are what a tokenizer makes of the texts: of `prompt_tuning_init_text`
    (`refpeft.checkpoint.prompts.with_text` does that), and of each label."""

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None
    init_vocab_size: int | None = None
    init_token_ids: Sequence[int] | None = None
    init_label_ids: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in INITS:
            raise ValueError(f"prompt_tuning_init must be one of {', '.join(INITS)}, found {self.prompt_tuning_init!r}")
        if self.init_vocab_size is not None and self.init_vocab_size < 1:
            raise ValueError(f"init_vocab_size must be a positive integer, found {self.init_vocab_size!r}")


def init_model(
    cfg: Config, model: "Model", chosen: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """P [n S, d] as the config wants it."""
    E, m = prompts.table(model), cfg.total
    if cfg.prompt_tuning_init == "RANDOM":
        P = rng.normal(size=(m, E.shape[1]))
    elif cfg.prompt_tuning_init == "UNIFORM":
        P = rng.uniform(-0.5, 0.5, (m, E.shape[1]))
    elif cfg.prompt_tuning_init == "TEXT":
        P = E[np.resize(known(cfg.init_token_ids, "init_token_ids", E), m)]
    else:
        P = sampled(cfg, E, m, rng)
        if cfg.prompt_tuning_init == "CLASS_LABELS":
            if not cfg.init_label_ids:
                raise ValueError("prompt_tuning_init 'CLASS_LABELS' needs init_label_ids, the token ids of each label")
            for k, label in enumerate(cfg.init_label_ids[:m]):
                P[k] = lifted(E[known(label, f"init_label_ids[{k}]", E)]).mean(0)
    return {prompts.P: np.ascontiguousarray(P, dtype=prompts.dtype_of(model))}, {}


def outline_model(cfg: Config, model: "Model", chosen: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """P [n S, d]"""
    return {prompts.P: prompts.outline(cfg, model)}, {}


def sampled(cfg: Config, E: Array, m: int, rng: np.random.Generator) -> Array:
    """m rows of the first N of E, without replacement if N ≥ m."""
    v = len(E)
    first = cfg.init_vocab_size or v
    if first > v:
        raise ValueError(f"init_vocab_size must be at most the size of the vocabulary, {v}, found {first}")
    return lifted(E[rng.choice(first, m, replace=m > first)])


def lifted(rows: Array) -> Array:
    return rows.astype(np.float32) if is_half(rows.dtype) else rows


def known(ids: Sequence[int] | None, name: str, E: Array) -> Array:
    """Token ids that the vocabulary has; at least one."""
    a = np.asarray([] if ids is None else ids, np.int64)
    if not a.size:
        raise ValueError(f"{name} must hold the token ids that the prompt starts from, found {ids!r}")
    if a.min() < 0 or a.max() >= len(E):
        raise ValueError(f"{name} holds {a.min() if a.min() < 0 else a.max()}, and the vocabulary has {len(E)} ids")
    return a


def hooks(adapter: "Adapter", k: int, model: "Model") -> Hooks:
    """P before the tokens."""
    return prompts.hooks(
        adapter.config,
        adapter.value(prompts.P),
        lambda dP, want: own_grads(k, adapter.params, want, {prompts.P: dP}),
        model,
        adapter.rows,
    )


def plain(cfg: Config, params: Mapping[str, Array]) -> Mapping[str, Array]:
    """P is all there is."""
    return params
