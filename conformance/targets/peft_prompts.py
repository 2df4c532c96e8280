"""What is peculiar to HF peft's prompt learning: configs, where the parameters are, decoding, dropping the encoder.

The prompt belongs to the PeftModel and not to a layer, `task_type` decides how it is put in, and HF peft has one
choice only where the specification has several.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft

from refpeft.conformance import tiny
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Skip
from refpeft.methods.prefix_tuning import NAMES

CLASSES: Mapping[str, str] = {
    "prompt_tuning": "PromptTuningConfig",
    "p_tuning": "PromptEncoderConfig",
    "prefix_tuning": "PrefixTuningConfig",
    "p_tuning_v2": "PrefixTuningConfig",
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {  # what HF peft has chosen
    "prompt_tuning": {"placement": "before"},
    "p_tuning": {"placement": "before"},
    "prefix_tuning": {"position_shift": True},
    "p_tuning_v2": {"position_shift": True},
}


def prompted(model: Any, adapter: str) -> bool:
    about = model.peft_config[adapter]
    return bool(getattr(about, "is_prompt_learning", hasattr(about, "num_virtual_tokens")))  # it came with 0.5


def config(case: Case, name: str) -> Any:
    """HF peft's config, told what the model's head is for."""
    about = case.meta["adapters"][name]
    if task_type(case.meta["model"]) == "SEQ_2_SEQ_LM" and CLASSES[about["method"]] == "PrefixTuningConfig":
        raise Skip("HF peft's prefixes of encoder-decoders are not laid out as the paper describes")
    fields = dict(about["config"])
    for field, value in OPTIONS[about["method"]].items():
        if fields.pop(field, value) != value:
            raise Skip(f"HF peft has no {field} other than {value!r}")
    make = getattr(peft, CLASSES[about["method"]])
    task, saved = task_type(case.meta["model"]), list(fields.pop("modules_to_save", None) or ()) or None
    if "modules_to_save" in inspect.signature(make).parameters:
        fields["modules_to_save"] = saved  # a list of its own, which HF peft appends to
    elif saved and task != "SEQ_CLS":  # whose heads are trained whole without being named
        raise Skip(f"peft {peft.__version__} has no modules_to_save for prompts")
    return make(task_type=task, **fields)


def task_type(source: Mapping[str, Any]) -> str:
    (architecture,) = source["architectures"]
    if architecture.endswith(tiny.CLASSIFIER):
        return "SEQ_CLS"
    if source["model_type"] in tiny.ENCODER_DECODERS and not architecture.endswith("EncoderModel"):
        return "SEQ_2_SEQ_LM"
    language = source["model_type"] in tiny.CAUSAL and architecture.endswith(tiny.LM[source["model_type"]])
    return "CAUSAL_LM" if language else "FEATURE_EXTRACTION"


def parameters(model: Any, adapter: str) -> dict[str, Any]:
    """An adapter's parameters by the specification's names."""
    about = model.peft_config[adapter]
    own = dict(model.prompt_encoder[adapter].named_parameters())
    if about.peft_type == "P_TUNING":
        found = own
    elif getattr(about, "prefix_projection", False):
        found = {"prompt_encoder." + n: p for n, p in own.items()}
        assert found.keys() <= set(NAMES.values())
    else:
        found = {"prompt_embeddings": own.pop("embedding.weight")} | own
    marker = f".modules_to_save.{adapter}."
    whole = {n.replace(marker, "."): p for n, p in model.base_model.named_parameters() if marker in n}
    return found | whole


def decoded(model: Any, steps: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The logits of one position after the other, as `generate` goes on: the prompt is in the cache after the first."""
    out = model(**steps[0], use_cache=True)
    found = [out.logits]
    for step in steps[1:]:
        out = model.base_model(**step, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


def dropped(model: Any, base: Any, folder: Path) -> Any:
    """What HF peft loads from its own folder, which holds no encoder. (Loading rounds to float32; that is undone here,
    since it is asked for elsewhere.)"""
    (name,) = model.peft_config
    P = model.get_prompt_embedding_to_save(name).detach()
    model.save_pretrained(str(folder))
    loaded = peft.PeftModel.from_pretrained(base, str(folder), adapter_name=name)
    weight = loaded.prompt_encoder[name].get_parameter("embedding.weight")
    weight.data = P.reshape(weight.shape)
    return loaded.eval()
