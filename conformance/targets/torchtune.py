"""Meta's `torchtune`: `LoRALinear` and `DoRALinear`, layer by layer.

`lora_a` is A, `lora_b` is B, `magnitude` is m [o]; s = α/r. The norm of DoRA is held constant, as in the paper; m has
to be started by `initialize_dora_magnitude`. Merging is of a state dict (`get_merged_lora_ckpt`), which is put into a
plain layer here. A layer is made float32 and converted. There is no rsLoRA and no embedding, and no merge to take back.
"""

from importlib.metadata import version

import torch
from torchtune.modules import peft  # type: ignore[import-not-found, unused-ignore]

from refpeft.conformance.targets.layers import Layers, Place
from refpeft.conformance.targets.tensors import fill, quietly
from refpeft.conformance.targets.torch_layers import TorchLayer


class Adapted(TorchLayer):
    def make(self) -> None:
        W, b = self.case.arrays["W"], self.case.arrays.get("b")
        kind = peft.DoRALinear if self.config.get("use_dora") else peft.LoRALinear
        self.module = kind(W.shape[1], W.shape[0], self.config["r"], self.config["lora_alpha"], use_bias=b is not None)
        self.module.to(getattr(torch, str(W.dtype)))
        peft.set_trainable_params(self.module, peft.get_adapter_params(self.module))
        self.base = {"W": Place(self.module.weight), **({} if b is None else {"b": Place(self.module.bias)})}
        self.places = {"A": Place(self.module.lora_a.weight), "B": Place(self.module.lora_b.weight)}
        if self.config.get("use_dora"):
            fill(self.base, self.case.arrays)  # whose norms m begins with
            self.module.initialize_dora_magnitude()
            self.places["m"] = Place(self.module.magnitude)

    def merge(self) -> None:
        state = {f"layer.{n}": p.clone() for n, p in self.module.state_dict().items()}
        merged = peft.get_merged_lora_ckpt(state, self.config["r"], self.config["lora_alpha"])
        o, i = self.case.arrays["W"].shape
        self.module = torch.nn.Linear(i, o, bias="b" in self.base, dtype=merged["layer.weight"].dtype)
        self.module.load_state_dict({n.removeprefix("layer."): p for n, p in merged.items()})
        self.base = {"W": Place(self.module.weight), **({"b": Place(self.module.bias)} if "b" in self.base else {})}

    def disable(self) -> None:
        self.module.disabled = True

    def enable(self) -> None:
        self.module.disabled = False


def loaded() -> Layers:
    quietly()
    return Layers(
        Adapted, name="torchtune", version=version("torchtune"), methods=["lora", "dora"],
        features=["forward", "grads", "frozen", "init", "change", "merge", "disable"],
        versions={"torch": torch.__version__},
    )  # fmt: skip
