"""Properties that some methods have and others have not: of prompts, prefixes, intrinsic dimension, factors of W."""

from collections.abc import Sequence

from refpeft.conformance import tiny
from refpeft.conformance.property import PADDED, Property, do, layer, life, two, whole
from refpeft.conformance.strategies import Structure
from refpeft.conformance.traits import LORA

CAUSAL, DECODING = tiny.CAUSAL, tiny.DECODING
SOFT = ("prompt_tuning", "p_tuning", "prefix_tuning")
BUTTERFLIES = {"boft_block_size": 2, "boft_n_butterfly_factor": 3}
PREFIX = ("prefix_tuning", "p_tuning_v2")


def started(s: Structure) -> Structure:
    """A start from factors of W, with patterns of α, of ranks, or none. HF peft's olora takes a Conv1D as it is stored,
    and so starts elsewhere."""
    first = s["config"]["target_modules"][0]
    patterns: Structure = ({"alpha_pattern": {first: 12.0}}, {"rank_pattern": {first: 3}}, {})[s["program"]]
    return {"init_lora_weights": "olora" if s["draw"] % 2 and s["family"] != "gpt2" else "pissa", **patterns}


def with_cores(s: Structure) -> Structure:
    """A matrix that sees k places of its input, which are 4, 2, 9 or 3."""
    k = (4, 2, 9, 3)[s["draw"] % 4]
    return {**s, "i": s["i"] * k, "config": {**s["config"], "taps": k}}


CONVERTED = [do("add", adapter="first"), do("convert", adapter="first")]
OWN: Sequence[Property] = [
    layer(
        "cores",
        "Of a convolution, with cores between the factors: outputs and merged weights are those of the formula.",
        ["output", "merged"],
        ["forward", "merge", "cores"],
        ["LH2", "LH3"],
        change=with_cores,
        kind=["linear"],
        regime=["float"],
        methods=("loha",),
    ),
    layer(
        "cores-grads",
        "Of a convolution, with cores between the factors: the gradients of all six are those of the formula.",
        ["grads"],
        ["grads", "cores"],
        ["LH2"],
        change=with_cores,
        kind=["linear"],
        regime=["float"],
        methods=("loha",),
    ),
    whole(
        "left-padding",
        "Padding on the left changes nothing but the places of what follows, behind a prompt or prefix too.",
        ["logits"],
        ["forward"],
        ["PT5"],
        families=CAUSAL,
        architectures=("",),
        also={**PADDED, "left": [True]},
        methods=SOFT,
    ),
    whole(
        "loss",
        "The loss of a language model is that of the tokens, the first of which the end of a prompt predicts, or the "
        "start token of a decoder that has an encoder; what is ignored and what is padding does not count.",
        ["loss"],
        ["forward", "loss"],
        families=DECODING,
        architectures=("",),
        across=True,
        also={"dtype": ["float32"], "batch": [[2, 3], [1, 4]]},
        methods=SOFT,
    ),
    whole(
        "dropped",
        "Without the network that made it, a prompt or prefix computes the same.",
        ["logits", "dropped"],
        ["forward", "drop"],
        ["PU1", "PX4"],
        configs=lambda s: {"prefix_projection": True} if s["method"] == "prefix_tuning" else {},
        methods=SOFT,
    ),
    whole(
        "recurrent",
        "The LSTM of the prompt's encoder reads it in both directions, with both of its biases.",
        ["logits", "grads"],
        ["forward", "grads"],
        ["PU4"],
        configs=lambda s: {"encoder_reparameterization_type": "LSTM"},
        methods=("p_tuning",),
    ),
    whole(
        "layers",
        "Each layer sees its own part of the prefix, keys and values of one layer beside each other.",
        ["logits", "grads"],
        ["forward", "grads"],
        ["PX1"],
        also={"layers": [2]},
        methods=PREFIX,
    ),
    whole(
        "rows",
        "In one batch each row has the prefix of its own task, or none, and tasks get the gradients of their rows.",
        ["logits", "grads"],
        ["forward", "grads", "rows"],
        ["PV2", "PV3"],
        adapters=two,
        also={"rows": [[1, 0, -1], [0, 0, 1], [-1, 1, 1]], "batch": [[3, 3], [3, 2]]},
        methods=PREFIX,
    ),
    whole(
        "exact-cayley",
        "The exact Cayley transform is (I + Q)(I − Q)⁻¹, which its series approaches: it turns the same way.",
        ["logits", "grads", "merged_logits"],
        ["forward", "grads", "merge"],
        ["OF3", "OF5"],
        configs=lambda s: {"use_cayley_neumann": False},
        methods=("oft",),
    ),
    whole(
        "butterfly",
        "Three butterfly factors put the halves of blocks beside each other, 1, 2 and 4 halves apart, in this order.",
        ["logits", "grads", "merged_logits"],
        ["forward", "grads", "merge", "butterfly"],
        ["BO3", "BO5"],
        families=("llama", "bert"),
        configs=lambda s: {**BUTTERFLIES, "target_modules": s["config"]["target_modules"][:2]},
        methods=("boft",),
    ),
    whole(
        "transpose",
        "The gradient of any linear function of the merged weights is the transpose: ⟨P θ, g⟩ = ⟨θ, Pᵀ g⟩.",
        ["pulled"],
        ["merge", "pull"],
        ["ID5", "SA5"],
        methods=("did", "said"),
    ),
    life(
        "converted",
        "Saved as an adapter of the untouched base, one that started from factors of it is there what it was here.",
        [CONVERTED] * 3,
        ["save", "patterns", "convert"],
        ["L1"],
        adapters=lambda s: {"first": s["config"]},
        configs=started,
        over=("bert", "gpt2"),
        methods=LORA,
    ),
]
