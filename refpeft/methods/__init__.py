"""The methods. Each is one module; to add one, write it and name it here."""

from collections.abc import Mapping
from typing import cast

from refpeft.method import Method
from refpeft.methods import dora, lora, p_tuning_v2, prefix_tuning, rslora

METHODS: Mapping[str, Method] = cast(
    Mapping[str, Method],
    {
        "lora": lora,
        "rslora": rslora,
        "dora": dora,
        "prefix_tuning": prefix_tuning,
        "p_tuning_v2": p_tuning_v2,
    },
)
