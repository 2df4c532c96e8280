"""How the adapters of one kind of method lie on disk: adapter_config.json and adapter_model.safetensors.

A module of this shape, named in `refpeft.checkpoint.adapters.FORMATS`.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from refpeft.adapter import Adapter
from refpeft.model import Model
from refpeft.ops import Array


class Format(Protocol):
    METHODS: Collection[str]  # of `refpeft.methods`, that are saved in this format
    PEFT_TYPES: Collection[str]  # values of `peft_type` in adapter_config.json

    def read(self, raw: Mapping[str, Any], tensors: Mapping[str, Array], model: Model) -> Adapter: ...
    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Array]]: ...
