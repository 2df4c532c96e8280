"""LayerNorm tuning: only the norms are trained.      Zhao et al. 2023, arXiv 2312.11420, §3

    y = γ′ ⊙ n(x) + β′            S = { γ, β of the norms }            RMS norms have no β

Claims:
    S1  At init the model is unchanged, to the bit (S1 to S4 hold for all such methods: `refpeft.selection`).

Field names and files are HF peft's LN_TUNING, which holds a copy of each selected norm beside the old one;
`target_modules` are paths of norms or their ends, all norms of the model where none are named.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refpeft.method import matches
from refpeft.selection import copies, hooks, merge_model, originals, tensors

if TYPE_CHECKING:
    from refpeft.model import Model

__all__ = ["FROZEN", "KEYS", "Config", "hooks", "init_model", "merge_model", "outline_model"]

KEYS: Mapping[str, tuple[str | None, str | None]] = {
    "γ": ("ln_tuning_layers.weight", None),
    "β": ("ln_tuning_layers.bias", None),
}
FROZEN = ()


@dataclass(frozen=True)
class Config:
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None


def select(cfg: Config, model: "Model") -> Collection[str]:
    """The tensors of the targeted norms. A target that is none, or matches nothing, is an error."""
    found = []
    for role, site in model.sites.items():
        norm = site.kind.endswith("norm")
        wanted = norm if cfg.target_modules is None else matches(cfg.target_modules, site.path)
        if wanted and not matches(cfg.exclude_modules, site.path):
            if not norm:
                raise ValueError(f"target_modules {cfg.target_modules!r} matches {site.path}, which is no norm")
            found.append(role)
    if not found:
        raise ValueError(f"target_modules {cfg.target_modules!r} matches no norm of the model")
    return tensors(model, found)


init_model, outline_model = copies(select), originals(select)
