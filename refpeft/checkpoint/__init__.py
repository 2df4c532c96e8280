"""HF model and adapter folders ↔ arrays."""

from typing import Any


def load(path: Any, dtype: Any = None) -> Any:
    raise NotImplementedError


load_adapter = save = save_adapter = load
