"""The golden vectors of models with two stacks, an encoder and a decoder. T5 has relative positions and no biases; BART
has learned positions, biases everywhere and norms behind. Their decoders read other tokens than their encoders.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refpeft.conformance.golden import Question
from refpeft.conformance.golden_models import RUN, model
from refpeft.conformance.tiny import V1_1

Fields = Mapping[str, Any]


def questions(method: str) -> Sequence[Question]:
    kinds: Mapping[tuple[str, ...], Callable[[str], list[Question]]] = {
        ("lora",): matrices,
        ("dora",): magnitudes,
        ("loha", "lokr", "glora", "dylora"): sums,
        ("oft", "boft"): rotations,
        ("prompt_tuning", "p_tuning"): prompts,
        ("prefix_tuning",): prefixes,
        ("houlsby", "pfeiffer", "parallel"): bottlenecks,
        ("full", "partial", "bitfit", "ln_tuning", "trainable_tokens"): lambda m: SELECTIONS[m](m),
        ("did", "said"): subspaces,
    }
    return next((of(method) for methods, of in kinds.items() if method in methods), [])


# ── changes of a weight ──────────────────────────────────────────────────────────────────────────────────────────────


def matrices(m: str) -> list[Question]:
    return [
        model("t5", "Attention to the encoder that sees something else, has no adapter, or takes no gradient back.",
              RUN, m, "t5"),
        model("t5-decoding", "A decoder that takes its relative positions for an encoder's, or forgets what it read.",
              ["causal", "incremental"], m, "t5", batch=[2, 5]),
        model("bart", "Names that are matched in one of the two stacks; embeddings that are not scaled.", RUN, m,
              "bart"),
        model("bart-padding", "A decoder that sees what is padding to the encoder, or is masked like it.", ["padding"],
              m, "bart", padded=True),
    ]  # fmt: skip


def magnitudes(m: str) -> list[Question]:
    return [
        model("t5", "Attention to the encoder whose magnitudes are those of another attention, or take no gradient.",
              RUN, m, "t5"),
        model("bart", "Biases scaled with the weight's norm, in either of two stacks.", RUN, m, "bart"),
        model("bart-merged", "A merged model with the layers of one of two stacks not merged.", ["merge"], m, "bart",
              wants=["merged_logits"]),
    ]  # fmt: skip


def sums(m: str) -> list[Question]:
    return [
        model("t5", "Layers of one of two stacks left out; attention to the encoder that takes no gradient back.", RUN,
              m, "t5"),
    ]  # fmt: skip


def rotations(m: str) -> list[Question]:
    return [
        model("t5", "The decoder's own input turned where it is what the encoder gave that is multiplied.", RUN, m,
              "t5"),
        model("bart-merged", "A merged model with the layers of one of two stacks, or a bias, turned the wrong way.",
              ["merge"], m, "bart", wants=["merged_logits"]),
    ]  # fmt: skip


# ── prompts and prefixes ─────────────────────────────────────────────────────────────────────────────────────────────


def prompts(m: str) -> list[Question]:
    found = [
        model("t5", "A prompt before the decoder's tokens too; rows for it, which are never used, with a gradient.",
              RUN, m, "t5"),
        model("t5-decoding", "A prompt that is lost, or put in again, when the decoder goes on.", ["incremental"], m,
              "t5", batch=[2, 4]),
        model("bart", "Tokens of the encoder that keep their places, or of the decoder that are moved.", RUN, m,
              "bart"),
        model("bart-padding", "Attention to the encoder with the mask of its tokens, which is shorter by the prompt.",
              ["padding"], m, "bart", padded=True),
        *labels(m),
    ]  # fmt: skip
    return [*found, *placed(m)] if m == "prompt_tuning" else found


def labels(m: str) -> list[Question]:
    """A start token that is neither padding nor the family's usual one."""
    return [
        model("t5-loss", "Labels that are shifted twice, so that the first is not predicted; padding that counts.",
              ["loss"], m, "t5"),
        model("bart-loss", "Labels that get ignored places for a prompt that the decoder has not; the usual start "
              "token, where the config has another.", ["loss"], m, "bart"),
    ]  # fmt: skip


def placed(m: str) -> list[Question]:
    behind, once = {"placement": "after_embedding"}, {"num_transformer_submodules": 1}
    return [
        model("bart-behind", "A prompt behind the embeddings that is scaled or normed as they are.", RUN, m, "bart",
              config=behind),
        model("t5-once", "Twice as many rows as the prompt is long, where one stack has it.", RUN, m, "t5",
              config=once),
    ]  # fmt: skip


def prefixes(m: str) -> list[Question]:
    projected: Fields = {"prefix_projection": True, "input_size": 8, "position_shift": False}
    return [
        model("t5", "One prefix for all three attentions; relative positions without the places of the prefix, or "
              "with them where the decoder attends to the encoder.", RUN, m, "t5"),
        model("t5-unshifted", "Relative positions for a prefix that has no place.", RUN, m, "t5",
              config={"position_shift": False}),
        model("t5-layers", "Layers of three prefixes in another order.", ["layers"], m, "t5", layers=2, batch=[1, 2]),
        model("t5-decoding", "Prefixes of the decoder put in again, or lost, where keys and values are kept.",
              ["incremental"], m, "t5", batch=[2, 4]),
        model("bart", "Keys of the encoder's prefix and of the one that attends to it exchanged.", RUN, m, "bart"),
        model("bart-projected", "One MLP that makes all three prefixes; relu for tanh.", RUN, m, "bart",
              config=projected),
        model("bart-padding", "The encoder's mask put over the prefix where the decoder attends to the encoder.",
              ["padding"], m, "bart", padded=True),
        *labels(m),
    ]  # fmt: skip


# ── bottleneck adapters ──────────────────────────────────────────────────────────────────────────────────────────────


def bottlenecks(m: str) -> list[Question]:
    cross: Fields = {"cross_adapter": True, "non_linearity": "tanh"}
    return [
        model("t5", "A wrong place for the adapter or its residual in stacks with norms before; an adapter at the "
              "attention to the encoder that was not asked for.", RUN, m, "t5"),
        model("t5-cross", "No adapter at the attention to the encoder that was asked for, or the decoder's own there.",
              RUN, m, "t5", config=cross),
        model("bart", "A wrong place for the adapter or its residual in stacks with norms behind.", RUN, m, "bart"),
        model("t5-left-out", "Layers of a decoder that are not numbered on from the encoder's.", ["left-out"], m, "t5",
              layers=2, without=2, batch=[1, 2]),
    ]  # fmt: skip


# ── the model's own tensors ──────────────────────────────────────────────────────────────────────────────────────────


def full(m: str) -> list[Question]:
    return [
        model("t5", "A tensor that two stacks and a head share, with the gradient of one of them.", RUN, m, "t5"),
    ]  # fmt: skip


def partial(m: str) -> list[Question]:
    return [
        model("t5-layer-of-two", "The last layer of the decoder only, or the last of all layers.", RUN, m, "t5",
              layers=2, batch=[1, 2]),
        model("bart-without-head", "A bias of the head's own, trained though the head should not be.",
              ["logits", "count"], m, "bart", config={"head": False}),
    ]  # fmt: skip


def biases(m: str) -> list[Question]:
    return [
        model("bart", "Biases of the attention to the encoder, or of one of two stacks, left where they were.", RUN, m,
              "bart"),
        model("bart-some", "Queries of the attention to the encoder left out.", RUN, m, "bart",
              config={"biases": "query_and_intermediate"}),
    ]  # fmt: skip


def norms(m: str) -> list[Question]:
    return [
        model("t5", "Norms without a shift; those of the attention to the encoder, or the last of a stack, left out.",
              RUN, m, "t5"),
        model("bart", "Norms of the embeddings of one of two stacks left where they were.", RUN, m, "bart"),
    ]  # fmt: skip


def tokens(m: str) -> list[Question]:
    """Of tokens that the encoder is given, the decoder, or both."""

    def new(*ids: int) -> Fields:
        return {"config": {"token_indices": list(ids)}}

    return [
        model("t5", "New rows for the encoder, and old ones for the decoder or for the head, which share them.", RUN, m,
              "t5", **new(10, 7)),
        model("t5-untied", "New rows in a head that has a matrix of its own.", RUN, m, "t5", more=V1_1, **new(2, 4)),
        model("bart", "A head that loses its bias; rows that are not scaled, or scaled in the head too.", RUN, m,
              "bart", **new(7, 12)),
    ]  # fmt: skip


SELECTIONS: Mapping[str, Callable[[str], list[Question]]] = {
    "full": full, "partial": partial, "bitfit": biases, "ln_tuning": norms, "trainable_tokens": tokens,
}  # fmt: skip


def subspaces(m: str) -> list[Question]:
    return [
        model("t5", "A tensor that two stacks share projected twice; layers of one of them left out.", RUN, m, "t5")
    ]
