"""BitFit: only biases are trained.      Ben Zaken, Ravfogel & Goldberg 2021, arXiv 2106.10199, §3

    y = x Wᵀ + b′            S = { b of every layer, norms included }, and the task's head

`biases="query_and_intermediate"`: the biases of the queries and of the first layer of the MLP alone, which do nearly as
well (§4.2, table 3). Where queries, keys and values are one layer (GPT-2), its whole bias is trained.

Claims:
    S1  At init the model is unchanged, to the bit (S1 to S4 hold for all such methods: `refpeft.selection`).
    B1  db′ = Σ dy over all positions: the gradient needs no activation of the layer.

Where implementations differ:
    * HF peft has no BitFit of its own: `bias="all"` trains these tensors beside a LoRA. There they are overwritten in
      the base model, so that disabling the adapter does not bring the old ones back.
    * OpenDelta also gives biases to layers that have none; here such a layer has nothing to train.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refpeft.selection import copies, hooks, inside, merge_model, originals, tensors

if TYPE_CHECKING:
    from refpeft.model import Model

__all__ = ["FROZEN", "KEYS", "Config", "hooks", "init_model", "merge_model", "outline_model"]

KEYS: Mapping[str, tuple[str | None, str | None]] = {}
FROZEN = ()
QUERY, INTERMEDIATE = ("attn.q", "attn.qkv", "cross.q"), ("mlp.up", "mlp.gate")


@dataclass(frozen=True)
class Config:
    biases: str = "all"  # or 'query_and_intermediate'
    modules_to_save: Sequence[str] | None = None  # the head: trained whole

    def __post_init__(self) -> None:
        if self.biases not in ("all", "query_and_intermediate"):
            raise ValueError(f"biases must be 'all' or 'query_and_intermediate', found {self.biases!r}")


def select(cfg: Config, model: "Model") -> Collection[str]:
    roles = [r for r in model.sites if cfg.biases == "all" or r.endswith((*QUERY, *INTERMEDIATE))]
    biases = tensors(model, roles, ("bias",))
    if not biases:
        raise ValueError(f"a {model.config.family} model has no biases for BitFit to train")
    return [*biases, *tensors(model, inside(model, cfg.modules_to_save))]


init_model, outline_model = copies(select), originals(select)
