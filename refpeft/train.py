"""Training an adapter: one step after the other, as a function from state to state.

    state = train.start(plan, adapter)
    while state.step < plan.steps:
        state = train.step(plan, model, adapter, objective, rows, state)

One step: `accumulate` batches of `batch` rows each; the gradient of them all as if they were one batch
(`optim.accumulate`); clipped to the global norm `clip`; one step of the optimiser with lr · schedule(step).

Which rows a step sees, and all that it draws (masks, spans, dropout), depend on (seed, step) alone. So a state is all
that there is to save, and a run that is resumed from one goes on to the bit.

Claims:
    T1  From equal states follow equal states: stopping and going on changes no bit.
    T2  k batches of n accumulated give the gradient of one batch of k n.
    T3  Every row is seen once before any is seen twice, in a new order each time.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from refpeft import optim
from refpeft.adapter import Adapter
from refpeft.methods import METHODS
from refpeft.model import Model
from refpeft.objectives import NAMES, Batch, Loss, Objective, Row
from refpeft.ops import Array
from refpeft.tune import dropout, language

Optimizer = tuple[Callable[..., dict[str, Array]], Callable[..., optim.Updated], Mapping[str, Any]]
OPTIMIZERS: Mapping[str, Optimizer] = {  # name → init, step, options that have other defaults here
    "sgd": (optim.sgd_init, optim.sgd, {}),
    "adam": (optim.adam_init, optim.adam, {}),
    "adamw": (optim.adam_init, optim.adamw, {}),
    "adafactor": (optim.adafactor_init, optim.adafactor, {"relative_step": False, "scale_parameter": False}),
}
SCHEDULES = {"constant": optim.constant, "linear": optim.linear, "cosine": optim.cosine}
INPUTS = ("attention_mask", "token_type_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Plan:
    """How to train. `momentum` and `nesterov` are SGD's; `loraplus_ratio` η_B/η_A, with `loraplus_embedding` for
    embeddings; `clip` 0 does not clip. `options` are the optimiser's own, by the names they have in `refpeft.optim`;
    with Adafactor's relative_step, lr and schedule do not count."""

    steps: int = 100
    batch: int = 8
    lr: float = 1e-3
    schedule: str = "linear"
    warmup: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    accumulate: int = 1
    clip: float = 0.0
    loraplus_ratio: float | None = None
    loraplus_embedding: float = 1e-6
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        for name in ("lr", "weight_decay", "momentum", "clip", "loraplus_embedding"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, found {getattr(self, name)}")
        if self.loraplus_ratio is not None and not 0 < self.loraplus_ratio < float("inf"):
            raise ValueError(f"loraplus_ratio must be above 0, found {self.loraplus_ratio}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}")
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov are options of sgd, not of {self.optimizer}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.own.get("relative_step") and self.loraplus_ratio is not None:
            raise ValueError("relative_step makes its own learning rate, which loraplus_ratio cannot divide")

    @cached_property
    def own(self) -> Mapping[str, Any]:
        """All options of the optimiser: those that are given, and the defaults of the others."""
        return checked(self.optimizer, self.options)


ELSEWHERE = ("params", "grads", "state", "lr", "weight_decay", "momentum", "nesterov", "decoupled")


def checked(optimizer: str, given: Mapping[str, Any], also: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of an optimiser, and what else is an option in its place: those that are given, else the defaults."""
    _, turn, ours = OPTIMIZERS[optimizer]
    defaults = {n: p.default for n, p in inspect.signature(turn).parameters.items() if n not in ELSEWHERE}
    known = {**defaults, **ours, **(also or {})}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{optimizer} has no option {name!r}: there are {', '.join(known) or 'none'}")
        if not suits(value, known[name]):
            raise ValueError(f"{name} must be {wanted(known[name])}, found {value!r}")
    return {n: tuple(v) if isinstance(v, list) else v for n, v in {**known, **given}.items()}


def suits(value: Any, default: Any) -> bool:
    """Is an option of the kind of its default?"""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and len(value) == 2 and all(number(v) and v < 1 for v in value)
    if default is None:
        return value is None or (number(value) and value < 1)
    return number(-value if isinstance(value, int | float) and default < 0 else value)


def wanted(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, tuple):
        return "two numbers from 0 to below 1"
    if default is None:
        return "null, or a number from 0 to below 1"
    return "a number, 0 or less" if default < 0 else "a number, 0 or more"


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(0 <= value < math.inf)


# fields of configs that masks come from
DROPOUTS = ("lora_dropout", "vera_dropout", "encoder_dropout", "dropout", "stochastic_depth")


@dataclass(frozen=True)
class State:
    """After `step` steps: the adapter's parameters, the optimiser's state, and the loss of every step [step]."""

    step: int
    params: Mapping[str, Array]
    moments: Mapping[str, Array]
    losses: Array = field(default_factory=lambda: np.zeros(0))


def start(plan: Plan, adapter: Adapter) -> State:
    init, _, _ = OPTIMIZERS[plan.optimizer]
    first = {"beta1": plan.options["beta1"]} if "beta1" in plan.options else {}  # Adafactor's, for which m is kept
    return State(0, dict(adapter.params), {**init(adapter.params, **first), **remembered(adapter)})


def step(
    plan: Plan, model: Model, adapter: Adapter, objective: Objective, rows: Sequence[Row], state: State
) -> State:  # fmt: skip
    """The state after one more step."""
    adapter = adapter.replace(params=state.params)
    parts: list[tuple[float, Mapping[str, Array]]] = []
    losses: list[float] = []
    for k in range(plan.accumulate):
        turn = state.step * plan.accumulate + k
        batch = objective.batch([rows[n] for n in chosen(plan, len(rows), turn)], random(plan, turn, 0))
        L, n, grads = gradient(model, dropped(adapter, model, batch, random(plan, turn, 1)), objective, batch)
        parts.append((int(n), grads))
        losses.append(float(L))
    total = sum(w for w, _ in parts) or 1
    loss = sum(w * L for (w, _), L in zip(parts, losses, strict=True)) / total
    grads = parts[0][1] if len(parts) == 1 else optim.accumulate(parts)
    grads = penalised(adapter, grads)
    if plan.clip:
        grads, _ = optim.clip_by_global_norm(grads, plan.clip)
    params, moments = followed(adapter, state, grads, *update(plan, model, state, grads))
    return State(state.step + 1, params, moments, np.append(state.losses, loss))


# ── what some methods do besides ─────────────────────────────────────────────────────────────────────────────────────

OWN = "method."  # before the names of what a method remembers from step to step, among the optimiser's moments


def remembered(adapter: Adapter) -> dict[str, Array]:
    start = getattr(METHODS[adapter.method], "remembered", None)
    return {OWN + n: v for n, v in start(adapter.config, adapter.params).items()} if start else {}


def penalised(adapter: Adapter, grads: Mapping[str, Array]) -> Mapping[str, Array]:
    """The gradients with those of the method's own term of the loss."""
    penalty = getattr(METHODS[adapter.method], "penalty", None)
    if penalty is None:
        return grads
    own = penalty(adapter.config, adapter.params)[1]
    return {n: g + own[n] if n in own else g for n, g in grads.items()}


def followed(
    adapter: Adapter,
    state: State,
    grads: Mapping[str, Array],
    params: Mapping[str, Array],
    moments: Mapping[str, Array],
) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
    """What the method makes of the parameters after the optimiser's step, and remembers of it."""
    follow = getattr(METHODS[adapter.method], "follow", None)
    if follow is None:
        return params, moments
    before = {n.removeprefix(OWN): v for n, v in state.moments.items() if n.startswith(OWN)}
    params, after = follow(adapter.config, state.step + 1, params, grads, before)
    return params, {**moments, **{OWN + n: v for n, v in after.items()}}


def gradient(
    model: Model, adapter: Adapter, objective: Objective, batch: Batch
) -> tuple[Array, Any, Mapping[str, Array]]:
    """The loss of a batch, of how many terms it is the mean, and the gradients of the adapter's parameters."""
    _, L, n, grads = answer_and_gradient(model, adapter, objective.loss, batch)
    return L, n, grads


def answer_and_gradient(
    model: Model, adapter: Adapter, loss: Callable[[Array, Batch], Loss], batch: Batch
) -> tuple[Array, Array, Any, Mapping[str, Array]]:
    """The same with the model's output first."""
    out, vjp = answer(model, adapter, batch)
    L, dout, n = loss(out, batch)
    return out, L, n, vjp(dout)


def answer(model: Model, adapter: Adapter, batch: Batch) -> tuple[Array, Callable[..., Any]]:
    return model(batch["input_ids"], adapter, **{name: batch[name] for name in INPUTS if name in batch})


def evaluate(
    plan: Plan, model: Model, adapter: Adapter, objective: Objective, rows: Sequence[Row]
) -> tuple[float, float | None]:  # fmt: skip
    """The loss on rows that are not trained on; and of how many the label with the highest score is right.

    What an objective draws is drawn the same every time, so that two adapters see the same masks."""
    terms, right = list[tuple[int, float]](), list[Array]()
    for k in range(0, len(rows), plan.batch):
        batch = objective.batch(rows[k : k + plan.batch], random(plan, k, 2))
        out, _ = answer(model, adapter, batch)
        L, _, n = objective.loss(out, batch)
        terms.append((int(n), float(L)))
        scores = objective.scores(out, batch) if objective.scores else None
        if scores is not None and scores.shape[-1] > 1:
            right.append(scores.argmax(-1) == batch["labels"])
    loss = sum(n * L for n, L in terms) / (sum(n for n, _ in terms) or 1)
    return loss, float(np.concatenate(right).mean()) if right else None


def fitting(model: Model) -> list[str]:
    """The objectives that fit a model's head, the nearest first."""
    if not language(model):
        return ["classification"]
    if model.config.encoder_decoder:
        return [n for n in NAMES if n in ("seq2seq", "lm-adaptation") or n.startswith("span")]
    return ["causal", "seq2seq", "lm-adaptation", "template"] if model.config.causal else ["masked", "template"]


def update(plan: Plan, model: Model, state: State, grads: Mapping[str, Array]) -> optim.Updated:
    """The optimiser's step with this step's learning rate, or rates."""
    turn = OPTIMIZERS[plan.optimizer][1]
    options = dict(plan.own)
    if plan.optimizer == "sgd":
        options |= {"momentum": plan.momentum, "nesterov": plan.nesterov}
    own = {n: v for n, v in state.moments.items() if not n.startswith(OWN)}
    if options.get("relative_step"):
        return turn(state.params, grads, own, weight_decay=plan.weight_decay, **options)
    factor = SCHEDULES[plan.schedule](state.step, plan.warmup, plan.steps)
    if plan.loraplus_ratio is None:
        return turn(state.params, grads, own, lr=plan.lr * factor, weight_decay=plan.weight_decay, **options)
    rates, decays = optim.loraplus(
        state.params, plan.lr, plan.loraplus_ratio, plan.weight_decay, plan.loraplus_embedding, norms(model)
    )
    rates = {name: lr * factor for name, lr in rates.items()}
    return turn(state.params, grads, own, lr=rates, weight_decay=decays, **options)


def norms(model: Model) -> list[str]:
    return [site.path for site in model.sites.values() if site.kind in ("layer_norm", "rms_norm")]


def random(plan: Plan, turn: int, use: int) -> np.random.Generator:
    """A generator of its own for every batch and use."""
    return np.random.default_rng([plan.seed, 1, turn, use])


def chosen(plan: Plan, count: int, turn: int) -> list[int]:
    """The rows of batch number `turn`: the next ones of an endless row of permutations of all."""
    places = range(turn * plan.batch, (turn + 1) * plan.batch)
    turns = dict.fromkeys(n // count for n in places)
    orders = {k: np.random.default_rng([plan.seed, 0, k]).permutation(count) for k in turns}
    return [int(orders[n // count][n % count]) for n in places]


def dropped(adapter: Adapter, model: Model, batch: Batch, rng: np.random.Generator) -> Adapter:
    """With fresh dropout masks, if the method has them."""
    rates = [name for name in DROPOUTS if getattr(adapter.config, name, 0)]
    if not rates:
        return adapter
    ids = batch["input_ids"]
    seed = int(rng.integers(2**62))
    return dropout(adapter, model, ids.shape, seed, batch.get("decoder_input_ids", ids).shape)  # type: ignore[union-attr]


def trained(adapter: Adapter, state: State) -> Adapter:
    done = replace(adapter, params=state.params, masks={})
    finished = getattr(METHODS[adapter.method], "finished", None)
    own = {n.removeprefix(OWN): v for n, v in state.moments.items() if n.startswith(OWN)}
    return finished(done, own) if finished else done
