"""An exported graph against the specification: the measured ratio, for two batch sizes and two lengths, with padding.

    ratio = ‖got − ref64‖ / max(‖spec − ref64‖, u ‖ref64‖)

ref64 is the specification in float64, spec the specification in the dtype of the graph, u the dtype's unit roundoff:
the graph may be off by a few times what rounding explains. Ten steps of training also by what ref64 itself moves by if
every number is moved by half a unit in its last place. A float32 graph is compared with base and adapters as they
are, merging included; one of float16, or with weights of bfloat16 or 4 bits, with the specification on the same rounded
weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.conformance.numbers import signs
from refpeft.export import graphs, runtime, seq2seq
from refpeft.export.form import Answer, Check, Form, Spec, Subject, dtypes, named, trained, with_values
from refpeft.export.runtime import Runner
from refpeft.export.signature import caches
from refpeft.model import Model
from refpeft.tune import merge

Array = np.ndarray[Any, Any]
Past = Mapping[str, Array]
LIMIT = 10.0
DRAWS = 8
BATCHES, LENGTHS = (1, 3), (5, 12)


class MismatchError(ArithmeticError):
    """The exported graph does not compute what the specification says."""


def ready(device: str | None = None) -> None:
    """Can verification run here, and on this device? Asked before anything is written."""
    try:
        runtime.offered(device)
    except ImportError as error:
        raise ImportError(f"{error} (verification runs the export; --no-verify leaves it out)") from error


@dataclass(frozen=True)
class Verified:
    """Where it ran, and the measured ratios. `on_cpu`: on a GPU, the operators of the nodes that stayed on the CPU."""

    provider: str | None = None
    cases: Sequence[Mapping[str, Any]] = ()
    on_cpu: Mapping[str, int] = field(default_factory=dict)

    @property
    def worst(self) -> Mapping[str, Any]:
        return max(self.cases, key=lambda c: float(c["ratio"]))


def verify(folder: Path, subject: Subject, form: Form, device: str | None = None) -> Verified:
    """What was measured, if all of it is within the limit."""
    found = measured(folder, subject, form, device)
    worst = found.worst
    if not all(c["ratio"] <= LIMIT for c in found.cases):
        where = " on CUDA" if found.provider == runtime.CUDA else ""
        raise MismatchError(
            f"the exported graph differs from the specification by {worst['ratio']:.3g} times what rounding explains"
            f"{where} ({worst['what'] + ', ' if worst['what'] else ''}batch {worst['batch']}, length "
            f"{worst['length']}; the limit is {LIMIT:g}), so it was not kept"
        )
    return found


def measured(folder: Path, subject: Subject, form: Form, device: str | None = None) -> Verified:
    """The ratio of each check. One of the three is in memory at a time."""
    checks = form.checks(subject)
    model, adapters = rounded(subject, form.FOLDS)
    specs = [check.spec(model, adapters) for check in checks]
    model, adapters = cast(model, np.float64), [in_dtype(a, np.float64) for a in adapters]
    refs = [check.spec(model, adapters) for check in checks]
    runner = runtime.open_graph(folder, device)
    cases: list[dict[str, Any]] = []
    for check, ref, spec in zip(checks, refs, specs, strict=True):
        got, moved = named_answer(check.ask(runner)), amplified(check, model, adapters)
        off = largest(got, named_answer(ref), named_answer(spec), subject.dtype, moved)
        cases.append({"batch": check.batch, "length": check.length, "what": check.what, "ratio": off})
    return Verified(runtime.provider(runner.session), cases, runtime.on_cpu(runner))


def rounding(folder: Path, subject: Subject, form: Form, device: str | None = None) -> list[float]:
    """Of each check, how far the graph is from the specification on weights that were not rounded:
    ‖got − ref‖/‖ref‖. This says what the precision costs, not whether the graph is right."""
    runner = runtime.open_graph(folder, device)
    model, adapters = cast(subject.model, np.float64), [in_dtype(a, np.float64) for a in subject.adapters]
    found: list[float] = []
    for check in form.checks(subject):
        got, ref = named_answer(check.ask(runner)), named_answer(check.spec(model, adapters))
        y = next(iter(ref))
        found.append(distance(got[y], ref[y]) / float(np.linalg.norm(ref[y])))
    return found


def largest(
    got: Mapping[str, Array], ref: Mapping[str, Array], spec: Mapping[str, Array], dtype: np.dtype[Any],
    moved: Iterator[Mapping[str, Array]],
) -> float:  # fmt: skip
    """The largest ratio of all that was answered. What is `moved` is costly, and drawn only for what needs it."""
    if got.keys() != ref.keys():
        raise MismatchError(f"the exported graph answers {', '.join(got)}, expected {', '.join(ref)}")
    off = {name: ratio(y, ref[name], spec[name], dtype) for name, y in got.items()}
    while (far := [name for name, r in off.items() if not r <= LIMIT / 4]) and (draw := next(moved, None)):
        for name in far:
            if allowed := distance(draw[name], ref[name]):
                off[name] = min(off[name], distance(got[name], ref[name]) / allowed)
    return max(float("inf") if np.isnan(r) else r for r in off.values())


def named_answer(answer: Answer) -> Mapping[str, Array]:
    return answer if isinstance(answer, Mapping) else {"": answer}


def amplified(check: Check, model: Model, adapters: Sequence[Adapter]) -> Iterator[Mapping[str, Array]]:
    """What the specification answers in float64 if all numbers are moved by half a unit in their last place in float32:
    as the yardstick of `refpeft check` has it."""

    def by(draw: int, tensors: Mapping[str, Array]) -> dict[str, Array]:
        half = 2.0**-24
        return {n: a * (1 + half * signs(draw, n, a.shape)) if a.dtype.kind == "f" else a for n, a in tensors.items()}

    for k in range(DRAWS if check.amplifies else 0):
        own = [replace(a, params=by(k, a.params), frozen=by(k, a.frozen)) for a in adapters]
        yield named_answer(check.spec(replace(model, params=by(k, model.params)), own))


def rounded(subject: Subject, folded: bool) -> tuple[Model, Sequence[Adapter]]:
    """The model and adapters that the graph stands for, in the dtypes that it has."""
    model, adapters = cast(subject.model, np.float32), subject.adapters
    if subject.precision.exact and subject.dtype == np.float32:
        return model, [in_dtype(a, np.float32) for a in adapters]
    if folded:
        merged = replace(subject, model=merge(model, adapters))
        return cast(merged.seen, subject.dtype), []
    return cast(subject.seen, subject.dtype), [as_stored(subject, a) for a in adapters]


def as_stored(subject: Subject, adapter: Adapter) -> Adapter:
    adapter = trained(adapter)
    types = dtypes(subject, [adapter])
    return with_values([adapter], {n: a.astype(types[n], copy=False) for n, a in named([adapter]).items()})[0]


def checks(subject: Subject) -> list[Check]:
    """Every batch size and length."""
    make = kind(subject)
    return [make(subject, batch, length) for batch in BATCHES for length in LENGTHS]


def kind(subject: Subject) -> Callable[..., Check]:
    """How graphs of this kind are asked."""
    return across if graphs.apart(subject) else decoded if subject.decode else run


def alone(answer: Callable[[Model, Sequence[Adapter], slice], Array], which: Array | None) -> Spec:
    """The answer for all rows of a batch; or for each row by itself, with the one adapter that is its."""
    if which is None:
        return lambda model, adapters: answer(model, adapters, slice(None))

    def spec(model: Model, adapters: Sequence[Adapter]) -> Array:
        own = [[] if k < 0 else [adapters[k]] for k in which]
        return np.concatenate([answer(model, a, slice(k, k + 1)) for k, a in enumerate(own)])

    return spec


def run(subject: Subject, batch: int, length: int, which: Array | None = None) -> Check:
    inputs = example(subject.model, batch, length, virtual_ids(subject))
    ids, rest = inputs["input_ids"], {name: a for name, a in inputs.items() if name != "input_ids"}

    def ask(runner: Runner) -> Array:
        return runner.run({name: inputs[name] for name in runner.inputs})[runner.outputs[0]]

    def answer(model: Model, adapters: Sequence[Adapter], rows: slice) -> Array:
        return np.asarray(model(ids[rows], adapters, **{name: a[rows] for name, a in rest.items()})[0])

    return Check(batch, ids.shape[1], alone(answer, which), ask)


def decoded(
    subject: Subject, batch: int, length: int, which: Array | None = None, first: Past | None = None, shift: int = 0
) -> Check:
    """Read in two steps, the second with the keys and values that the first one left. `first`: those of a prefix,
    [1, g, n, e] each, by which the positions are moved if `shift` says so."""
    inputs = example(subject.model, batch, length, virtual_ids(subject))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = np.maximum(mask.cumsum(1) - 1, 0)
    steps = ((0, ids.shape[1] - 2), (ids.shape[1] - 2, ids.shape[1]))

    def answer(model: Model, adapters: Sequence[Adapter], rows: slice) -> Array:
        cache, found = None, []
        for a, z in steps:
            out, cache = model.decode(ids[rows, a:z], cache, adapters, mask[rows, :z], places[rows, a:z])
            found.append(out[:, -1:] if subject.last_logits else out)
        return np.concatenate(found, axis=1)

    def ask(runner: Runner) -> Array:
        past, found = start(subject.model, subject.dtype, batch, first), []
        seen = np.concatenate([np.ones((batch, next(iter(past.values())).shape[2]), np.int64), mask], axis=1)
        n = seen.shape[1] - mask.shape[1]
        for a, z in steps:
            feeds = {
                "input_ids": ids[:, a:z],
                "attention_mask": seen[:, : n + z],
                "position_ids": places[:, a:z] + shift,
            }
            out, *present = runner.run({**feeds, **past}).values()
            past = dict(zip(past, present, strict=True))
            found.append(out)
        return np.concatenate(found, axis=1)

    return Check(batch, ids.shape[1], alone(answer, which), ask, "decoding")


def across(subject: Subject, batch: int, length: int, which: Array | None = None, first: Past | None = None) -> Check:
    """An encoder-decoder: the encoder once, and the decoder in two steps, of which the second has keys and values of
    both from the first. `first`: those of a prefix, [1, h, n, e] each."""
    inputs = example(subject.model, batch, length, virtual_ids(subject))
    ids, mask, target = inputs["input_ids"], inputs["attention_mask"], inputs["decoder_input_ids"]
    steps = ((0, target.shape[1] - 2), (target.shape[1] - 2, target.shape[1]))

    def answer(model: Model, adapters: Sequence[Adapter], rows: slice) -> Array:
        cache, found = None, []
        for a, z in steps:
            out, cache = model.decode(ids[rows], cache, adapters, mask[rows], None, target[rows, a:z])
            found.append(out[:, -1:] if subject.last_logits else out)
        return np.concatenate(found, axis=1)

    def ask(runner: Runner) -> Array:
        (encoded,) = runner.encoded({"input_ids": ids, "attention_mask": mask}).values()
        past, found = seq2seq.start(subject.model.config, subject.dtype, batch, first), list[Array]()
        states, seen = seq2seq.behind(past, encoded, mask)
        known = {seq2seq.MASK: seen, seq2seq.STATES: states}
        for a, z in steps:
            out = runner.run({"input_ids": target[:, a:z], **known, **past})
            new = seq2seq.renewed(past, first=not found)
            past |= {name: out[name.replace("past_key_values", "present")] for name in new}
            found.append(out[runner.outputs[0]])
        return np.concatenate(found, axis=1)

    return Check(batch, ids.shape[1], alone(answer, which), ask, "decoding")


def start(model: Model, dtype: Any, batch: int, first: Past | None = None) -> dict[str, Array]:
    """The keys and values before the first token, for each row of the batch: those of a prefix, or none."""
    c = model.config
    if first is None:
        none = np.zeros((1, c.num_kv_heads, 0, c.head_dim), dtype)
        first = {name: none for pair in caches(model, "past_key_values") for name in pair}
    return {name: np.repeat(a, batch, axis=0) for name, a in first.items()}


def virtual_ids(subject: Subject) -> int:
    """How many virtual tokens a template may hold."""
    placements = [a for a in subject.adapters if getattr(a.config, "placement", None) == "template"]
    return sum(a.config.total for a in placements)


def cast(model: Model, dtype: Any) -> Model:
    """Without a copy of what has the dtype already."""
    return replace(model, params={n: v.astype(dtype, copy=False) for n, v in model.params.items()})


def in_dtype(a: Adapter, dtype: Any) -> Adapter:
    """What is no float stays as it is."""
    params, frozen = (
        {n: v if v.dtype.kind in "iub" else v.astype(dtype, copy=False) for n, v in values.items()}
        for values in (a.params, a.frozen)
    )
    return replace(a, params=params, frozen=frozen)


def example(model: Model, batch: int, length: int, virtual: int = 0) -> Mapping[str, Array]:
    """Random tokens, virtual ones too; of a batch, the second row is padded on the right and the third on the left."""
    rng = np.random.default_rng([batch, length])
    c = model.config
    length = min(length, longest(model))
    ids = rng.integers(0, vocabulary(model) + virtual, (batch, length))
    mask = np.ones_like(ids)
    mask[1::3, length - length // 3 :] = 0
    mask[2::3, : length // 2] = 0
    if c.pad_token_id is not None:
        ids[mask == 0] = c.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "embed.type" in model.sites:
        kinds = model.params[model.sites["embed.type"].weight].shape[0]
        inputs["token_type_ids"] = rng.integers(0, kinds, ids.shape)
    if "eos" in c.head and c.eos_token_id is not None:  # read at the place of the end of text
        ids[mask == 1] = np.where(ids[mask == 1] == c.eos_token_id, 0, ids[mask == 1])
        ids[:, length // 2] = c.eos_token_id
    if c.encoder_decoder:
        other = rng.integers(0, vocabulary(model), (batch, length // 2 + 1))
        inputs["decoder_input_ids"] = ids if "eos" in c.head else other
    return inputs


def vocabulary(model: Model) -> int:
    return int(model.params[model.sites["embed.token"].weight].shape[0])


def longest(model: Model) -> int:
    c = model.config
    n = model.sizes("encoder." if c.encoder_decoder else "")[1]
    if n is None:
        return 1 << 30
    return n - (c.position_offset if c.positions == "index" else (c.pad_token_id or 0) + 1)


def ratio(got: Array, ref: Array, spec: Array, dtype: np.dtype[Any]) -> float:
    unit = float(np.finfo(dtype).eps) / 2
    off, allowed = distance(got, ref), max(distance(spec, ref), unit * float(np.linalg.norm(ref)))
    return off / allowed if allowed else (0.0 if off == 0 else float("inf"))


def distance(x: Array, ref: Array) -> float:
    return float(np.linalg.norm(x.astype(np.float64) - ref))
