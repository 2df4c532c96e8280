"""Stories in HF peft: a chain of plain torch layers, and what is done to it by the methods of PeftModel.

Several adapters are activated by `model.base_model.set_adapter`, disabled by `disable_adapter_layers`, hot-swapped by
`hotswap_adapter`; combinations are `add_weighted_adapter`, whose random masks come from the case.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.models import base_model, output, refused
from refpeft.conformance.targets.peft import PREFIX, Session, plain
from refpeft.conformance.targets.spec_stories import RATE, last
from refpeft.conformance.targets.tensors import array, tensor
from refpeft.ops import Array


class Chain(torch.nn.Module):
    """Layers by their paths, one after the other, tanh between them."""

    def __init__(self, source: Mapping[str, Any], arrays: Arrays) -> None:
        super().__init__()
        self.order = source["order"]
        for path, about in source["layers"].items():
            W, b = arrays[f"model/{about.get('tied_to', path)}.weight"], arrays.get(f"model/{path}.bias")
            layer = plain(about["kind"], W, b)
            if "tied_to" in about:
                layer.weight = self.get_submodule(about["tied_to"]).weight
            parent, _, name = path.rpartition(".")
            if parent and not hasattr(self, parent):
                self.add_module(parent, torch.nn.Module())
            self.get_submodule(parent).add_module(name, layer)

    def forward(self, x: Any) -> Any:
        for n, path in enumerate(self.order):
            x = self.get_submodule(path)(torch.tanh(x) if n else x)
        return x


class Story(Session):
    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model = self.fresh()
        self.ids = tensor(case.arrays["ids"])

    trainable = True  # what is loaded

    def fresh(self) -> Any:
        return Chain(self.case.meta["model"], dict(self.case.arrays)).eval()

    def said(self) -> Any:
        return self.model(self.ids)

    def logits(self) -> Array:
        return array(self.said())

    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()

    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()

    def train(self) -> None:
        """A step of gradient descent on whatever is trained now."""
        self.model.zero_grad()
        out = self.said()
        out.backward(tensor(last(self.case.arrays["dout"], out.shape)))
        torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=RATE).step()

    def load(self, adapters: Sequence[str]) -> None:
        first, *others = adapters
        self.model = peft.PeftModel.from_pretrained(
            self.fresh(), str(self.folder / first), adapter_name=first, is_trainable=self.trainable
        )
        for name in others:
            self.load_as(name, name)
        self.model.eval()

    def load_as(self, adapter: str, file: str) -> Arrays | None:
        trained = self.trainable and self.case.method != "adalora"  # of which one at a time can be
        where = str(self.folder / file)
        try:
            return refused(lambda: self.model.load_adapter(where, adapter_name=adapter, is_trainable=trained))
        finally:
            self.model.eval()

    def swap(self, adapter: str, file: str) -> None:
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(self.model, str(self.folder / file), adapter_name=adapter)

    def delete(self, adapter: str) -> Arrays | None:
        try:
            return super().delete(adapter)
        except ValueError as error:
            if "while they are merged" not in str(error):
                raise
            return {"refused": np.array(True)}

    def average(self, adapter: str, of: Sequence[str], weights: Sequence[float]) -> None:
        self.model.add_weighted_adapter(list(of), list(weights), adapter)

    def combine(
        self,
        adapter: str,
        of: Sequence[str],
        weights: Sequence[float],
        how: str,
        density: float = 1.0,
        sign: str = "total",
    ) -> None:
        masks = self.masks(adapter, of, how)
        with patch.object(torch, "bernoulli", lambda p: next(masks).to(p.dtype)) if "dare" in how else nullcontext():
            self.model.add_weighted_adapter(
                list(of), list(weights), adapter, combination_type=how, density=density, majority_sign_method=sign
            )

    def masks(self, adapter: str, of: Sequence[str], how: str) -> Iterator[Any]:
        """In the order in which they are asked for: layer by layer, first those for A, then those for B."""
        for full, layer in self.model.named_modules():
            path = full.removeprefix(PREFIX)
            there = [n for n in of if isinstance(layer, LoraLayer) and n in layer.lora_A]
            names = [path] if how.endswith("_svd") else [f"{path}.lora_A.weight", f"{path}.lora_B.weight"]
            for name in names:
                for n in there:
                    yield tensor(self.case.arrays[f"mask/{adapter}/{n}/{name}"])


class Prompted(Story):
    """Of a transformer with prompts, which are the PeftModel's own and not its layers'."""

    trainable = False

    def fresh(self) -> Any:
        return base_model(self.case)

    def said(self) -> Any:
        return output(self.model, self.case.arrays["ids"])

    def disable(self) -> None:
        Session.disable(self)

    def enable(self) -> None:
        Session.enable(self)
