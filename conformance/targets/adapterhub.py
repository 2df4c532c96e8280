"""AdapterHub's names for what the cases say: configs, and where each tensor of an adapter lies in a model of theirs.

What AdapterHub cannot be asked is a `Skip` with the reason. A Q, K and V that are one layer (GPT-2's) have an A each
there, [A_q; A_k; A_v], and B for each of them: a LoRA of HF peft is the one whose three A are the same, and its
gradient of A is the sum of theirs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import adapters  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import torch
from adapters.methods.bottleneck import BottleneckLayer  # type: ignore[import-not-found, unused-ignore]
from adapters.methods.lora import (  # type: ignore[import-not-found, unused-ignore]
    LoRALayer,
    LoRAMergedLinear,
)
from transformers.pytorch_utils import Conv1D

from refpeft import methods
from refpeft.conformance.targets.base import Skip
from refpeft.method import matches
from refpeft.methods.prefix_tuning import NAMES
from refpeft.ops import Array

Config = Mapping[str, Any]
STACKS = {"self_prefix": "", "encoder_prefix": "encoder.", "cross_prefix": "cross."}
Reshape = Callable[[Array], Array]


@dataclass(frozen=True)
class Place:
    """A tensor of ours: the parameter that it is there, and how to get there and back; `pull` is for gradients."""

    name: str
    param: Any
    there: Reshape
    back: Reshape
    pull: Reshape
    copies: int = 1  # of ours, that are there


def place(name: str, param: Any, *shape: int) -> Place:
    """The same numbers, reshaped where ours has another shape."""

    def back(a: Array) -> Array:
        return a.reshape(shape) if shape else a

    return Place(name, param, lambda a: a.reshape(param.shape), back, back)


def head_places(names: Sequence[str] | None, model: Any) -> Iterator[Place]:
    """What is trained whole stands in the model itself, and belongs to all its adapters."""
    whole = [path for path, _ in model.named_modules() if path and path.endswith(tuple(names or ()))]
    for path, param in model.named_parameters():
        if any(path.startswith(f"{module}.") for module in whole):
            yield place(path, param)


# ── LoRA and DoRA ────────────────────────────────────────────────────────────────────────────────────────────────────


FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "use_dora",
    "detach_norm",
)  # of LoRA's config, which this driver translates


def lora_config(config: Config, model: Any) -> Any:
    more = {"use_dora": True} if config.get("use_dora") else {}
    return adapters.LoRAConfig(**spots(config, model), r=config["r"], alpha=config["lora_alpha"], **more)


def ia3_config(config: Config, model: Any) -> Any:
    """Its vectors are on what layers give, those of the feed-forward network too."""
    if config.get("feedforward_modules") != []:
        raise Skip("AdapterHub scales what layers give, and never what they take: feedforward_modules []")
    return adapters.IA3Config(**spots({n: v for n, v in config.items() if n != "feedforward_modules"}, model))


def ia3_places(model: Any, adapter: str) -> Iterator[Place]:
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer) and adapter in module.loras:
            ia3 = module.loras[adapter]
            yield times(ia3.scaling, place(f"{path}.ia3_l", ia3.lora_B, ia3.lora_B.numel(), 1))


def times(α: float, p: Place) -> Place:
    """Ours is α of what is there."""
    return replace(p, there=lambda a: p.there(a) / α, back=lambda a: p.back(a) * α, pull=lambda a: p.pull(a) / α)


def spots(config: Config, model: Any) -> dict[str, Any]:
    """Which of its places AdapterHub adapts, so that these are the targeted modules, and no others."""
    if out := [name for name in config if name not in FIELDS]:
        raise Skip(f"AdapterHub's LoRAConfig has nothing for {out[0]!r}")
    names = config["target_modules"]
    layers = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    chosen = {path: m for path, m in layers.items() if matches(names, path)}
    if out := [path for path, m in chosen.items() if not isinstance(m, LoRALayer)]:
        raise Skip(f"AdapterHub has no LoRA at {out[0]}")
    if out := [name for name in names if not any(matches([name], path) for path in chosen)]:
        raise Skip(f"AdapterHub has no LoRA at {out[0]}")
    wanted = {spot(m) for m in chosen.values()}
    if out := [path for path, m in layers.items() if path not in chosen and spot(m) in wanted]:
        raise Skip(f"AdapterHub puts a LoRA at {out[0]} too")
    matrices = [key for where, key in wanted if where == "selfattn_lora"]
    return {
        "selfattn_lora": bool(matrices), "intermediate_lora": ("intermediate_lora", None) in wanted,
        "output_lora": ("output_lora", None) in wanted,
        "attn_matrices": ["q", "k", "v"] if None in matrices else matrices,
    }  # fmt: skip


def spot(module: Any) -> tuple[str, str | None]:
    """What of LoRAConfig decides whether this module is adapted."""
    return getattr(module, "location_key", ""), getattr(module, "attn_key", None)


def lora_places(model: Any, adapter: str) -> Iterator[Place]:
    for path, module in model.named_modules():
        if not isinstance(module, LoRALayer) or adapter not in module.loras:
            continue
        lora = module.loras[adapter]
        A = place(f"{path}.lora_A.weight", lora.lora_A)
        yield three(A) if isinstance(module, LoRAMergedLinear) else A
        yield place(f"{path}.lora_B.weight", lora.lora_B)
        if hasattr(lora, "m"):
            yield place(f"{path}.lora_magnitude_vector", lora.m.weight, -1)


def three(A: Place) -> Place:
    def back(a: Array) -> Array:
        one = np.split(a, 3)[0]
        return one if np.array_equal(np.tile(one, (3, 1)), a) else a

    return Place(A.name, A.param, lambda a: np.tile(a, (3, 1)), back, lambda g: np.stack(np.split(g, 3)).sum(0), 3)


# ── prompts and prefixes ─────────────────────────────────────────────────────────────────────────────────────────────


def prompt_config(config: Config, model: Any) -> Any:
    if config.get("placement") != "after_embedding":
        raise Skip("AdapterHub puts a prompt behind the embeddings: placement 'after_embedding'")
    return adapters.PromptTuningConfig(prompt_length=config["num_virtual_tokens"])


def prompt_places(model: Any, adapter: str) -> Iterator[Place]:
    yield place("prompt_embeddings", model.base_model.prompt_tuning.prompt_tunings[adapter].prompt_embedding.weight)


def prefix_config(config: Config, model: Any) -> Any:
    mlp, width = config.get("prefix_projection", False), model.config.hidden_size
    if config.get("position_shift", True):
        raise Skip("AdapterHub leaves the tokens where they are: position_shift false")
    if mlp and (config.get("input_size"), config.get("encoder_hidden_size")) != (width, config["encoder_hidden_size"]):
        raise Skip(f"AdapterHub's embedding has the width of the model: input_size {width}")
    more = {"bottleneck_size": config["encoder_hidden_size"]} if mlp else {}
    return adapters.PrefixTuningConfig(
        flat=not mlp, prefix_length=config["num_virtual_tokens"], leave_out=list(config.get("leave_out", ())), **more
    )


def prefix_places(model: Any, adapter: str) -> Iterator[Place]:
    """Of an encoder-decoder three of them; of another model the one of its only stack."""
    one_stack = not model.config.is_encoder_decoder
    for there, prefix in model.base_model.prefix_tuning.prefix_tunings[adapter].items():
        stack = "" if one_stack else STACKS[there]
        if hasattr(prefix, "wte"):
            one, two = prefix.control_trans[0], prefix.control_trans[2]
            params = {"E": prefix.wte.weight, "W1": one.weight, "b1": one.bias, "W2": two.weight, "b2": two.bias}
            yield from (place(stack + NAMES[n], p) for n, p in params.items())
        else:
            yield place(stack + NAMES["P"], prefix.control_trans, prefix.config.prefix_length, -1)


# ── bottlenecks ──────────────────────────────────────────────────────────────────────────────────────────────────────

OURS = {"train_norms": False, "modules_to_save": None, "normed_input": False}  # of which AdapterHub has only this


def bottleneck_config(method: str, config: Config, model: Any) -> Any:
    """All of AdapterHub's fields, with the method's own defaults."""
    fields = asdict(methods.METHODS[method].Config(**config))
    for name, value in OURS.items():
        if fields.pop(name) != value:
            raise Skip(f"AdapterHub has no {name}")
    return adapters.BnConfig(**fields | {"leave_out": list(fields["leave_out"])})


def bottleneck_places(model: Any, adapter: str) -> Iterator[Place]:
    for path, module in model.named_modules():
        if not isinstance(module, BottleneckLayer) or adapter not in module.adapters:
            continue
        one = module.adapters[adapter]
        down = next(m for m in one.adapter_down if isinstance(m, torch.nn.Linear))
        layers = {"adapter_down": down, "adapter_up": one.adapter_up, "gate": getattr(one, "gate", None)}
        layers |= {n: getattr(one, n, None) for n in ("adapter_norm_before", "adapter_norm_after")}
        params = {f"{n}.{leaf}": getattr(m, leaf) for n, m in layers.items() if m for leaf in ("weight", "bias")}
        params |= {"scaling": one.scaling} if isinstance(one.scaling, torch.nn.Parameter) else {}
        yield from (place(f"{path}.adapters.{n}", p) for n, p in params.items())


METHODS: Mapping[str, tuple[Callable[[Config, Any], Any], Callable[[Any, str], Iterator[Place]]]] = {
    "lora": (lora_config, lora_places),
    "dora": (lora_config, lora_places),
    "ia3": (ia3_config, ia3_places),
    "prompt_tuning": (prompt_config, prompt_places),
    "prefix_tuning": (prefix_config, prefix_places),
    "p_tuning_v2": (prefix_config, prefix_places),
    **{name: (partial(bottleneck_config, name), bottleneck_places) for name in ("houlsby", "pfeiffer", "parallel")},
}
