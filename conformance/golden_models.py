"""The golden vectors of whole models, none larger than two layers."""

from collections.abc import Sequence
from typing import Any

from refpeft.conformance import tiny
from refpeft.conformance.golden import Question
from refpeft.conformance.strategies import FLAGS
from refpeft.conformance.traits import LORA, TRAITS

Fields = dict[str, Any]
HEAD = tiny.CLASSIFIER
RUN = ("logits", "param-grads", "count")


def questions(method: str) -> Sequence[Question]:
    kinds = {
        ("lora", "rslora", "dora"): matrices,
        ("ia3",): vectors,
        ("vera",): projected,
        ("adalora",): triplets,
        ("full", "partial", "bitfit", "ln_tuning", "trainable_tokens"): selections,
        ("houlsby", "pfeiffer", "parallel"): bottlenecks,
        ("prompt_tuning", "p_tuning"): prompts,
        ("prefix_tuning",): prefixes,
        ("p_tuning_v2",): tasks,
        ("did", "said"): subspaces,
    }
    return next((of(method) for methods, of in kinds.items() if method in methods), [])


def model(
    name: str, hunts: str, properties: Sequence[str], method: str, family: str, head: str = "", **fields: Any
) -> Question:
    """One layer, in float32; '' is the family's language model."""
    config, wants = fields.pop("config", {}), fields.pop("wants", None)
    head = head or tiny.LM[family]
    own = plain(method, family) if method in LORA else TRAITS[method].plain(family, head)
    usual = {
        "method": method, "family": family, "architecture": head, "layers": 1, "dtype": "float32",
        "config": own | config, "batch": [2, 3], "draw": 0,
    }  # fmt: skip
    return Question(name, hunts, "model", properties, {**usual, **fields}, wants)


def plain(method: str, family: str) -> dict[str, Any]:
    """LoRA and its kin on two kinds of layers of unlike shapes, and one more."""
    linears = tiny.LINEARS[family]
    return {"r": 2, "lora_alpha": 6.0, **FLAGS.get(method, {}), "target_modules": [*linears[:2], linears[-1]]}


def matrices(m: str) -> list[Question]:
    return [
        model("gpt2", "Gradients that take another path through a model than its outputs; what is not trained counted.",
              RUN, m, "gpt2"),
        model("llama-merged", "A merged model with the adapter's tensors left in it, or with one not merged.",
              ["merge"], m, "llama"),
        model("padding", "What stands at padded positions has an influence on the others.", ["padding"], m, "bert",
              padded=True),
        model("decoding", "Positions counted from 0 again where keys and values are kept.", ["incremental"], m,
              "qwen2"),
        model("two", "Two adapters, where the second is run with the first one's scale or before it.", ["order"], m,
              "llama", swap=True),
        model("two-merged", "Two adapters, of which one is merged.", ["two-merged"], m, "gpt2"),
        model("patterns", "rank_pattern and alpha_pattern with keys of their own, read as one list.", ["patterns"], m,
              "llama", key="[a-z]*.0..*{}"),
        model("tied-head", "A head tied to the embedding, which is adapted alone: the embedding must stay.", ["tied"],
              m, "gpt2", which="lm_head"),
        model("tied-embedding", "An embedding tied to the head, which is adapted alone: the head must stay.", ["tied"],
              m, "gpt2", which="wte"),
        model("head", "A head that is trained whole, and not in the place of the model's own; that one trained too.",
              ["modules-to-save"], m, "bert", HEAD),
        model("trained-float64", "What is trained in float32 only, or besides where a model is of another dtype.",
              ["trained"], m, "gpt2", dtype="float64"),
    ]  # fmt: skip


def vectors(m: str) -> list[Question]:
    return [
        model("gpt2", "Gradients that take another path through a model than its outputs; what is not trained counted.",
              RUN, m, "gpt2"),
        model("t5", "Layers of one of two stacks left out, or scaled on the other side.", RUN, m, "t5"),
        model("bert-merged", "A merged model with the adapter's tensors left in it, or a bias left as it was.",
              ["merge"], m, "bert"),
        model("padding", "What stands at padded positions has an influence on the others.", ["padding"], m, "bert",
              padded=True),
        model("decoding", "Positions counted from 0 again where keys and values are kept.", ["incremental"], m,
              "qwen2"),
        model("two", "Two adapters, of which the second scales the side that the first does.", ["order"], m, "llama",
              swap=True),
        model("two-merged", "Two adapters, of which one is merged.", ["two-merged"], m, "gpt2"),
    ]  # fmt: skip


def projected(m: str) -> list[Question]:
    wants: Fields = {"wants": ["merged"], "regime": "exact"}
    return [
        model("exact", "Another corner of the shared matrices; one of the two vectors forgotten; a stored [i, o] taken "
              "for [o, i].", ["merge"], m, "gpt2", **wants),
        model("exact-llama", "Corners of matrices whose layers have unlike shapes.", ["merge"], m, "llama", **wants),
        model("exact-rank-one", "A rank's axis squeezed away where r = 1.", ["merge"], m, "bert", config={"r": 1},
              **wants),
        model("gpt2", "Gradients of a vector that miss the other one; what is shared counted as trained.", RUN, m,
              "gpt2"),
        model("llama", "Another family, where the largest layer is another one.", RUN, m, "llama"),
        model("t5", "Layers of one of two stacks left out.", RUN, m, "t5"),
        model("classifier", "A head for classification, which has no vectors.", RUN, m, "roberta", HEAD),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "gpt2",
              dtype="float64"),
        model("bert-merged", "Merged, another output than running.", ["merge"], m, "bert"),
        model("padding", "What stands at padded positions has an influence on the others.", ["padding"], m, "bert",
              padded=True),
        model("decoding", "Positions counted from 0 again where keys and values are kept.", ["incremental"], m,
              "qwen2"),
        model("two", "Two adapters, of which one runs with the other's vectors.", ["order"], m, "llama", swap=True),
        model("two-merged", "Two adapters, of which one is merged.", ["two-merged"], m, "gpt2"),
        model("exact-one", "What exact-rank-one hunts, where two of the vectors are zero: here they are not.",
              ["merge"], m, "bert", config={"r": 1}, **wants),
    ]  # fmt: skip


def triplets(m: str) -> list[Question]:
    """s is never a power of two, since 10⁻⁵ is in it: what is exact is the number of parameters."""
    return [
        model("count", "What is not trained counted, or the singular values forgotten.", ["count"], m, "gpt2",
              regime="exact"),
        model("gpt2", "α not divided by the rank, or by another one; the gradient of the singular values without s.",
              RUN, m, "gpt2"),
        model("llama", "Another family, where layers have unlike shapes.", RUN, m, "llama"),
        model("bert", "An encoder: a triplet lost.", RUN, m, "bert"),
        model("t5", "Layers of one of two stacks left out.", RUN, m, "t5"),
        model("classifier", "A head for classification, which has no adapter.", RUN, m, "roberta", HEAD),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "gpt2",
              dtype="float64"),
        model("rank-one", "A rank's axis squeezed away where there is one triplet.", RUN, m, "gpt2",
              config={"init_r": 1, "target_r": 1}),
        model("merged", "Merged, another output than running; singular values forgotten.", ["merge"], m, "gpt2"),
        model("bert-merged", "A merged model with the adapter's tensors left in it.", ["merge"], m, "bert"),
        model("padding", "What stands at padded positions has an influence on the others.", ["padding"], m, "bert",
              padded=True),
        model("decoding", "Positions counted from 0 again where keys and values are kept.", ["incremental"], m,
              "qwen2"),
        model("two", "Two adapters, of which one runs with the other's scale.", ["order"], m, "llama", swap=True),
        model("two-merged", "Two adapters, of which one is merged.", ["two-merged"], m, "gpt2"),
    ]  # fmt: skip


def selections(m: str) -> list[Question]:
    causal, other = ("gpt2", "qwen2") if m == "bitfit" else ("gpt2", "llama")
    merge: Fields = {"wants": ["merged"], "regime": "exact"}
    return [
        model("exact", "Merged tensors that are not, bit for bit, those that were trained or the base's.",
              ["merge"], m, causal, **merge),
        model("exact-bert", "A merged encoder, whose layers all have biases, of which one is not merged.",
              ["merge"], m, "bert", **merge),
        model("gpt2", "What was trained taken for a change and added; one of the tensors left where it was; a tied "
              "tensor with the gradient of one use.", RUN, m, "gpt2"),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "gpt2",
              dtype="float64"),
        model(other, "A family with other names, norms or biases.", RUN, m, other),
        model("bert", "An encoder: tensors that lie outside the layers, tied and untied.", RUN, m, "bert"),
        model("classifier", "A head for classification, which is random at first and must be trained.", RUN, m,
              "roberta", HEAD),
        model("merged", "Merged, another output than running.", ["merge"], m, causal),
        model("causal", "A later token that changes what comes before it.", ["causal"], m, other),
        model("padding", "What stands at padded positions has an influence on the others.", ["padding"], m, "bert",
              padded=True),
        model("decoding", "Positions counted from 0 again where keys and values are kept.", ["incremental"], m, "gpt2"),
        *variants(m),
    ]  # fmt: skip


def variants(m: str) -> list[Question]:
    if m == "partial":
        return [
            model("without-head", "A head that is trained though it should not be.", RUN, m, "llama",
                  config={"head": False}),
            model("layer-of-two", "Layers counted from the other end.", RUN, m, "gpt2", layers=2),
        ]  # fmt: skip
    if m == "bitfit":
        return [model("some", "Biases of queries and of the first MLP matrix only, where all are trained.", RUN, m,
                      "bert", config={"biases": "query_and_intermediate"})]  # fmt: skip
    if m == "trainable_tokens":
        ids: Fields = {"config": {"token_indices": [12, 3, 4]}}
        return [model("order", "Indices that are not sorted, with rows in their order.", RUN, m, "llama", **ids)]
    return [model("two-layers", "The first layer taken for all.", RUN, m, "bert", layers=2)]


def bottlenecks(m: str) -> list[Question]:
    option: Fields = {"batch": [2, 3], "layers": 1}
    return [
        model("count", "Norms, biases or scales that are trained and not counted.", ["count"], m, "bert",
              regime="exact"),
        model("bert", "A wrong place for the adapter or its residual in a layer with norms behind; biases lost.",
              RUN, m, "bert", config={"non_linearity": "silu"}),
        model("gpt2", "A wrong place for the adapter in a layer with norms before; an activation taken for a similar "
              "one.", RUN, m, "gpt2",
              config={"non_linearity": "gelu_new", "scaling": 4.0}),
        model("llama", "A family of gated MLPs; relu in place of its like.", RUN, m, "llama"),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "roberta",
              dtype="float64", config={"non_linearity": "tanh"}),
        model("gate", "A gate of every token, or of the batch, in place of the sequence.", ["options"], m, "gpt2",
              variant=1, **option),
        model("learned-scale", "A learned scale that takes in the residual, or the gradient of one token.",
              ["options"], m, "bert", variant=2, **option),
        model("channel-scale-norm-before", "A norm before the adapter, and a scale for each channel.", ["options"], m,
              "gpt2", variant=3, **option),
        model("channel-scale-norm-after", "A norm after the adapter that takes the ε of the model's norms for its own.",
              ["options"], m,
              "bert", variant=4, **option),
        model("residual-before-norm", "The residual added on the other side of the adapter's norm.", ["options"], m,
              "llama", variant=5, **option),
        model("first-left-out", "Layers in leave_out counted from 1, or from the top.", ["left-out"], m, "gpt2",
              layers=2, without=0),
        model("last-left-out", "The last of two layers left out, counted from 1 or from the top.",
              ["left-out"], m, "bert", layers=2, without=1),
        model("padding", "What stands at padded positions has an influence on the others.", ["padding"], m, "bert",
              padded=True),
        model("causal", "A later token that changes what comes before it.", ["causal"], m, "gpt2"),
    ]  # fmt: skip


def prompts(m: str) -> list[Question]:
    head: Fields = {"config": {"placement": "after_embedding"}} if m == "prompt_tuning" else {}
    found = [
        model("count", "What is not trained counted, or part of what is trained forgotten.", ["count"], m, "gpt2",
              regime="exact"),
        model("gpt2", "A prompt behind the tokens, or tokens that keep their places; gradients averaged over the "
              "batch.", RUN, m, "gpt2"),
        model("llama", "A prompt before tokens with rotary positions, that are not shifted.", RUN, m, "llama"),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "gpt2",
              dtype="float64"),
        model("bert", "An encoder: token types and the embedding's norm for the prompt too.", RUN, m, "bert", **head),
        model("classifier", "A classifier that reads the prompt's first place for the first token's.", RUN, m,
              "roberta", HEAD),
        model("causal", "A later token that changes what comes before it.", ["causal"], m, "gpt2"),
        model("padding", "A prompt that is masked with the padding; padding that has an influence.", ["padding"], m,
              "bert", padded=True),
        model("left-padding", "A prompt before the padding, or places that count it.", ["left-padding"], m, "gpt2",
              padded=True, left=True),
        model("decoding", "The prompt put in again at every step.", ["incremental"], m, "gpt2"),
        model("loss", "The first token, which the end of the prompt predicts, left out of the loss.", ["loss"], m,
              "gpt2"),
        model("one", "A prompt of one place, whose axis a squeeze takes away.", RUN, m, "qwen2",
              config={"num_virtual_tokens": 1}),
    ]  # fmt: skip
    return found if m != "p_tuning" else [*found, *encoders(m)]


def encoders(m: str) -> list[Question]:
    return [
        model("dropped", "The encoder's input taken for its output.", ["dropped"], m, "gpt2"),
        model("recurrent", "An LSTM that reads forwards only, its gates in another order, one of its biases frozen.",
              ["recurrent"], m, "llama"),
    ]  # fmt: skip


def prefixes(m: str) -> list[Question]:
    made: Fields = {"prefix_projection": True}
    return [
        model("count", "What is not trained counted, or part of what is trained forgotten.", ["count"], m, "gpt2",
              regime="exact"),
        model("gpt2", "Keys and values swapped; tokens that are not shifted; a prefix behind the causal mask; "
              "gradients averaged over the batch.", RUN, m, "gpt2"),
        model("llama", "Rotary positions in the prefix's keys; fewer heads of keys than of queries.", RUN, m, "llama"),
        model("bert", "An encoder, where every token sees the prefix.", RUN, m, "bert"),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "gpt2",
              dtype="float64"),
        model("unshifted", "Tokens that are shifted though position_shift says not.", RUN, m, "gpt2",
              config={"position_shift": False}),
        model("projected", "An MLP that makes the prefix: relu for tanh, one of its biases lost.", RUN, m, "gpt2",
              config=made),
        model("dropped", "The MLP's input taken for its output.", ["dropped"], m, "llama"),
        model("layers", "The first layer's prefix for all; keys of all layers first, and then values.", ["layers"], m,
              "gpt2", layers=2),
        model("rows", "One task's prefix for all rows, or for those that have none.", ["rows"], m, "gpt2",
              rows=[1, 0, -1], batch=[3, 3]),
        model("causal", "A later token that changes what comes before it.", ["causal"], m, "gpt2"),
        model("padding", "A prefix that is masked with the padding; padding that has an influence.", ["padding"], m,
              "bert", padded=True),
        model("left-padding", "Places that count the padding.", ["left-padding"], m, "gpt2", padded=True, left=True),
        model("decoding", "The prefix put in again, or lost, where keys and values are kept.", ["incremental"], m,
              "gpt2"),
        model("loss", "A prefix that is thought to predict something.", ["loss"], m, "gpt2"),
        model("two", "Two prefixes in the other order.", ["order"], m, "gpt2", swap=True),
    ]  # fmt: skip


def tasks(m: str) -> list[Question]:
    rows: Fields = {"batch": [3, 3]}
    return [
        model("count", "A head that is trained and not counted.", ["count"], m, "bert", HEAD, regime="exact"),
        model("bert", "Keys and values swapped, tokens that are not shifted, a frozen head, gradients averaged.",
              RUN, m, "bert", HEAD),
        model("roberta", "Positions that start behind the padding's.", RUN, m, "roberta", HEAD),
        model("gpt2", "A decoder, which classifies by its last token.", RUN, m, "gpt2", HEAD),
        model("llama", "A decoder with rotary positions, which a prefix's keys must not get.", RUN, m, "llama", HEAD),
        model("qwen2", "A decoder with biases in its attention, which a prefix must not get.", RUN, m, "qwen2", HEAD),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "gpt2", HEAD,
              dtype="float64"),
        model("one", "A prefix of one place, whose axis a squeeze takes away.", RUN, m, "bert", HEAD,
              config={"num_virtual_tokens": 1}),
        model("layers", "The first layer's prefix for all; keys of all layers first, and then values.", ["layers"], m,
              "bert", HEAD, layers=2),
        model("rows", "One task's prefix for all rows, or for those that have none.", ["rows"], m, "bert", HEAD,
              rows=[1, 0, -1], **rows),
        model("rows-of-one", "Gradients of a task that has one row of three.", ["rows"], m, "gpt2", HEAD,
              rows=[0, 0, 1], **rows),
        model("padding", "A prefix that is masked with the padding; padding that has an influence.", ["padding"], m,
              "bert", HEAD, padded=True),
        model("padding-gpt2", "The last token looked for where the padding is.", ["padding"], m, "gpt2", HEAD,
              padded=True),
    ]  # fmt: skip


def subspaces(m: str) -> list[Question]:
    wants: Fields = {"wants": ["merged"], "regime": "exact"}
    return [
        model("exact", "The projection: a permutation inverted, signs forgotten, a matrix filled along the wrong side, "
              "biases forgotten, a tied tensor moved twice.", ["merge"], m, "gpt2", **wants),
        model("exact-llama", "The projection of matrices that are wide, where there are no biases.",
              ["merge"], m, "llama", **wants),
        model("exact-transpose", "A gradient that is not the projection's transpose.", ["transpose"], m, "gpt2",
              regime="exact"),
        model("gpt2", "Gradients that take another path than outputs; the projection counted as trained.", RUN, m,
              "gpt2"),
        model("bert", "An encoder, with tensors outside its layers that are projected too.", RUN, m, "bert"),
        model("qwen2", "A decoder where some layers have biases and some have none.", RUN, m, "qwen2"),
        model("classifier", "A head for classification, which is not projected.", RUN, m, "roberta", HEAD),
        model("float64", "Something computed in float32 inside.", ["logits", "param-grads"], m, "gpt2",
              dtype="float64"),
        model("columns", "The divisor of the projection, which G holds already, applied again.", RUN, m, "llama",
              config={"columns": "tensor"}),
        model("merged", "Merged, another output than running.", ["merge"], m, "roberta"),
        model("two-merged", "Two adapters, of which one is merged.", ["two-merged"], m, "gpt2"),
        model("padding", "What stands at padded positions has an influence on the others.", ["padding"], m, "bert",
              padded=True),
        model("decoding", "Positions counted from 0 again where keys and values are kept.", ["incremental"], m, "gpt2"),
    ]  # fmt: skip
