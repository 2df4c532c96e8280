"""The methods. Each is one module; to add one, write it and name it here."""

from collections.abc import Mapping
from typing import cast

from refpeft.method import Method
from refpeft.methods import dora, lora, p_tuning, prompt_tuning, rslora

METHODS: Mapping[str, Method] = cast(
    Mapping[str, Method],
    {
        "lora": lora,
        "rslora": rslora,
        "dora": dora,
        "prompt_tuning": prompt_tuning,
        "p_tuning": p_tuning,
    },
)
