"""An adapter of every method for a tiny model of every family, its parameters moved away from where they start."""

from typing import Any

import numpy as np

import refpeft
from refpeft.adapter import Adapter
from refpeft.methods import METHODS
from refpeft.model import Model
from tests.models import tiny

FAMILIES = ("gpt2", "llama", "qwen2", "bert", "roberta")
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora": {"r": 2, "lora_alpha": 6, "lora_bias": True},
    "dora": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "adalora": {"init_r": 3, "target_r": 1, "total_step": 10},
    "vera": {"r": 3, "target_modules": "all-linear"},
    "dylora": {"r": 4, "rank": 2, "alpha": 6, "target_modules": "all-linear"},
    "loha": {"r": 2, "alpha": 6, "target_modules": "all-linear"},
    "lokr": {"r": 1, "alpha": 6, "decompose_both": True, "target_modules": "all-linear"},
    "glora": {"r": 2, "alpha": 6, "target_modules": "all-linear"},
    "oft": {"oft_block_size": 4, "target_modules": "all-linear"},
    "boft": {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
    "partial": {"layers": 1},
    "trainable_tokens": {"token_indices": [3, 1, 5]},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 4},
    "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 4},
    "p_tuning_v2": {"num_virtual_tokens": 3},
    "did": {"d": 5},
    "said": {"d": 80},
}
CLASSIFIER = {"p_tuning_v2": "ForSequenceClassification"}
UNDEFINED = {("bitfit", "llama")}  # it has no biases
CASES = [(m, f) for m in METHODS for f in FAMILIES if (m, f) not in UNDEFINED]


def made(method: str, family: str, **config: Any) -> tuple[Model, Adapter]:
    model = tiny(family, CLASSIFIER.get(method), dtype=np.float32)
    return model, moved(refpeft.init(method, {**SMALL.get(method, {}), **config}, model, seed=1))


def moved(adapter: Adapter, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    return adapter.replace(
        params={n: a + (0.1 * rng.normal(size=a.shape)).astype(np.float32) for n, a in adapter.params.items()}
    )
