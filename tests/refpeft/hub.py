"""What the tests against AdapterHub's `adapters` share: its models with our weights, and adapters there and back."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import Adapter, Model

Array = np.ndarray[Any, Any]
# LLaMA, Qwen2 and T5 normalise in float32 whatever their weights are, and are only right to about 1e-7
TOLERANCE = {"gpt2": 1e-12, "bert": 1e-12, "roberta": 1e-12, "bart": 1e-12} | dict.fromkeys(
    ("llama", "qwen2", "t5"), 2e-6
)


def hub_model(model: Model, dtype: str = "float64", attention: str = "sdpa") -> Any:
    """The same model as AdapterHub has it."""
    import adapters
    import torch
    import transformers

    for library in ("transformers", "adapters"):
        logging.getLogger(library).setLevel(logging.ERROR)
    fields = {k: v for k, v in model.source.items() if k not in ("model_type", "architectures")}
    family = model.source["model_type"]
    attention = "eager" if family == "t5" else attention
    config = transformers.AutoConfig.for_model(family, **fields, attn_implementation=attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(transformers, model.source["architectures"][0])(config)
        adapters.init(theirs)
    theirs = theirs.eval().to(getattr(torch, dtype))
    shapes = {n: p.shape for n, p in theirs.state_dict().items()}  # BART's bias of the words is [1, v] there
    ours = {n: torch.tensor(v).reshape(shapes.get(n, v.shape)) for n, v in model.params.items()}
    found = theirs.load_state_dict(ours, strict=False)
    assert not found.unexpected_keys
    theirs.tie_weights()
    return theirs


def hub_load(theirs: Any, folder: Path, dtype: str = "float64", name: str | None = None) -> str:
    """The adapter of a folder, active; its name."""
    import torch

    torch.set_default_dtype(getattr(torch, dtype))  # of new modules, into which the tensors are copied
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name: str = theirs.load_adapter(str(folder), load_as=name, set_active=True, use_safetensors=True)
    finally:
        torch.set_default_dtype(torch.float32)
    theirs.eval()
    return name


def hub_run(
    theirs: Any, ids: Array, name: str, dout: Array, mask: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """The output, and the gradients of all that has one, without the adapter's name in theirs."""
    import torch

    for p in theirs.parameters():
        p.requires_grad_(True)
    theirs.zero_grad()
    out = theirs(input_ids=torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask))[0]
    out.backward(torch.tensor(dout))
    grads = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    return out.detach().numpy(), {n.replace(f".adapters.{name}.", ".adapters."): g for n, g in grads.items()}


def theirs_of(name: str, ln_before: bool) -> str:
    """Our parameter's name in `named_parameters` of theirs (where LN₁ stands once, under its own name)."""
    return name.replace("adapter_down.", f"adapter_down.{1 if ln_before else 0}.")


def hub_add(theirs: Any, name: str, config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter(name, config=config, set_active=True)
    theirs.eval()


def moved(adapter: Adapter, seed: int = 1) -> Adapter:
    """Away from where it begins."""
    rng = np.random.default_rng(seed)
    return adapter.replace(
        params={n: (p + 0.3 * rng.normal(size=p.shape)).astype(p.dtype) for n, p in adapter.params.items()}
    )


def read_json(folder: Path, name: str = "adapter_config.json") -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def same(ours: Array, theirs: Array, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(initial=0), 1e-3))
