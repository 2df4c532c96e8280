"""An exported graph against the specification: the measured ratio, for two batch sizes and two lengths, with padding.

    ratio = ‖got − ref64‖ / max(‖spec − ref64‖, u ‖ref64‖)

ref64 is the specification in float64, spec the specification in the dtype of the graph, u the dtype's unit roundoff:
the graph may be off by a few times what rounding explains. A float32 graph is compared with base and adapters as they
are, merging included; a float16 graph with the specification on the same rounded weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.adapter import Adapter
from refpeft.export import runtime
from refpeft.model import Model
from refpeft.tune import merge

Array = np.ndarray[Any, Any]
LIMIT = 10.0
BATCHES, LENGTHS = (1, 3), (5, 12)


class MismatchError(ArithmeticError):
    """The exported graph does not compute what the specification says."""


def ready() -> None:
    """Can verification run here? Asked before anything is written."""
    try:
        runtime.require()
    except ImportError as error:
        raise ImportError(f"{error} (verification runs the export; --no-verify leaves it out)") from error


def verify(
    folder: Path, model: Model, adapters: Sequence[Adapter], dtype: np.dtype[Any]
) -> tuple[str, list[dict[str, Any]]]:
    """onnxruntime's device and the ratio of each case. One of the three is in memory at a time."""
    examples = [example(model, batch, length) for batch in BATCHES for length in LENGTHS]
    model, adapters = subject(model, adapters, dtype)
    specs = outputs(model, adapters, examples)
    refs = outputs(cast(model, np.float64), [in_dtype(a, np.float64) for a in adapters], examples)
    session = runtime.session(folder / "model.onnx")
    names = [i.name for i in session.get_inputs()]
    cases = []
    for inputs, ref, spec in zip(examples, refs, specs, strict=True):
        got = session.run(None, {name: inputs[name] for name in names})[0]
        batch, length = inputs["input_ids"].shape
        cases.append({"batch": batch, "length": length, "ratio": ratio(got, ref, spec, dtype)})
    worst = max(cases, key=lambda c: c["ratio"])
    if not all(c["ratio"] <= LIMIT for c in cases):
        raise MismatchError(
            f"the exported graph differs from the specification by {worst['ratio']:.3g} times what rounding explains "
            f"(batch {worst['batch']}, length {worst['length']}; the limit is {LIMIT:g}), so it was not kept"
        )
    return runtime.provider(session), cases


def outputs(model: Model, adapters: Sequence[Adapter], examples: Sequence[Mapping[str, Array]]) -> list[Array]:
    """What the specification answers."""
    found = []
    for inputs in examples:
        ids, rest = inputs["input_ids"], {name: a for name, a in inputs.items() if name != "input_ids"}
        found.append(model(ids, adapters, **rest)[0])
    return found


def subject(model: Model, adapters: Sequence[Adapter], dtype: np.dtype[Any]) -> tuple[Model, Sequence[Adapter]]:
    """The model and adapters that the graph stands for, in its dtype."""
    model = cast(model, np.float32)
    if dtype == np.float32:
        return model, [in_dtype(a, np.float32) for a in adapters]
    return cast(merge(model, adapters), dtype), []


def cast(model: Model, dtype: Any) -> Model:
    """Without a copy of what has the dtype already."""
    return replace(model, params={n: v.astype(dtype, copy=False) for n, v in model.params.items()})


def in_dtype(a: Adapter, dtype: Any) -> Adapter:
    params, frozen = ({n: v.astype(dtype, copy=False) for n, v in values.items()} for values in (a.params, a.frozen))
    return replace(a, params=params, frozen=frozen)


def example(model: Model, batch: int, length: int) -> Mapping[str, Array]:
    """Random tokens; of a batch, the second row is padded on the right and the third on the left."""
    rng = np.random.default_rng([batch, length])
    c = model.config
    vocabulary = model.params[model.sites["embed.token"].weight].shape[0]
    length = min(length, longest(model))
    ids = rng.integers(0, vocabulary, (batch, length))
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
        inputs["decoder_input_ids"] = ids if "eos" in c.head else rng.integers(0, vocabulary, (batch, length // 2 + 1))
    return inputs


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
