"""P-tuning v2: prompts in every layer, and a trained head.      Liu et al. 2021, arXiv 2110.07602, §3.2 and §3.3

    y = attention(q, [P_K; K], [P_V; V])          of every layer, P_K and P_V [n, g, e] as in `prefix_tuning`
    logits = x Wᵀ + b                             W [labels, d] and b [labels] of the classifier, trained whole

The method is for models that name a class for a text or for each of its tokens, instead of words. Gradients: those of
`prefix_tuning` and of a linear layer.

One frozen model serves several tasks in one batch, each row with the prompt and the head of its own: an adapter whose
`rows` [b] say which rows are its (`refpeft.by_row`). Then a row's memory holds the prompts that it may see, its
tokens are shifted by the length of those, and of the heads' answers each row keeps its own.

Claims:
    PV1  It is prefix tuning without the MLP, with the classifier in `modules_to_save`.
    PV2  A batch with a task per row gives every row what the task gives it alone, and every adapter the gradient of its
         own rows, also for prompts of different lengths.
    PV3  A row that no adapter is for is the base model's.

Where implementations differ:
    * The paper finds that the MLP helps on some tasks and hurts on others; it is off by default here.
    * The paper's code drops entries of P in training, as of hidden states; HF peft and AdapterHub's default do not.
    * The paper's code trains the classifier only; a new pooler is listed in `modules_to_save` beside it.
    * HF peft has the method as PrefixTuningConfig with task_type SEQ_CLS or TOKEN_CLS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from refpeft.methods import prefix_tuning
from refpeft.methods.prefix_tuning import FROZEN, KEYS, SHARED, complete, flat, hooks, init_model, kept, outline_model

__all__ = ["FROZEN", "KEYS", "SHARED", "Config", "complete", "flat", "hooks", "init_model", "kept", "outline_model"]


@dataclass(frozen=True)
class Config(prefix_tuning.Config):
    modules_to_save: Sequence[str] | None = ("classifier", "score")
