"""The properties: each one sentence that must be true of an implementation, and the cases that could show it is not.

To add one, add it to a table below; those that some methods only have are in `properties_own`, those of an adapter's
life in `properties_lives`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from refpeft.conformance import strategies, tiny
from refpeft.conformance.properties_lives import LIFE
from refpeft.conformance.properties_own import OWN
from refpeft.conformance.properties_stored import STORED
from refpeft.conformance.properties_whole import WHOLE
from refpeft.conformance.property import PADDED, Property, layer, two, whole
from refpeft.conformance.refusals import REJECTS
from refpeft.conformance.stories import STORIES
from refpeft.conformance.strategies import Structure
from refpeft.conformance.traits import TRAITS
from refpeft.methods import METHODS

__all__ = ["PROPERTIES", "Property"]

LAYER = [
    layer(
        "forward",
        "y is the method's formula, on every kind of layer, shape, rank and option.",
        ["output"],
        ["forward"],
        ["L3", "L5", "R1", "D6", "LH3", "LK4", "GL3", "DY3", "DY4"],
    ),
    layer(
        "input-grad",
        "The gradient with respect to the layer's input is that of the formula.",
        ["grads"],
        ["grads"],
        ["L2", "D2", "IA2", "LH2", "LK2", "GL2", "DY2", "OF2", "BO2", "AL2"],
        kind=["linear", "conv1d"],
    ),
    layer(
        "param-grads",
        "The gradients of the adapter's parameters are those of the formula.",
        ["grads"],
        ["grads"],
        ["L2", "R1", "D2", "IA2", "LH2", "LK2", "GL2", "DY2", "DY5", "OF2", "BO2", "AL2"],
    ),
    layer("frozen", "The adapter's parameters are trained, the layer's own are not.", ["trained"], ["frozen"]),
    layer(
        "init",
        "A fresh adapter changes nothing.",
        ["fresh"],
        ["init"],
        ["L1", "D1", "IA1", "LH1", "LK1", "GL1", "DY1", "OF1", "BO1", "AL1"],
        regime=["float"],
    ),
    layer(
        "sensitive",
        "New values written into the parameters show at once: nothing stale is kept.",
        ["changed"],
        ["forward", "change"],
        ["D3", "D4"],
    ),
    layer(
        "merge",
        "Merged weights are W′ and b′ of the method, stored as the layer stores W, and give the same output.",
        ["merged"],
        ["merge"],
        ["L2", "L5", "D2", "IA2", "LH2", "LK2", "GL2", "DY2", "OF2", "BO2", "AL2"],
    ),
    layer(
        "unmerge", "Unmerging restores W and b, and the adapter goes on as before.", ["unmerged"], ["merge", "unmerge"]
    ),
    layer(
        "unload",
        "Merged and the adapter taken off for good, a plain layer of the kind that was there is left, with W′ and b′.",
        ["unloaded"],
        ["unload"],
    ),
    layer("disable", "Disabled, the layer is the base; enabled again, the adapter is back.", ["disabled"], ["disable"]),
    layer(
        "batch",
        "A row of the batch has no influence on the others, and an empty batch gives an empty output.",
        ["output", "first_row"],
        ["forward"],
        edge=["none", "empty-batch", "repeated-rows"],
        regime=["float"],
    ),
    layer(
        "dtype",
        "In 16 bits, outputs and merged weights keep the layer's dtype, and are as exact as that allows.",
        ["output", "merged"],
        ["forward", "merge"],
        dtype=strategies.HALF,
        regime=["float"],
        required=False,
    ),
    layer(
        "zero-row",
        "A row of zeros in W and B stays a row of zeros, and is not nan.",
        ["output", "merged"],
        ["forward", "merge"],
        ["D1"],
        edge=["zero-row"],
        regime=["float"],
        required=False,
        methods=["dora"],
    ),
]


# ── a whole model ────────────────────────────────────────────────────────────────────────────────────────────────────


def patterns(s: Structure) -> Structure:
    """Keys that several layers match, and a rank_pattern and an alpha_pattern that disagree about which."""
    names = s["config"]["target_modules"]
    return {"rank_pattern": {names[0]: 3}, "alpha_pattern": {s["key"].format(names[0]): 5.0, names[-1]: 7.0}}


def variant(s: Structure) -> Structure:
    """One group of options, and none of the others."""
    groups = TRAITS[s["method"]].variants
    plain = {name: getattr(METHODS[s["method"]].Config(), name) for group in groups for name in group}
    return plain | groups[s["variant"]]


def swapped(s: Structure) -> Mapping[str, Any]:
    both = two(s)
    return {name: both[name] for name in sorted(both, reverse=s["swap"])}


MODEL = [
    whole("logits", "The model's output is that of the formula.", ["logits"], ["forward"], ["L3"], across=True),
    whole(
        "param-grads",
        "The gradients of all the adapter's parameters are those of the formula.",
        ["grads"],
        ["grads"],
        ["F1", "B1", "PT1", "PU4"],
        across=True,
    ),
    whole(
        "merge",
        "The merged model has the base's tensors, no more and no fewer, equal to the formula's, and its output.",
        ["merged", "merged_logits"],
        ["merge"],
        ["L2", "D2", "S3", "ID2", "SA2", "IA2", "LH2", "LK2", "GL2", "DY2", "OF2", "BO2", "VE2", "AL2"],
    ),
    whole(
        "causal",
        "A later token changes nothing before it.",
        ["logits", "other_logits"],
        ["forward"],
        families=tiny.DECODING,
        architectures=("",),
        across=True,
        also={"batch": [[1, 2], [2, 5]]},
    ),
    whole(
        "padding",
        "Padding changes nothing at the positions that are not padding.",
        ["logits"],
        ["forward"],
        also=PADDED,
        across=True,
    ),
    whole(
        "order",
        "Two active adapters act in the order given, each with its own rank and scale.",
        ["logits"],
        ["forward", "together"],
        ["L4", "D5", "ID3", "IA3", "LH5", "LK5", "GL6", "DY6", "OF6", "BO7", "VE3", "AL3"],
        adapters=swapped,
        also={"swap": [False, True]},
    ),
    whole(
        "two-merged",
        "Two adapters merged are two adapters active.",
        ["merged", "merged_logits"],
        ["merge", "together"],
        ["L4", "D5", "ID3", "IA3", "LH5", "LK5", "GL6", "DY6", "OF6", "BO7", "VE3", "AL3"],
        adapters=two,
    ),
    whole(
        "patterns",
        "Each layer's rank and scale follow rank_pattern and alpha_pattern, each for itself.",
        ["logits", "merged_logits"],
        ["forward", "merge", "patterns"],
        configs=patterns,
        also={"key": ["{}", "[a-z]*.0..*{}"]},
        methods=["lora", "rslora", "dora"],
    ),
    whole(
        "incremental",
        "Decoding with keys and values kept gives what decoding without gives.",
        ["logits", "decoded"],
        ["forward", "cache"],
        families=tiny.DECODING,
        architectures=("",),
        across=True,
    ),
    whole("count", "The number of trained parameters.", ["count"], ["frozen"]),
    whole(
        "trained",
        "Whatever the dtype of the model, the adapter's parameters are trained, and nothing besides.",
        ["count"],
        ["frozen"],
        also={"dtype": ["float64", "float32", "bfloat16"]},
    ),
    whole(
        "options",
        "Scales, gates and norms that the adapter has of its own are those of the formula, and so are their gradients.",
        ["logits", "grads"],
        ["forward", "grads"],
        ["H5", "PA3"],
        configs=variant,
        also={"variant": [1, 2, 3, 4, 5], "batch": [[2, 3], [3, 4]]},
        methods=["houlsby", "pfeiffer", "parallel"],
    ),
    whole(
        "left-out",
        "Of two layers, the one in `leave_out` has no adapter and runs as the base does.",
        ["logits", "count"],
        ["forward", "frozen"],
        ["H3", "PF4", "PA5"],
        configs=lambda s: {"leave_out": [s["without"]]},
        also={"without": [0, 1], "layers": [2]},
        methods=["houlsby", "pfeiffer", "parallel"],
    ),
    whole(
        "embedding",
        "An adapted embedding of ids that repeat: output, gradients and merge.",
        ["logits", "grads", "merged_logits"],
        ["forward", "grads", "merge", "embedding"],
        ["L5", "D6"],
        families=("bert", "roberta"),
        architectures=("Model",),
        configs=lambda s: {"target_modules": ["word_embeddings"]},
    ),
    whole(
        "tied",
        "Adapting one of two tied layers changes that one only, merged or not.",
        ["logits", "merged_logits"],
        ["forward", "merge", "tied", "embedding"],
        families=("gpt2",),
        architectures=("LMHeadModel",),
        required=False,
        configs=lambda s: {"target_modules": [s["which"]]},
        also={"which": ["lm_head", "wte"]},
    ),
]


# ── an export ────────────────────────────────────────────────────────────────────────────────────────────────────────


EXPORT = [
    whole(
        "onnx",
        "The exported graph gives what the formula gives, padding included.",
        ["merged_logits"],
        ["merge"],
        ["L2", "D2"],
        level="export",
        also={"padded": [True, False], "batch": [[2, 3], [1, 4]]},
    ),
    whole(
        "onnx-two",
        "Two adapters exported together are two adapters merged.",
        ["merged_logits"],
        ["merge", "together"],
        ["L4", "D5", "ID3", "IA3", "LH5", "LK5", "GL6", "DY6", "OF6", "BO7", "VE3", "AL3"],
        level="export",
        adapters=two,
        families=("gpt2", "roberta"),
    ),
    whole(
        "onnx-tied",
        "An exported model whose tied layers were adapted apart.",
        ["merged_logits"],
        ["merge", "tied", "embedding"],
        level="export",
        families=("gpt2",),
        architectures=("LMHeadModel",),
        configs=lambda s: {"target_modules": [s["which"]]},
        also={"which": ["lm_head", "wte"]},
    ),
]

PROPERTIES: Sequence[Property] = (*LAYER, *STORED, *MODEL, *OWN, *REJECTS, *LIFE, *WHOLE, *STORIES, *EXPORT)
