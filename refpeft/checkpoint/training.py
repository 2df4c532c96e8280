"""A training run that can go on: `step-N` folders of state.safetensors and state.json, each written whole.

The tensors are 'params.<name>', 'moments.<name>' and 'losses'. state.json holds the step, and everything else that
decides how the run goes on; `load_state` refuses a state that was made under other conditions.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refpeft.checkpoint import folder, safetensors
from refpeft.checkpoint.safetensors import Malformed, show
from refpeft.train import State

FORMAT = "refpeft-training-1"
FILE, JSON = "state.safetensors", "state.json"


def save_state(path: str | os.PathLike[str], state: State, conditions: Mapping[str, Any]) -> None:
    """Make the folder `path`/step-N; when it is whole, those of earlier steps go."""
    where = Path(path)
    where.mkdir(exist_ok=True)
    tensors = {f"params.{name}": a for name, a in state.params.items()}
    tensors |= {f"moments.{name}": a for name, a in state.moments.items()} | {"losses": state.losses}
    with folder.new_folder(where / f"step-{state.step}") as new:
        safetensors.write(new / FILE, tensors)
        safetensors.write_json(new / JSON, {"format": FORMAT, "step": state.step, "conditions": dict(conditions)})
    for step, old in steps(where).items():
        if step < state.step:
            shutil.rmtree(old, ignore_errors=True)


def steps(where: Path) -> dict[int, Path]:
    """The whole states in a folder, by step."""
    found = where.iterdir() if where.is_dir() else ()
    return {int(m[1]): p for p in found if (m := re.fullmatch(r"step-(\d{1,9})", p.name)) and p.is_dir()}


def load_state(path: str | os.PathLike[str], like: State, conditions: Mapping[str, Any]) -> State:
    """The last state, which must have been made under these conditions. `like`: a state of the same run, whose tensors
    say which names, shapes and dtypes there must be."""
    there = steps(Path(path))
    if not there:
        raise Malformed(f"{path}: there is no training state to go on from")
    where = there[max(there)]
    meta = safetensors.read_json(where / JSON)
    if meta.get("format") != FORMAT or meta.get("step") != max(there) or not isinstance(meta.get("conditions"), dict):
        raise Malformed(f"{where / JSON}: not the state of step {max(there)} in format {FORMAT!r}")
    agree(where, meta["conditions"], conditions)
    tensors = {name: a.copy() for name, a in folder.tensors(where, "state").items()}
    params = taken(where, tensors, "params.", like.params)
    moments = taken(where, tensors, "moments.", like.moments)
    losses = tensors.pop("losses", None)
    if losses is None or losses.shape != (max(there),) or losses.dtype != like.losses.dtype or tensors:
        raise Malformed(f"{where / FILE}: expected the tensors of this run at step {max(there)} and no others")
    return State(max(there), params, moments, losses)


def agree(where: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in [*now, *then]:
        if then.get(name) != now.get(name):
            was, is_ = show(then.get(name)), show(now.get(name))
            raise Malformed(f"{where}: this run began with {name} {was} and cannot go on with {is_}")


def taken(where: Path, tensors: dict[str, Any], prefix: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of one kind, in the order of `like`."""
    found: dict[str, Any] = {}
    for name, a in like.items():
        b = tensors.pop(prefix + name, None)
        if b is None or b.shape != a.shape or b.dtype != a.dtype:
            has = "it is missing" if b is None else f"found {b.dtype} {list(b.shape)}"
            raise Malformed(f"{where / FILE}: tensor {prefix + name!r} must be {a.dtype} {list(a.shape)}, {has}")
        found[name] = b
    return found
