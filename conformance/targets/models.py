"""What the targets that run on transformers share: its models made from cases."""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers

from refpeft.conformance import tiny
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import answers
from refpeft.conformance.targets.tensors import array, tensor
from refpeft.ops import Array


class Driver(Protocol):
    """Whole models, and lives of them, in this process; a library's warnings are not what is asked about."""

    declared: Mapping[str, Any]

    def of_case(self, case: Case) -> Any: ...
    def of_life(self, case: Case, folder: Path) -> Any: ...

    def info(self) -> Mapping[str, Any]:
        return self.declared

    def run(self, case: Case) -> Arrays:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "steps" in case.meta:
                with tempfile.TemporaryDirectory() as folder:
                    found: Arrays = self.of_life(case, Path(folder)).run(case.meta["steps"])
                    return found
            return answers(self.of_case(case), case.meta["want"])

    def close(self) -> None:
        pass


def buildable(family: str) -> bool:
    """Does transformers have the family, with all the fields of its config that the suite uses?"""
    if family not in transformers.CONFIG_MAPPING:
        return False
    known = transformers.CONFIG_MAPPING[family]()
    return all(hasattr(known, field) for field in tiny.FAMILIES[family])


def decoder_of(case: Case, other: bool = False) -> dict[str, Any]:
    """What the decoder of such a model is given."""
    name = "decoder_input_ids"
    return {name: tensor(case.arrays["other_" * other + name])} if name in case.arrays else {}


def steps_of(case: Case) -> Sequence[Mapping[str, Any]]:
    """One token after the other; of an encoder-decoder, the decoder's."""
    ids, more = tensor(case.arrays["ids"]), decoder_of(case)
    grows = more.get("decoder_input_ids", ids)
    ones = [grows[:, t : t + 1] for t in range(grows.shape[1])]
    return [{"input_ids": ids, "decoder_input_ids": one} if more else {"input_ids": one} for one in ones]


def decoded(model: Any, case: Case) -> Array:
    """The logits of one token after the other, each with what is remembered of those before it."""
    found, cache = [], None
    with torch.no_grad():
        for step in steps_of(case):
            out = model(**step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(array(out.logits))
    return np.concatenate(found, axis=1)


def model_buffers(model: Any, case: Case) -> Arrays:
    """What transformers holds as buffers and the case as parameters, in its shapes: BART's bias of words."""
    own = {n: b for n, b in model.named_buffers() if f"model/{n}" in case.arrays}
    return {n: array(b).reshape(case.arrays[f"model/{n}"].shape) for n, b in own.items()}


def base_model(case: Case, attention: str = "eager") -> Any:
    """transformers' model with the case's weights, all of which must find their place."""
    source = {k: v for k, v in case.meta["model"].items() if k not in ("architectures", "model_type")}
    config = transformers.CONFIG_MAPPING[case.meta["model"]["model_type"]](**source)
    config._attn_implementation = attention
    weights = {n.removeprefix("model/"): tensor(a).clone() for n, a in case.arrays.items() if n.startswith("model/")}
    model = getattr(transformers, case.meta["model"]["architectures"][0])(config)
    model.to(next(iter(weights.values())).dtype)
    fit(model, weights)
    _, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise ValueError(f"transformers has no parameter {unexpected[0]}")
    return model.eval()


def fit(model: Any, weights: dict[str, Any]) -> None:
    """BART's bias of its logits is a row [1, v] there. Of an untied head T5's config has forgotten that it is."""
    name = "final_logits_bias"
    if name in weights:
        weights[name] = weights[name].reshape(model.get_buffer(name).shape)
    if "lm_head.weight" in weights and model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def loss(model: Any, case: Case) -> Any:
    """Of the case's labels, which the model shifts itself."""
    given = {n: tensor(case.arrays[n]) for n in ("attention_mask", "labels") if n in case.arrays}
    return model(input_ids=tensor(case.arrays["ids"]), **given).loss


def values_of(case: Case, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in case.arrays.items() if n.startswith(prefix)}


def output(model: Any, ids: Array, mask: Array | None = None, **more: Any) -> Any:
    out = model(input_ids=tensor(ids), attention_mask=None if mask is None else tensor(mask), **more)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def refused(load: Callable[[], Any]) -> Arrays | None:
    """Loads an adapter. Where the name is taken, sizes that do not fit are refused: torch says so."""
    try:
        load()
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        return {"refused": np.array(True)}
    return None
