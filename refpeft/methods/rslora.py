"""rsLoRA: rank-stabilised LoRA.      Kalajdzievski 2023, arXiv 2312.03732, §3, theorem 3.2

    W′ = W + s B A,   s = α/√r            everything else as in `lora`

With s = α/r the size of the update, and of its gradients, shrinks as the rank grows; α/√r is the scale for which
neither depends on r.

Claims:
    R1  rsLoRA with α is LoRA with α √r: the same tensors, gradients and merge.
    R2  At r = 1 rsLoRA and LoRA are the same function.

HF peft has it as `use_rslora` of LoraConfig; a reader that overlooks the flag is off by a factor √r in every delta.
"""

from dataclasses import dataclass

from refpeft.methods import lora
from refpeft.methods.lora import FROZEN, KEYS, init, kept, merge, shapes, wrap

__all__ = ["FROZEN", "KEYS", "Config", "init", "kept", "merge", "shapes", "wrap"]


@dataclass(frozen=True)
class Config(lora.Config):
    use_rslora: bool = True
