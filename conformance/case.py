"""A case: one question to an implementation, in one `.safetensors` file.

The arrays are the file's tensors; the question is JSON in its header, under the key `refpeft`. The same file is the
wire format to targets in any language, the reproducer of a failure, and (with the answers in it) a golden vector.
What the fields mean: docs/conformance-protocol.md and `schema/case.json`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from refpeft.ops import Array

HEADER = "refpeft"
EXPECT = "expect/"  # before the names of answers
ANSWERS = ("limit", "units")  # fields about answers
DTYPES: Mapping[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


@dataclass(frozen=True)
class Case:
    meta: Mapping[str, Any]
    arrays: Mapping[str, Array]

    @property
    def level(self) -> str:
        return str(self.meta["level"])

    @property
    def method(self) -> str:
        return str(self.meta["method"])

    @property
    def expected(self) -> dict[str, Array]:
        """The answers in a golden vector."""
        return {n.removeprefix(EXPECT): a for n, a in self.arrays.items() if n.startswith(EXPECT)}

    @property
    def question(self) -> "Case":
        """Without the answers."""
        meta = {k: v for k, v in self.meta.items() if k not in ANSWERS}
        return Case(meta, {n: a for n, a in self.arrays.items() if not n.startswith(EXPECT)})

    def map(self, f: Callable[[str, Array], Array]) -> "Case":
        """The same question about other numbers: f(name, array) for every floating array."""
        return Case(self.meta, {name: f(name, a) if is_float(a) else a for name, a in self.arrays.items()})

    def in_float64(self) -> "Case":
        """The same numbers, exactly, in a dtype in which rounding hardly counts."""
        return self.map(lambda name, a: a.astype(np.float64))

    def save(self, path: str | Path) -> None:
        write(Path(path), self.arrays, {HEADER: json.dumps(self.meta, ensure_ascii=False)})

    @classmethod
    def read(cls, path: str | Path) -> "Case":
        arrays, header = read(Path(path))
        if HEADER not in header:
            raise ValueError(f"{path}: expected a case, with the key {HEADER!r} in the file's metadata; found none")
        meta = json.loads(header[HEADER])
        missing = [k for k in ("spec_version", "level", "method", "property") if k not in meta]
        if missing:
            raise ValueError(f"{path}: the case has no field {missing[0]!r}")
        return cls(meta, arrays)


def is_float(a: Array) -> bool:
    return a.dtype.kind == "f" or bool(a.dtype == ml_dtypes.bfloat16)


def write(path: Path, arrays: Mapping[str, Array], header: Mapping[str, str] | None = None) -> None:
    """A safetensors file of arrays, each laid out row by row whatever its strides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = dict(header) if header else None  # of no arrays and {} safetensors 0.8 makes a file that it cannot read
    save_file({name: np.array(a, order="C") for name, a in arrays.items()}, str(path), about)


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and metadata of a safetensors file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="np") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, found something else ({error})") from None
