"""training: loss, backward pass and a step of the optimiser as one graph, which any runtime for inference runs.

    in     input_ids, attention_mask (, token_type_ids) (, decoder_input_ids), labels, learning_rate []
           adapter.<parameter>, state.<…>
    out    loss [], logits, next.adapter.<parameter>, next.state.<…>

The base weights are inside and frozen. The gradients are those of the specification, derived by hand; the optimiser is
`refpeft.optim`, the same lines. Labels are as in transformers: not shifted, −100 where nothing is predicted; of a
classifier, a class for each row. Without dropout.

What a method does in training besides (`refpeft.train`), AdaLoRA's penalty and budget, is in the step, and what it
remembers in the state, state.method.<…>. The loss is without the penalty.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.checkpoint import safetensors
from refpeft.checkpoint.adapters import contents
from refpeft.export import training, verification
from refpeft.export.form import Array, Check, Made, Store, Subject, base_tensors, dtypes, named, needed, symbolic
from refpeft.export.form import symbols as inputs_of
from refpeft.export.runtime import Runner
from refpeft.export.signature import BATCH, DECODED, INT, SEQUENCE, output_name, tokens
from refpeft.export.symbols import Graph
from refpeft.export.training import ADAPTER, NEXT, STATE, Optimizer
from refpeft.model import Model
from refpeft.objectives import IGNORE
from refpeft.train import answer_and_gradient

FOLDS = False
OPTIONS = True
RATE = "learning_rate"
STEPS, LR = 10, np.float32(0.01)  # of verification


def check(subject: Subject) -> None:
    if len(subject.adapters) != 1:
        raise ValueError(f"the form training needs one adapter, which is trained, found {len(subject.adapters)}")
    if subject.decode:
        raise ValueError("the form training reads whole texts, and does not decode")
    if subject.dtype != np.float32:
        raise ValueError(f"the form training computes in float32, found {subject.dtype}")
    training.objective(subject.model)
    training.optimizer(subject.options)
    contents(subject.adapters[0])  # refused if it could not be saved


def trainee(subject: Subject) -> Adapter:
    """The adapter in the dtypes of the graph."""
    (adapter,) = subject.adapters
    types = dtypes(subject, [adapter])
    params, frozen = (
        {n: np.asarray(a, types[ADAPTER + n]) for n, a in tensors.items()}
        for tensors in (adapter.params, adapter.frozen)
    )
    return adapter.replace(params=params, frozen=frozen)


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    o, adapter = training.optimizer(subject.options), trainee(subject)
    model = symbolic(graph, subject.model, subject.dtype)
    batch: dict[str, Any] = tokens(graph, model)
    batch["labels"] = graph.input("labels", *labels_of(subject.model))
    rate = graph.input(RATE, np.float32, ())
    values, start = named([adapter]), training.starting(adapter, o)
    types = {n: a.dtype for n, a in {**values, **start}.items()}
    fed = inputs_of(graph, {**values, **start}, types)
    own = adapter.replace(params=picked(fed, adapter.params), frozen=picked(fed, adapter.frozen))
    out, L, _, grads = answer_and_gradient(model, own, training.loss_for(model), batch)
    state = {n.removeprefix(STATE): x for n, x in fed.items() if n.startswith(STATE)}
    params, after = o.step(model, own, grads, state, rate)
    outputs = {"loss": L, output_name(model): out}
    outputs |= {NEXT + ADAPTER + n: x for n, x in params.items()} | {NEXT + STATE + n: x for n, x in after.items()}
    frozen = [(n, a, types[n]) for n, a in values.items() if n not in start]
    tensors = store(needed(graph, outputs, [*base_tensors(subject), *frozen]))
    card = {"training": {"optimizer": o.name, **o.options, "objective": training.objective(model)}}
    return Made([*batch, RATE, *start], outputs, tensors, subject.model, card=card)


def picked(fed: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {n: fed[ADAPTER + n] for n in names}


def labels_of(model: Model) -> tuple[np.dtype[Any], Sequence[str]]:
    """Of the input: a class or a number for each row, or a token for each place."""
    if training.pooled(model):
        return np.dtype(np.float32) if training.regression(model) else INT, (BATCH,)
    return INT, (BATCH, DECODED if model.config.encoder_decoder else SEQUENCE)


def complete(folder: Path, subject: Subject, made: Made) -> None:
    """What the first step starts from."""
    o = training.optimizer(subject.options)
    safetensors.write(folder / training.START, training.starting(trainee(subject), o))


# ── verification ─────────────────────────────────────────────────────────────────────────────────────────────────────


def checks(subject: Subject) -> list[Check]:
    """Ten steps, each from what the one before left: losses, and parameters and state in the end."""
    shapes = list(zip(verification.BATCHES, verification.LENGTHS, strict=True))
    batches = [example(subject, *shapes[n % len(shapes)], n) for n in range(STEPS)]
    o = training.optimizer(subject.options)
    v = warm(subject, o, batches[0])

    def ask(runner: Runner) -> dict[str, Array]:
        values = safetensors.read(runner.folder / training.START) | v
        return turns(values, lambda values, batch: runner.run({**batch, **values, RATE: np.array(LR)}), batches)

    batch, length = shapes[-1]
    what = f"{STEPS} steps of {o.name}"
    return [Check(batch, length, lambda m, a: specified(m, a[0], o, batches, v), ask, what, amplifies=True)]


def warm(subject: Subject, o: Optimizer, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Second moments of the size of the gradients' squares, to begin with instead of zeros. From zeros, Adam's first
    steps are ±η however small a gradient is, and of those that are all rounding each runtime has its own signs."""
    if not o.options.get("betas"):
        return {}
    adapter = trainee(subject)
    loss = training.loss_for(subject.model)
    *_, grads = answer_and_gradient(verification.cast(subject.model, np.float32), adapter, loss, dict(batch))
    square = sum(float((g * g).sum()) for g in grads.values()) / sum(g.size for g in grads.values())
    v = np.float32((1 - o.options["betas"][1]) * square)
    return {f"{STATE}v.{n}": np.full_like(a, v) for n, a in adapter.params.items()}


def specified(
    model: Model, adapter: Adapter, o: Optimizer, batches: Sequence[Mapping[str, Array]], v: Mapping[str, Array]
) -> dict[str, Array]:  # fmt: skip
    """What the specification answers."""
    loss = training.loss_for(model)

    def step(values: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        own = adapter.replace(params=picked(values, adapter.params))
        _, L, _, grads = answer_and_gradient(model, own, loss, dict(batch))
        state = {n.removeprefix(STATE): a for n, a in values.items() if n.startswith(STATE)}
        params, after = o.step(model, own, grads, state, float(LR))
        new = {NEXT + ADAPTER + n: a for n, a in params.items()} | {NEXT + STATE + n: a for n, a in after.items()}
        return {"loss": np.asarray(L), **new}

    start = training.starting(adapter, o)
    return turns({**start, **{n: a.astype(start[n].dtype) for n, a in v.items()}}, step, batches)


def turns(
    values: Mapping[str, Array],
    step: Callable[[Mapping[str, Array], Mapping[str, Array]], Mapping[str, Array]],
    batches: Sequence[Mapping[str, Array]],
) -> dict[str, Array]:
    """The losses of all steps, and what is left after the last."""
    losses = []
    for batch in batches:
        out = step(values, batch)
        losses.append(float(out["loss"]))
        values = training.carried(out)
    return {"loss": np.array(losses), **values}


def example(subject: Subject, batch: int, length: int, seed: int) -> dict[str, Array]:
    """Random texts and labels, of which a third is to be ignored."""
    inputs = dict(verification.example(subject.model, batch, length, verification.virtual_ids(subject)))
    rng = np.random.default_rng(seed)
    out = subject.model.sites["head.out"]
    count = subject.model.params[out.weight].shape[0]
    if training.pooled(subject.model):
        dtype, _ = labels_of(subject.model)
        labels = rng.normal(size=batch) if dtype != INT else rng.integers(0, count, batch)
        return {**inputs, "labels": labels.astype(dtype)}
    shape = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
    labels = rng.integers(0, count, shape)
    return {**inputs, "labels": np.where(np.arange(shape[1]) % 3 == 0, IGNORE, labels)}
