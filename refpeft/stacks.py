"""Stacks: where a model's attentions are, and what its head is for."""

import re
from typing import TYPE_CHECKING

from refpeft.config import POOLS

if TYPE_CHECKING:
    from refpeft.model import Model

STACKS = {  # of the decoder, or of a model that has one stack only; of the encoder; of the decoder to the encoder
    "": r"(?:decoder\.)?layers\.(\d+)\.attn\.",
    "encoder.": r"encoder\.layers\.(\d+)\.attn\.",
    "cross.": r"decoder\.layers\.(\d+)\.cross\.",
}


def attentions(model: "Model") -> dict[str, dict[int, str]]:
    """Of each stack that the model has: the layers with their attentions ('layers.3.attn.'), in order. Layers of a
    decoder are numbered on from those of the encoder, as in AdapterHub."""
    ats = [role[:-1] for role in model.sites if role.endswith((".attn.o", ".cross.o"))]
    found = {s: {int(m[1]): at for at in ats if (m := re.fullmatch(p, at))} for s, p in STACKS.items()}
    first = {stack: len(found["encoder."]) if stack != "encoder." else 0 for stack in found}
    return {s: {n + first[s]: at for n, at in sorted(numbered.items())} for s, numbered in found.items() if numbered}


def task_type(model: "Model") -> str:
    """HF peft's name for what the model's head does; masked language models have none of their own, and run as this."""
    out = model.sites.get("head.out")
    if out is None:
        return "FEATURE_EXTRACTION"
    if set(POOLS) & set(model.config.head):
        return "SEQ_CLS"
    if out.path == "classifier":
        return "TOKEN_CLS"
    if model.config.encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.config.causal else "FEATURE_EXTRACTION"
