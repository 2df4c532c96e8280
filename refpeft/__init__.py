"""refpeft: the golden specification of parameter-efficient fine-tuning, in plain NumPy.

    model = refpeft.load("folder")                             an HF model folder
    adapter = refpeft.init("lora", {"r": 8}, model, seed=0)    or refpeft.load_adapter("folder", model)
    out, vjp = model(ids, adapter)                             the forward pass …
    grads = vjp(dout)                                          … and the gradients of the adapter, by name
    merged = refpeft.merge(model, adapter)

Start reading at `refpeft.ops`, then `refpeft.methods.lora`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refpeft.adapter import Adapter, by_row
    from refpeft.check import check_model, check_op
    from refpeft.checkpoint.adapters import load_adapter, save_adapter
    from refpeft.checkpoint.models import load, save
    from refpeft.intrinsic import intrinsic_dimension
    from refpeft.methods import METHODS
    from refpeft.model import Model
    from refpeft.prompts import drop_encoder, ensembled, nearest, vote
    from refpeft.tune import dropout, init, merge
    from refpeft.vocabulary import extend_vocabulary

__all__ = [
    "METHODS", "Adapter", "Model", "by_row", "check_model", "check_op", "drop_encoder", "dropout", "ensembled",
    "extend_vocabulary", "init", "intrinsic_dimension", "load", "load_adapter", "merge", "nearest", "save",
    "save_adapter", "vote",
]  # fmt: skip
__version__ = "0.1.0"
SPEC_VERSION = "1"  # of what the methods compute: changes when a formula does, see CHANGELOG.md

HOME = {  # where each name lives: imported when it is first used, so that `refpeft --help` needs no NumPy
    "adapter": ("Adapter", "by_row"),
    "check": ("check_model", "check_op"),
    "checkpoint.adapters": ("load_adapter", "save_adapter"),
    "checkpoint.models": ("load", "save"),
    "intrinsic": ("intrinsic_dimension",),
    "methods": ("METHODS",),
    "model": ("Model",),
    "prompts": ("drop_encoder", "ensembled", "nearest", "vote"),
    "tune": ("dropout", "init", "merge"),
    "vocabulary": ("extend_vocabulary",),
}


if not TYPE_CHECKING:  # which would take any name then for one that is here

    def __getattr__(name: str) -> Any:
        for module, names in HOME.items():
            if name in names:
                found = globals()[name] = getattr(import_module(f"refpeft.{module}"), name)
                return found
        raise AttributeError(f"module 'refpeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
