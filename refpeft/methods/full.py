"""Full fine-tuning: every tensor is trained.      The baseline of Hu et al. 2021, arXiv 2106.09685, §5.1

    θ′ = φ            φ starts as a copy of θ; S = all of the model's tensors

Claims:
    S1  At init the model is unchanged, to the bit (S1 to S4 hold for all such methods: `refpeft.selection`).
    F1  Its gradients are those of the base model.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refpeft.selection import copies, hooks, merge_model, originals

if TYPE_CHECKING:
    from refpeft.model import Model

__all__ = ["FROZEN", "KEYS", "Config", "hooks", "init_model", "merge_model", "outline_model"]

KEYS: Mapping[str, tuple[str | None, str | None]] = {}
FROZEN = ()


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


def select(cfg: Config, model: "Model") -> Collection[str]:
    return model.params.keys()


init_model, outline_model = copies(select), originals(select)
