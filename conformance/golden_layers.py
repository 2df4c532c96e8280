"""The golden vectors of one layer: LoRA, rsLoRA, DoRA and (IA)³."""

from collections.abc import Mapping, Sequence
from typing import Any

from refpeft.conformance.golden import Question
from refpeft.conformance.strategies import FLAGS
from refpeft.conformance.traits import LORA

ALL = ("forward", "input-grad", "param-grads", "merge")
USED = ("forward", "param-grads", "merge")


USUAL: Mapping[str, Any] = {
    "kind": "linear", "regime": "float", "edge": "none", "o": 3, "i": 5, "dtype": "float32", "bias": True,
    "batch": [2, 3], "draw": 0,
}  # fmt: skip


def questions(method: str) -> Sequence[Question]:
    if method == "ia3":
        return vectors()
    if method == "adalora":
        return [triplets()]
    if method not in LORA:
        return []
    found = [*shapes(method), *numbers(method), *lives(method)]
    return [*found, *(of_dora() if method == "dora" else biased(method))]


def triplets() -> Question:
    """Of AdaLoRA, whose s is never exact: how it begins."""
    config = {"init_r": 2, "target_r": 1, "lora_alpha": 6.0, "total_step": 10}
    hunts = "Singular values that are not zero at first; the layer's own W and b trained too."
    return Question("trained", hunts, "layer", ["frozen", "init"], {**USUAL, "config": config})


def layer(name: str, hunts: str, properties: Sequence[str], method: str, **fields: Any) -> Question:
    """A linear layer [3, 5] with a bias, in float32, and an adapter of rank 2 (rsLoRA: 4) with s = 4, unless told."""
    r = fields.pop("r", 4 if method == "rslora" else 2)
    config = {"r": r, "lora_alpha": fields.pop("alpha", 8.0), **FLAGS.get(method, {}), **fields.pop("config", {})}
    return Question(name, hunts, "layer", properties, {**USUAL, "config": config, **fields})


def shapes(m: str) -> list[Question]:
    """Small integers: whatever the order of summation, the bits are the same."""
    square = {"regime": "exact", "o": 4, "i": 4, "bias": False}
    return [
        layer("linear", "The scale forgotten or taken as α or 1, a row of A or B lost, the gradient of B without s.",
              ALL, m, regime="exact"),
        layer("linear-square", "ΔW merged transposed, which no shape gives away; a norm along the other axis.",
              ALL, m, **square),
        layer("conv1d", "W is stored as [i, o]: ΔW, or the norm, of the wrong side.", ALL, m, kind="conv1d",
              regime="exact"),
        layer("conv1d-square", "ΔW not transposed for a stored [i, o] that is square.", ALL, m, kind="conv1d",
              **square),
        layer("embedding", "A looked up without the scale; the gradient of a row that occurs twice counted once.",
              USED, m, kind="embedding", **{**square, "i": 5}),
        layer("embedding-square", "ΔE of a square table not transposed.", USED, m, kind="embedding", **square),
    ]  # fmt: skip


def numbers(m: str) -> list[Question]:
    return [
        layer("float64", "Something computed in float32 inside, a ΔW in 16 bits, a scale that is no power of two.",
              ALL, m, dtype="float64", alpha=3.0, r=3, o=5, i=4),
        layer("rank-one", "A rank's axis squeezed away where r = 1.", ALL, m, r=1, alpha=3.0),
        layer("rank-above", "A rank larger than both sides of W.", ALL, m, r=6, alpha=3.0, o=4, i=3),
        layer("zeros", "Zeros in A and B: gradients that are zeros exactly, and not nan.", ALL, m, edge="zeros"),
        layer("empty-batch", "A batch without rows refused; a gradient of no rows that is not zero.",
              ["forward", "param-grads"], m, edge="empty-batch"),
        layer("one-token", "A batch of one row and one position, whose axes a squeeze takes away.", ALL, m,
              edge="one-token", o=4, i=1),
        layer("rows", "A row of the batch that has an influence on the others.", ["batch"], m, batch=[3, 2]),
        layer("bfloat16", "An output or a merged weight that leaves the layer's dtype, or loses more than it must.",
              ["dtype"], m, dtype="bfloat16"),
        layer("float16", "An output in float16 that is float32; parameters rounded to 16 bits before they are used.",
              ["dtype"], m, dtype="float16", kind="conv1d"),
    ]  # fmt: skip


def lives(m: str) -> list[Question]:
    return [
        layer("trained", "The layer's own W and b trained too; a fresh adapter that changes the output.",
              ["frozen", "init"], m),
        layer("changed", "Something cached that new values of the parameters make stale.", ["sensitive"], m),
        layer("unmerged", "Unmerging along the other axis of a square W, or with another scale than was merged.",
              ["unmerge"], m, o=4, i=4, kind="conv1d", regime="exact"),
        layer("unloaded", "A plain layer of another kind around the merged weights of a square one, or not merged.",
              ["unload"], m, o=4, i=4, kind="conv1d", regime="exact"),
        layer("disabled", "Disabled and enabled again, the adapter stays away.", ["disable"], m),
    ]  # fmt: skip


def biased(m: str) -> list[Question]:
    own = {"config": {"lora_bias": True}}
    return [
        layer("bias", "The bias of B merged or run without the scale.", ALL, m, regime="exact", kind="conv1d", **own),
        layer("bias-of-its-own", "A layer without a bias, which gets that of B when it is merged.", ["merge"], m,
              bias=False, **own),
    ]  # fmt: skip


def of_dora() -> list[Question]:
    return [
        layer("zero-row", "A row of zeros, which has no direction and must not become nan.", ["zero-row"], "dora",
              edge="zero-row"),
        layer("magnitude", "A bias that is rescaled with W; a norm that is differentiated, though it counts as a "
              "constant; the norm of W + B A without s.", ALL, "dora", alpha=5.0, o=4, i=3),
    ]  # fmt: skip


def vectors() -> list[Question]:
    """(IA)³ on what a layer gives, and on what it takes."""

    def ask(name: str, hunts: str, properties: Sequence[str], takes: bool = False, **fields: Any) -> Question:
        config = {"feedforward_modules": ["layer"] if takes else []}
        return Question(name, hunts, "layer", properties, {**USUAL, "config": config, **fields})

    exact: Mapping[str, Any] = {"regime": "exact"}
    square: Mapping[str, Any] = {"o": 4, "i": 4, "regime": "exact"}
    conv: Mapping[str, Any] = {"kind": "conv1d", "regime": "exact"}
    return [
        ask("linear", "A bias that is not scaled with what the layer gives; 1 + l for l.", ALL, **exact),
        ask("linear-takes", "A bias that is scaled where the layer's input is; dx without l.", ALL, True, **exact),
        ask("linear-square", "Columns of W scaled for rows, which no shape gives away.", ALL, **square),
        ask("linear-takes-square", "Rows of W scaled for columns; the output scaled for the input.", ALL, True,
            **square),
        ask("conv1d", "W is stored as [i, o]: the wrong side of it scaled.", ALL, **conv),
        ask("conv1d-takes", "The wrong side of a stored [i, o] scaled, where the input is.", ALL, True, **conv),
        ask("conv1d-square", "Rows and columns of a stored [i, o] that is square.", ALL, **{**square, **conv}),
        ask("without-bias", "A layer without a bias, which gets none.", ALL, bias=False, **exact),
        ask("float64", "Something computed in float32 inside.", ALL, dtype="float64", o=5, i=4),
        ask("float64-takes", "Something computed in float32 inside, where the input is scaled.", ALL, True,
            dtype="float64", o=5, i=4),
        ask("zeros", "l = 0: a layer that is silent, and gradients that are not nan.", ALL, edge="zeros"),
        ask("zeros-takes", "l = 0 at the input: b is left.", ALL, True, edge="zeros"),
        ask("empty-batch", "A batch without rows refused; a gradient of no rows that is not zero.",
            ["forward", "param-grads"], edge="empty-batch"),
        ask("one-token", "A layer of one output, whose axes a squeeze takes away.", ALL, edge="one-token", o=1, i=4),
        ask("one-of-each", "One input and one output: l [1, 1] does not say which of them it scales.", ALL, True,
            o=1, i=1),
        ask("rows", "A row of the batch that has an influence on the others.", ["batch"], batch=[3, 2]),
        ask("bfloat16", "An output or a merged weight that leaves the layer's dtype, or loses more than it must.",
            ["dtype"], dtype="bfloat16"),
        ask("float16-takes", "An input in float16 that is scaled in float32 and not rounded again.", ["dtype"], True,
            dtype="float16", kind="conv1d"),
        ask("trained", "The layer's own W and b trained too; a fresh adapter that changes the output.",
            ["frozen", "init"]),
        ask("changed", "Something cached that new values of the parameters make stale.", ["sensitive"]),
        ask("unmerged", "Unmerging by a division that does not give back what was there.", ["unmerge"], **exact),
        ask("unloaded", "A plain layer of another kind around the merged weights of a square one, or not merged.",
            ["unload"], **{**square, **conv}),
        ask("disabled", "Disabled and enabled again, the adapter stays away.", ["disable"]),
    ]  # fmt: skip
