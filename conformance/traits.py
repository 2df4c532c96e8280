"""What the suite may ask of each method, and what it draws for it.

The properties about matrices (`LORA`) are of LoRA and its kin. A method of another kind says here which of the other
properties make sense for it, on which models, and which configs are worth trying: the first value of each is the
simplest, which is where shrinking goes. A method without an entry is not checked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refpeft.conformance import tiny
from refpeft.methods import METHODS

Structure = dict[str, Any]

RUNS = ("model/logits", "model/param-grads", "model/count")
TOKENS = ("model/causal", "model/padding", "model/incremental")
LIVES = tuple("lifecycle/" + name for name in ("disable", "switch", "delete", "save-load", "saved-keys"))
STORIES = tuple("story/" + name for name in ("any-order", "files", "replaced", "averaged", "sixteen-bits"))
BESIDE = ("chain", "merge")  # features that make no sense for what is put beside the layers of a transformer
ALONE_IN_FRONT = (*BESIDE, "together")
MERGES = tuple(
    ["model/merge", "export/onnx"]
    + ["lifecycle/" + name for name in ("merge-twice", "safe-merge", "refused-merge", "unmerge", "change")]
)


@dataclass(frozen=True)
class Traits:
    """`asks`: properties as level/name; None means all. `choices`: values to draw for each field of the config;
    `fixed`: fields that depend on the family and the architecture. `second`: another config of the same kind.
    `layer`: values for the config of one layer, called 'layer'. `lacks`: features that make no sense for the method.
    `exact`: where numbers are small integers, so is all that is computed of them. `outputs`: of the layers that are
    always asked about; `step`: what the outputs of others are multiples of, by what a target has chosen."""

    letter: str  # of its claims
    asks: Sequence[str] | None = None
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Sequence[Structure] = ({},)  # fields that belong together, of which one group is drawn
    fixed: Callable[[str, str], Structure] = lambda family, architecture: {}
    second: Callable[[Structure], Structure] = lambda first: first
    families: Sequence[str] = tuple(tiny.FAMILIES)
    architectures: Sequence[str] | None = None  # None: any; '' is the family's language model
    layer: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    lacks: Sequence[str] = ()
    step: Callable[[Structure], int] = lambda chosen: 1
    exact: bool = True
    outputs: int = 3

    def plain(self, family: str, architecture: str) -> Structure:
        first = {name: values[0] for name, values in self.choices.items()}
        return first | self.variants[0] | self.fixed(family, architecture)


def other_rank(first: Structure) -> Structure:
    return {**first, "r": first["r"] + 1, "lora_alpha": 2 * first["lora_alpha"] + 1}


BIASED = ("gpt2", "qwen2", "bert", "roberta", "bart")  # families whose layers have biases
SELECTION = (*RUNS, *TOKENS, *LIVES, *MERGES)


def norms(family: str, architecture: str) -> Structure:
    return {"target_modules": list(tiny.NORMS[family])}


def embedding(family: str, architecture: str) -> Structure:
    return {"target_modules": [tiny.TOKENS[family]]}


def other_tokens(first: Structure) -> Structure:
    return {**first, "token_indices": [9, 10]}


def longer(first: Structure) -> Structure:
    return {**first, "num_virtual_tokens": first["num_virtual_tokens"] + 1}


POSITIONED = ("gpt2", "bert", "roberta", "bart")  # families with learned positions, behind which a prompt can be put
PROMPT: Mapping[str, Sequence[Any]] = {"num_virtual_tokens": [2, 1, 3], "placement": ["before", "after_embedding"]}
PREFIX: Mapping[str, Sequence[Any]] = {
    "num_virtual_tokens": [2, 1, 3],
    "prefix_projection": [False, True],
    "encoder_hidden_size": [5, 3],
    "position_shift": [True, False],
}
BOTTLENECK: Mapping[str, Sequence[Any]] = {
    "reduction_factor": [4, 2],
    "non_linearity": ["relu", "silu", "gelu_new", "tanh"],
    "scaling": [1.0, 4.0],
}
OPTIONS: Sequence[Structure] = (  # a norm after the adapter takes away what a number before it does, gate or scale
    {},
    {"use_gating": True},
    {"scaling": "learned"},
    {"scaling": "channel", "ln_before": True},
    {"scaling": "channel", "ln_after": True},
    {"ln_after": True, "adapter_residual_before_ln": True, "use_gating": True},
)
PFEIFFER = {**BOTTLENECK, "residual_before_ln": [True, False, "post_add"]}
TOGETHER = ("model/order", "lifecycle/two-active")
BOTTLENECKS = (*RUNS, "model/causal", "model/padding", "model/options", "model/left-out", *LIVES, *TOGETHER, *STORIES)


def wider(first: Structure) -> Structure:
    return {**first, "reduction_factor": 1}


ENCODER: Mapping[str, Sequence[Any]] = {
    "num_virtual_tokens": [2, 1, 3],
    "encoder_reparameterization_type": ["MLP", "LSTM"],
    "encoder_hidden_size": [5, 3],
}
WITH_HEAD = ("model/modules-to-save", "lifecycle/modules-to-save", "lifecycle/saved-modules")
SOFT = (*RUNS, *TOKENS, "model/left-padding", "model/loss", "lifecycle/language-head", *LIVES, *STORIES)
DROPS = ("model/dropped",)
LAYERS = ("model/layers", "model/rows")
INTRINSIC = (*SELECTION, "model/transpose", "model/two-merged", "lifecycle/two-active", "lifecycle/two-merged")


ALONE = (
    "forward",
    "input-grad",
    "param-grads",
    "frozen",
    "init",
    "sensitive",
    "merge",
    "unmerge",
    "unload",
    "disable",
    "batch",
)
ONE_LAYER = tuple("layer/" + name for name in (*ALONE, "dtype"))
WHOLE_TOO = (*WITH_HEAD, "lifecycle/language-head", "lifecycle/saved-names")
PAIRS = ("model/order", "model/two-merged", "lifecycle/two-active", "lifecycle/two-merged", "export/onnx-two")
MATRICES = (*SELECTION, *PAIRS, *WHOLE_TOO, "model/trained", *STORIES)


# the last of each family's layers: vectors on what two kinds of layers give, and on what a third takes
TAKES = r".*(mlp\.c_proj|down_proj|intermediate\.dense|\.wo|fc2)"


TIED = ("model/embedding", "model/tied", "export/onnx-tied", "story/tied")
SCALED = ("model/patterns", "lifecycle/saved-patterns")


def linears(family: str, architecture: str) -> Structure:
    """Layers of unlike shapes, of which the last is the widest."""
    first, second, *_, last = tiny.LINEARS[family]
    return {"target_modules": [first, second, last]}


BUDGET: Mapping[str, Sequence[Any]] = {
    "init_r": [3, 2, 4], "target_r": [1, 2], "lora_alpha": [6.0, 1.5], "total_step": [10],
}  # fmt: skip


def more_triplets(first: Structure) -> Structure:
    return {**first, "init_r": first["init_r"] + 1, "lora_alpha": 2 * first["lora_alpha"] + 1}


def other_alpha(first: Structure) -> Structure:
    return {**first, "r": 2 * first["r"], "alpha": 3 * first["alpha"]}


def other_blocks(first: Structure) -> Structure:
    return {**first, "boft_block_size": 0, "boft_block_num": 2}


def halves(chosen: Structure) -> int:
    """Of outputs that several butterfly factors turn: blocks that have halves."""
    factors = chosen.get("boft_n_butterfly_factor", 1)
    return 2 * int(chosen["boft_block_num"]) if factors > 1 and chosen.get("side") == "output" else 1


def larger_blocks(first: Structure) -> Structure:
    return {**first, "oft_block_size": 2 * first["oft_block_size"]}


def other_start(first: Structure) -> Structure:
    """Of the same projection: HF peft has one for all adapters of a model."""
    return {**first, "d_initial": 2 * first["d_initial"]}


def one_side(first: Structure) -> Structure:
    """On what one kind of layer gives."""
    return {**first, "target_modules": first["target_modules"][:1], "feedforward_modules": []}


def head(family: str, architecture: str) -> Structure:
    """What is trained whole beside a prompt: the classifier, if that is what the model is."""
    return {"modules_to_save": [tiny.HEAD[family]]} if architecture == tiny.CLASSIFIER else {}


def prompted(family: str, architecture: str) -> Structure:
    """HF peft gives encoder-decoders a prompt of 2n rows, of which the first n are used."""
    two = family in tiny.ENCODER_DECODERS and not architecture.endswith("EncoderModel")
    rows = {"num_transformer_submodules": 2} if two else {}
    return head(family, architecture) | rows


def placed(family: str, architecture: str) -> Structure:
    return prompted(family, architecture) | ({} if family in POSITIONED else {"placement": "before"})


def some(family: str, architecture: str) -> Structure:
    """A kind of each: a matrix and its bias, norms, and the embedding, which a head may be tied to. (SAID needs more
    numbers than there are tensors: of BART's norms, which are many, two kinds.)"""
    norms = tiny.NORMS[family][: 2 if family == "bart" else None]
    return {"target_modules": [tiny.LINEARS[family][0], *norms, tiny.TOKENS[family]]}


TRAITS: Mapping[str, Traits] = {
    "lora": Traits("L", second=other_rank),
    "rslora": Traits("R", second=other_rank),
    "dora": Traits("D", second=other_rank),
    "ia3": Traits(
        "IA",
        (*ONE_LAYER, *MATRICES),
        {"feedforward_modules": [TAKES, []]},
        fixed=linears,
        second=one_side,
        layer={"feedforward_modules": [[], ["layer"]]},
        lacks=("embedding",),
    ),
    "adalora": Traits(
        "AL",
        (*ONE_LAYER, *MATRICES),
        BUDGET,
        fixed=linears,
        second=more_triplets,
        layer={"init_r": [2, 1, 3], "target_r": [1], "lora_alpha": [3.0], "total_step": [10]},
        lacks=("embedding",),
        exact=False,
    ),
    "vera": Traits("VE", MATRICES, {"r": [2, 1, 3], "d_initial": [0.1, 0.5]}, fixed=linears, second=other_start),
    "dylora": Traits(
        "DY",
        (*ONE_LAYER, *MATRICES, *TIED),
        {"r": [4, 8], "rank": [2, 4], "alpha": [6.0, 1.0], "block_size": [1, 2], "frozen": [False, True]},
        fixed=linears,
        second=other_alpha,
        layer={"r": [4], "rank": [2, 4], "alpha": [8.0], "block_size": [1, 2], "frozen": [False, True]},
    ),
    "loha": Traits(
        "LH",
        (*ONE_LAYER, *MATRICES, *TIED, *SCALED, "layer/cores", "layer/cores-grads"),
        {"r": [2, 1, 4], "alpha": [6.0, 1.0]},
        fixed=linears,
        second=other_alpha,
        layer={"r": [2, 1, 4], "alpha": [3.0]},
    ),
    "lokr": Traits(
        "LK",
        (*ONE_LAYER, *MATRICES, *TIED, *SCALED),
        {"r": [1, 2, 8], "alpha": [6.0, 1.0], "decompose_both": [False, True], "decompose_factor": [-1, 2]},
        fixed=linears,
        second=other_alpha,
        layer={"r": [1, 4], "alpha": [3.0], "decompose_both": [False, True]},
    ),
    "glora": Traits(
        "GL",
        (*ONE_LAYER, *MATRICES, *TIED, *SCALED),
        {"r": [2, 1, 4], "alpha": [6.0, 1.0]},
        fixed=linears,
        second=other_alpha,
        layer={"r": [2, 1, 4], "alpha": [4.0]},
    ),
    "oft": Traits(
        "OF",
        (*ONE_LAYER, *MATRICES, *TIED, "model/exact-cayley"),
        {"oft_block_size": [4, 2, 8], "num_cayley_neumann_terms": [5, 4, 7], "block_share": [False, True]},
        fixed=linears,
        second=larger_blocks,
        layer={"oft_block_size": [2, 4], "block_share": [False, True], "side": ["input", "output"]},
        exact=False,
        outputs=6,
    ),
    "boft": Traits(
        "BO",
        (*ONE_LAYER, *MATRICES, "model/butterfly"),
        {"boft_block_size": [2, 1]},
        fixed=linears,
        second=other_blocks,
        layer={"boft_block_size": [0], "boft_block_num": [1], "side": ["input", "output"]},
        lacks=("embedding",),
        step=halves,
        exact=False,
        outputs=4,
    ),
    "full": Traits("F", SELECTION),
    "partial": Traits("T", SELECTION, {"layers": [1], "head": [True, False], "tied": [False, True]}),
    "bitfit": Traits("B", SELECTION, {"biases": ["all", "query_and_intermediate"]}, families=BIASED),
    "ln_tuning": Traits("S", SELECTION, fixed=norms),
    "trainable_tokens": Traits(
        "W", SELECTION, {"token_indices": [[2, 5], [7], [12, 3, 4]]}, fixed=embedding, second=other_tokens
    ),
    "houlsby": Traits(
        "H", BOTTLENECKS, {**BOTTLENECK, "train_norms": [True, False]}, OPTIONS, second=wider, lacks=BESIDE
    ),
    "pfeiffer": Traits("PF", BOTTLENECKS, PFEIFFER, OPTIONS, second=wider, lacks=BESIDE),
    "parallel": Traits("PA", BOTTLENECKS, BOTTLENECK, OPTIONS, second=wider, lacks=BESIDE),
    "prompt_tuning": Traits("PT", (*SOFT, *WITH_HEAD), PROMPT, fixed=placed, second=longer, lacks=ALONE_IN_FRONT),
    "p_tuning": Traits(
        "PU",
        (*SOFT, *WITH_HEAD, *DROPS, "model/recurrent"),
        ENCODER,
        fixed=prompted,
        second=longer,
        lacks=ALONE_IN_FRONT,
    ),
    "prefix_tuning": Traits(
        "PX", (*SOFT, *DROPS, *LAYERS, *TOGETHER), PREFIX, second=longer, architectures=("",), lacks=BESIDE
    ),
    "p_tuning_v2": Traits(
        "PV",
        (*RUNS, "model/padding", *LAYERS, *LIVES, *WITH_HEAD),
        {"num_virtual_tokens": [2, 1, 3]},
        fixed=head,
        second=longer,
        architectures=(tiny.CLASSIFIER,),
    ),
    "did": Traits("ID", INTRINSIC, {"d": [4, 7, 33], "columns": ["tensor", "model"]}, fixed=some),
    "said": Traits("SA", INTRINSIC, {"d": [36, 40, 65], "columns": ["tensor", "model"]}, fixed=some),
}
LORA = ("lora", "rslora", "dora")


def known() -> list[str]:
    """The methods that the suite can check."""
    return [method for method in METHODS if method in TRAITS]
