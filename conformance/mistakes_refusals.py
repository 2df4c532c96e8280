"""Mistakes with configs that should be refused: they are accepted, or refused without a reason."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import refpeft.tune
from refpeft.conformance.case import Case


def without(case: Case) -> Case:
    """The case as one sees it who does not look at the odd field."""
    name = case.meta["refuse"]
    if case.level == "layer":
        config = {n: v for n, v in case.meta["config"].items() if n != name}
        params = [n for n in case.meta["params"] if not (n == "bias" and name == "lora_bias")]
        return Case({**case.meta, "config": config, "params": params}, case.arrays)
    own = case.meta["adapters"]["default"]
    config = {n: v for n, v in own["config"].items() if n != name}
    return Case({**case.meta, "adapters": {"default": {**own, "config": config}}}, case.arrays)


def speechless() -> Sequence[Any]:
    def checked(m: Any, fields: Any) -> None:
        raise ValueError("invalid argument")

    return [patch.object(refpeft.tune, "check_types", checked)]
