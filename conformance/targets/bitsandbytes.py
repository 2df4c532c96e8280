"""bitsandbytes, `Linear4bit` in NF4, and HF peft's LoRA on it: QLoRA, on a CPU.

W [o, i] is stored as bytes [⌈n/2⌉, 1] of two codes, the first in the upper half, with a float32 `absmax` for each 64,
without double quantisation (`compress_statistics=False`). The layer computes in W's dtype, with the weights read back:
so W is one that storing does not change (`refpeft.quantisation`, NF2). A, B and s are peft's own.

Not trained and without a gradient to x, the layer repacks its weights on a CPU that has AVX512-BF16, for sizes that
are multiples of 32 and 64 alone, and rounds `absmax` to bfloat16 for good (docs/findings/bitsandbytes-repacked.md). So
it is asked in training mode, which nothing else here depends on.

Merging writes W′ in four bits again, and unmerging rounds once more, so that is not what was there: asked is what is
stored when merged.
"""

from typing import Any

import bitsandbytes  # type: ignore[import-not-found, unused-ignore]
import peft
import torch
import transformers

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.layers import Layers
from refpeft.conformance.targets.peft import Layer, Toy
from refpeft.conformance.targets.tensors import array, quietly, tensor
from refpeft.ops import Array

NF4 = {"quant_type": "nf4", "compress_statistics": False}


class Adapted(Layer):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.model.train()

    def host(self, W: Array, b: Array | None) -> Any:
        """A model of one layer, which says that it is in four bits: else peft would take that for a plain one."""
        made: torch.nn.Module = bitsandbytes.nn.Linear4bit(
            W.shape[1], W.shape[0], bias=b is not None, compute_dtype=tensor(W).dtype, **NF4
        )
        made.weight = bitsandbytes.nn.Params4bit(tensor(W).clone(), requires_grad=False, **NF4)
        if b is not None:
            made.bias = torch.nn.Parameter(tensor(b).clone())
        host: Any = Toy(made.to("cpu"))  # which is when it is quantised
        host.is_loaded_in_4bit = True
        return host

    def nf4(self) -> Arrays:
        """By the functions, which take any W."""
        codes, state = bitsandbytes.functional.quantize_4bit(
            tensor(self.case.arrays["W"]), blocksize=64, quant_type="nf4"
        )
        read = array(bitsandbytes.functional.dequantize_4bit(codes, state))
        return {"codes": array(codes).reshape(-1), "absmax": array(state.absmax), "W_read": read}

    def merged_nf4(self) -> Arrays:
        self.model.merge_adapter()
        weight = self.base.weight
        found = {"codes": array(weight).reshape(-1), "absmax": array(weight.quant_state.absmax)}
        return {**found, "b_merged": array(self.base.bias)} if "b" in self.case.arrays else found


def layer(case: Case) -> Any:
    return Adapted(case)


def loaded() -> Layers:
    quietly("bitsandbytes", "transformers")
    return Layers(
        layer, name="bitsandbytes", version=bitsandbytes.__version__, methods=["lora", "rslora"],
        dtypes=["float32"], features=["forward", "grads", "frozen", "init", "change", "disable", "bias", "nf4"],
        stored="nf4",
        versions={"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
    )  # fmt: skip
