"""Partial fine-tuning: the last k layers and the head are trained.      Lee, Tang & Lin 2019, arXiv 1911.03090, §3

    S = { tensors of layers L − k, …, L − 1 }, the final norm and the head            k = 0: the head alone
        and those of `modules_to_save`, by name; with k = 0 and `head=False`, of these alone

"FT-Top2" of the LoRA paper (arXiv 2106.09685, §5.1) is k = 2. In an encoder-decoder model, the last k of each stack. A
head that is tied to the embeddings is one tensor with them, and trained with `head=True` only if `tied=True`, or if
`modules_to_save` names one of the two. `layers=0, head=False, modules_to_save=["embed_tokens"]` trains the embeddings
alone, as one does first when new tokens came in (`refpeft.vocabulary`, stage 1).

Claims:
    S1  At init the model is unchanged, to the bit (S1 to S4 hold for all such methods: `refpeft.selection`).
    T1  Nothing below layer L − k is walked in the backward pass (unless a tied head is trained, or a module below).
    T2  `modules_to_save` adds whole modules, and all that is inside, wherever they are.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refpeft.selection import copies, hooks, inside, merge_model, originals, tensors

if TYPE_CHECKING:
    from refpeft.model import Model

__all__ = ["FROZEN", "KEYS", "Config", "hooks", "init_model", "merge_model", "outline_model"]

KEYS: Mapping[str, tuple[str | None, str | None]] = {}
FROZEN = ()


@dataclass(frozen=True)
class Config:
    layers: int = 2  # k
    head: bool = True
    tied: bool = False
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, int) or isinstance(self.layers, bool) or self.layers < 0:
            raise ValueError(f"layers must be an integer of 0 or more, found {self.layers!r}")


def select(cfg: Config, model: "Model") -> Collection[str]:
    places = {role: re.fullmatch(r"(.*?)layers\.(\d+)\..*", role) for role in model.sites}
    depth: dict[str, int] = {}
    for m in places.values():
        if m:
            depth[m[1]] = max(depth.get(m[1], 0), int(m[2]) + 1)
    if any(cfg.layers > n for n in depth.values()):
        raise ValueError(f"layers must be at most {min(depth.values())}, which the model has, found {cfg.layers}")
    top = [role for role, m in places.items() if m and int(m[2]) >= depth[m[1]] - cfg.layers]
    embedded = set(tensors(model, [r for r in model.sites if "embed." in r]))
    head = [r for r, m in places.items() if not m and "embed." not in r] if cfg.head else []
    named = tensors(model, inside(model, cfg.modules_to_save))
    return [*tensors(model, top), *(t for t in tensors(model, head) if cfg.tied or t not in embedded), *named]


init_model, outline_model = copies(select), originals(select)
