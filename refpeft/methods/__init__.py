"""The methods. Each is one module; to add one, write it and name it here."""

from collections.abc import Mapping
from typing import cast

from refpeft.method import Method
from refpeft.methods import (
    adalora,
    bitfit,
    boft,
    did,
    dora,
    full,
    glora,
    houlsby,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    oft,
    p_tuning,
    p_tuning_v2,
    parallel,
    partial,
    pfeiffer,
    prefix_tuning,
    prompt_tuning,
    rslora,
    said,
    trainable_tokens,
    vera,
)

METHODS: Mapping[str, Method] = cast(
    Mapping[str, Method],
    {
        "lora": lora,
        "rslora": rslora,
        "dora": dora,
        "adalora": adalora,
        "loha": loha,
        "lokr": lokr,
        "glora": glora,
        "oft": oft,
        "boft": boft,
        "ia3": ia3,
        "vera": vera,
        "full": full,
        "partial": partial,
        "bitfit": bitfit,
        "ln_tuning": ln_tuning,
        "trainable_tokens": trainable_tokens,
        "prompt_tuning": prompt_tuning,
        "p_tuning": p_tuning,
        "prefix_tuning": prefix_tuning,
        "p_tuning_v2": p_tuning_v2,
        "did": did,
        "said": said,
        "houlsby": houlsby,
        "pfeiffer": pfeiffer,
        "parallel": parallel,
    },
)
