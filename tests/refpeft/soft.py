"""What the tests of soft prompts share: HF peft in float64, and ours read from what it saved."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import refpeft

SMALL = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HF = {
    "CAUSAL_LM of gpt2": ("GPT2LMHeadModel", "GPT2Config", SMALL | {"n_embd": 16, "n_head": 2, "n_layer": 2}),
    "CAUSAL_LM of llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL | {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
                 "intermediate_size": 24},
    ),
    "SEQ_CLS of bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
         "intermediate_size": 24, "num_labels": 3},
    ),
    "SEQ_CLS of gpt2": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        SMALL | {"n_embd": 16, "n_head": 2, "n_layer": 2},
    ),
    "FEATURE_EXTRACTION of bert": (
        "BertModel",
        "BertConfig",
        {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
         "intermediate_size": 24},
    ),
    "FEATURE_EXTRACTION of roberta": (
        "RobertaModel",
        "RobertaConfig",
        {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
         "intermediate_size": 24, "pad_token_id": 1},
    ),
}  # fmt: skip
TAGGER = {"TOKEN_CLS of bert": ("BertForTokenClassification", *HF["SEQ_CLS of bert"][1:])}


def hf_base(name: str, seed: int = 0) -> Any:
    """A model in float64, with noise on all parameters."""
    import torch
    import transformers

    cls, config, options = (HF | TAGGER)[name]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
        with torch.no_grad():
            for p in base.parameters():
                p += 0.1 * torch.randn_like(p)
    return base.double()


def hf(name: str, peft_config: Any) -> Any:
    """The same as an HF peft model, its adapter in float64 too."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(hf_base(name), peft_config).double().eval()


def hf_run(m: Any, ids: Any, mask: Any, dout: Any = None) -> Any:
    """The output, and with `dout` the gradients of what is trained, by name."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = m(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    y = out.logits if "logits" in out else out.last_hidden_state
    if dout is None:
        return y.detach().numpy()
    m.zero_grad()
    y.backward(torch.tensor(dout))
    return y.detach().numpy(), {n: p.grad.numpy() for n, p in m.named_parameters() if p.requires_grad}


def both(name: str, peft_config: Any, tmp_path: Any) -> tuple[Any, refpeft.Model, refpeft.Adapter]:
    """HF peft's model, and ours read from what it saved."""
    m = hf(name, peft_config)
    m.save_pretrained(tmp_path / "theirs")
    hf_base(name).save_pretrained(tmp_path / "base")
    model = refpeft.load(tmp_path / "base").astype(np.float64)
    return m, model, refpeft.load_adapter(tmp_path / "theirs", model)


def hf_load(m: Any, folder: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(m, folder).double().eval()


@contextmanager
def cache_under_its_old_name() -> Iterator[None]:
    """HF peft 0.21 looks for an argument `past_key_values` of the classifier's backbone, which newer transformers call
    `cache` (and still take by the old name): see docs/findings/peft-prefix-of-classifiers.md."""
    import peft.peft_model

    def signature(f: Any) -> Any:
        found = inspect.signature(f)
        renamed = {"past_key_values" if name == "cache" else name: p for name, p in found.parameters.items()}
        return SimpleNamespace(parameters=renamed)

    with mock.patch.object(peft.peft_model, "inspect", SimpleNamespace(**vars(inspect) | {"signature": signature})):
        yield
