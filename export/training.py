"""A step of training as data: which optimiser with which numbers, what is learned, and the way back to an adapter.

    start = safetensors.read(folder / "start.safetensors")        adapter.… and state.…, before the first step
    feeds = {**start, **batch, "learning_rate": np.float32(1e-3)}
    out = runner.run(feeds)                                       loss, logits, next.adapter.…, next.state.…
    feeds |= carried(out)
    save(folder, out, "my-adapter")                               an HF adapter folder

`refpeft.export.forms.training` makes the graph of it.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import optim
from refpeft.adapter import Adapter
from refpeft.checkpoint import safetensors
from refpeft.checkpoint.adapters import save_adapter
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.config import POOLS
from refpeft.export import initialisers
from refpeft.export.card import CARD, whole
from refpeft.methods import METHODS
from refpeft.model import Model
from refpeft.objectives import Batch, Loss, loss_of
from refpeft.train import OPTIMIZERS, OWN, State, checked, fitting, followed, norms, penalised, remembered, trained
from refpeft.tune import configured

Array = np.ndarray[Any, Any]
Named = Mapping[str, Any]
ADAPTER, STATE, NEXT = "adapter.", "state.", "next."
START = "start.safetensors"
TRACED = ("adamw", "adam", "sgd")  # adafactor looks at its numbers while it computes
OF_PLAN = ("weight_decay", "momentum", "nesterov")  # options of an optimiser that `refpeft train` has a field for
OURS: Named = {"clip": 0.0, "loraplus_ratio": 0.0, "loraplus_embedding": 1e-6}  # 0: none


@dataclass(frozen=True)
class Optimizer:
    """One of `refpeft.optim`, with all of its options, and those of `refpeft train` that act on gradients and rates."""

    name: str
    options: Named = field(default_factory=dict)

    def start(self, adapter: Adapter) -> dict[str, Array]:
        return {**OPTIMIZERS[self.name][0](adapter.params), **remembered(adapter)}

    def step(self, model: Model, adapter: Adapter, grads: Named, state: Named, lr: Any) -> tuple[Named, Named]:
        """The new parameters and the new state, with what a method does and remembers besides (`refpeft.train`)."""
        params, own = adapter.params, {n: v for n, v in self.options.items() if n not in OURS}
        grads = penalised(adapter, grads)
        if self.options["clip"]:
            grads, _ = optim.clip_by_global_norm(grads, self.options["clip"])
        if ratio := self.options["loraplus_ratio"]:
            slow = self.options["loraplus_embedding"]
            lr, own["weight_decay"] = optim.loraplus(params, lr, ratio, own["weight_decay"], slow, norms(model))
        moments = {n: v for n, v in state.items() if not n.startswith(OWN)}
        new, moments = OPTIMIZERS[self.name][1](params, grads, moments, lr=lr, **own)
        return followed(adapter, State(state["step"], params, state), grads, new, moments)


def optimizer(given: Named) -> Optimizer:
    """From the options of an export: `optimizer`, and any of its own by name."""
    options = dict(given)
    name = options.pop("optimizer", "adamw")
    if name not in TRACED:
        raise ValueError(f"optimizer must be one of {', '.join(TRACED)}, found {name!r}")
    steps = {n: p.default for n, p in inspect.signature(OPTIMIZERS[name][1]).parameters.items() if n in OF_PLAN}
    chosen = checked(name, options, {**steps, **OURS})
    if chosen.get("nesterov") and (chosen["momentum"] <= 0 or chosen["dampening"]):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")
    return Optimizer(name, chosen)


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────────


def pooled(model: Model) -> bool:
    """Is there one answer for each row, and not for each token?"""
    return bool(set(POOLS) & set(model.config.head))


def regression(model: Model) -> bool:
    return pooled(model) and model.params[model.sites["head.out"].weight].shape[0] == 1


def objective(model: Model) -> str:
    """The one of the model's head."""
    if "head.out" not in model.sites:
        architecture = (model.source.get("architectures") or [model.config.family])[0]
        raise ValueError(f"{architecture} has no head to train with: expected a language model or a classifier")
    return fitting(model)[0]


def loss_for(model: Model) -> Callable[[Any, Batch], Loss]:
    """Its loss. Of classes of tokens it is that of a masked language model: a label for each place."""
    name = objective(model)
    return loss_of("masked" if name == "classification" and not pooled(model) else name, model.config.encoder_decoder)


# ── the way back ─────────────────────────────────────────────────────────────────────────────────────────────────────


def starting(adapter: Adapter, o: Optimizer) -> dict[str, Array]:
    """All that goes round, before the first step: the adapter's parameters and the optimiser's state."""
    state = o.start(adapter)
    return {ADAPTER + n: np.asarray(a) for n, a in adapter.params.items()} | {STATE + n: a for n, a in state.items()}


def carried(out: Named) -> dict[str, Any]:
    """What of a step's outputs is the next one's input."""
    return {name.removeprefix(NEXT): a for name, a in out.items() if name.startswith(NEXT)}


def adapter_of(folder: str | os.PathLike[str], tensors: Mapping[str, Array]) -> Adapter:
    """The adapter of an exported folder with these parameters: the inputs or the outputs of a step, by their names."""
    from refpeft.export.readapter import base

    path = Path(folder)
    card = whole(path)
    if card["form"] != "training":
        raise ValueError(f"{folder}: its form is {card['form']}, expected training")
    method, config = described(path, card)
    config = configured(METHODS[method], method, config, base(path, card))
    found = {**tensors, **carried(tensors)}
    params = own({n: fitting_tensor(found, n, shape) for n, shape in card["inputs"].items() if n.startswith(ADAPTER)})
    adapter = Adapter(method, config, params, own(initialisers.read(path / "model.onnx")))
    kept = {n.removeprefix(STATE): a for n, a in found.items() if n.startswith(STATE + OWN)}
    return trained(adapter, State(0, params, kept))


def described(folder: Path, card: Named) -> tuple[str, Named]:
    """Method and config of the one adapter."""
    said = card["adapters"][0] if len(card["adapters"]) == 1 and isinstance(card["adapters"][0], Mapping) else {}
    method, config = said.get("method"), said.get("config")
    if not isinstance(method, str) or method not in METHODS or not isinstance(config, Mapping):
        raise Malformed(f"{folder / CARD}: adapters must be one, with its method and config, found {show(said)}")
    return method, config


def own(tensors: Named) -> dict[str, Any]:
    """Those of the adapter, by their names there."""
    return {n.removeprefix(ADAPTER): a for n, a in tensors.items() if n.startswith(ADAPTER)}


def fitting_tensor(found: Named, name: str, shape: Any) -> Any:
    a = found.get(name)
    if a is None:
        raise ValueError(f"{name} is missing, which the adapter has")
    if list(a.shape) != shape or a.dtype != np.float32:
        raise ValueError(f"{name} must be float32 of shape {shape}, found {a.dtype} of shape {list(a.shape)}")
    return a


def save(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Array] | str | os.PathLike[str],
    out: str | os.PathLike[str],
) -> Adapter:
    """Write what a step gave (or a safetensors file of it) as an HF adapter folder at `out`, which must not exist."""
    if not isinstance(tensors, Mapping):
        if not Path(tensors).is_file():
            raise ValueError(f"{tensors}: no such file")
        tensors = safetensors.read(Path(tensors))
    adapter = adapter_of(folder, tensors)
    save_adapter(adapter, out)
    return adapter
