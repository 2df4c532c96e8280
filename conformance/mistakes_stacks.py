"""What the mutants get wrong of models that have two stacks, an encoder and a decoder."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft import layers, relative
from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Whole
from refpeft.layers import Encoded, Pair, Parts
from refpeft.ops import Array, cross_entropy
from refpeft.part import Grads, Lazy, Once, Run, Want

attend_across, encoded_pair, buckets = layers.attend_across, layers.encoded_pair, relative.buckets


def of_the_decoder(m: Parts, at: str, encoded: Encoded, past: Pair | None) -> tuple[Run, list[Pair]]:
    """Keys and values are those of the decoder's own positions."""
    kept: list[Pair] = []

    def run(x: Array) -> Any:
        f, there = attend_across(m, at, replace(encoded, x=x, mask=None), None)
        y, back = f(x)
        kept.extend(there)

        def cut(dy: Lazy, want: Want) -> Any:
            dx, grads = back(dy, want)
            return dx, without(encoded, grads)

        return y, cut

    return run, kept


def sees_padding(m: Parts, at: str, encoded: Encoded, past: Pair | None) -> tuple[Run, list[Pair]]:
    """The mask is that of the encoder's own attention only."""
    return attend_across(m, at, replace(encoded, mask=None), past)


def detached(m: Parts, at: str, encoded: Encoded) -> tuple[Array, Array, Callable[..., Any]]:
    """Through the attention to the encoder no gradient reaches it."""
    k, v, back = encoded_pair(m, at, encoded)

    def cut(dk: Lazy, dv: Lazy, want: Want) -> Any:
        return without(encoded, back(dk, dv, want))

    return k, v, cut


def without(encoded: Encoded, grads: Grads) -> Grads:
    """Nothing for the encoder."""
    return {**grads, encoded.key: Once(lambda: np.zeros_like(encoded.x))} if encoded.key in grads else grads


def both_ways(r: Array, n: int, longest: int, both: bool) -> Array:
    """Half of the buckets are for what comes later, in a decoder too."""
    return buckets(r, n, longest, True)


class LeavesOutCross(Whole):
    """Adapters of the attention to the encoder, which have the names of those of self-attention, are not put there."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.active = [
            a.replace(params={n: v * (not any(c in n for c in CROSS)) for n, v in a.params.items()})
            for a in self.active
        ]


class OfLabels(Whole):
    """The decoder reads what it should, and the loss is of other labels."""

    def loss(self) -> Arrays:
        if not self.base.config.encoder_decoder:
            return super().loss()
        given = {**self.inputs, **self.shifted()}
        y = self.base(self.case.arrays["ids"], self.active, **given)[0]
        return {"loss": cross_entropy(*self.compared(y, self.case.arrays["labels"]))[0]}

    def compared(self, y: Array, labels: Array) -> tuple[Array, Array]:
        return y, labels


class ShiftsTwice(OfLabels):
    """As of a decoder alone, each place predicts the next one, and none the first."""

    def compared(self, y: Array, labels: Array) -> tuple[Array, Array]:
        return y[:, :-1], labels[:, 1:]


class PaddingCounts(OfLabels):
    """What is ignored is to be predicted as padding."""

    def compared(self, y: Array, labels: Array) -> tuple[Array, Array]:
        return y, np.where(labels < 0, self.base.config.pad_token_id, labels)


class StartsWithPadding(OfLabels):
    """The decoder starts with padding, as T5's usually does, whatever the config says."""

    def shifted(self) -> Arrays:
        read = super().shifted()["decoder_input_ids"].copy()
        read[:, 0] = self.base.config.pad_token_id
        return {"decoder_input_ids": read}


CROSS = ("EncDecAttention", "encoder_attn")
