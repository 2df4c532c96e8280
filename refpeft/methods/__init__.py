"""The methods. Each is one module; to add one, write it and name it here."""

from collections.abc import Mapping

from refpeft.method import Method
from refpeft.registry import Modules

NAMES = (
    "lora", "rslora", "dora", "adalora", "dylora", "loha", "lokr", "glora", "oft", "boft", "ia3", "vera", "full",
    "partial", "bitfit", "ln_tuning", "trainable_tokens", "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2",
    "did", "said", "houlsby", "pfeiffer", "parallel",
)  # fmt: skip
METHODS: Mapping[str, Method] = Modules(__name__, NAMES)
