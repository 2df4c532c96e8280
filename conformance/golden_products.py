"""The golden vectors of DyLoRA, LoHa, LoKr, GLoRA, OFT and BOFT: of one layer, and of models."""

from collections.abc import Mapping, Sequence
from typing import Any

from refpeft.conformance.golden import Question
from refpeft.conformance.golden_layers import ALL, USUAL
from refpeft.conformance.golden_models import RUN, model

SUMS = ("dylora", "loha", "lokr", "glora")
Fields = Mapping[str, Any]
PLAIN: Mapping[str, Fields] = {  # C is [2, 3] and D [2, 4] = B A of a layer [4, 12]
    "dylora": {"r": 4, "rank": 2, "alpha": 8.0},
    "loha": {"r": 2, "alpha": 8.0},
    "lokr": {"r": 1, "alpha": 4.0},
    "glora": {"r": 2, "alpha": 8.0},
    "oft": {"oft_block_size": 3},
    "boft": {"boft_block_size": 3},
}


def questions(method: str) -> Sequence[Question]:
    if method not in PLAIN:
        return []
    own = {"oft": rotations, "boft": butterflies}
    return [*(sums(method) if method in SUMS else own[method]()), *lives(method), *models(method)]


def layer(name: str, hunts: str, properties: Sequence[str], m: str, **fields: Any) -> Question:
    config = {**PLAIN[m], **fields.pop("config", {})}
    return Question(name, hunts, "layer", properties, {**USUAL, "o": 4, "i": 12, "config": config, **fields})


def sums(m: str) -> list[Question]:
    exact: Fields = {"regime": "exact"}
    own = {
        "dylora": [
            layer("all", "The scale or the ranks of another b, where b is r.", ALL, m, config={"rank": 4}, **exact),
            layer("frozen", "Another rank trained than the last of those in play.", ALL, m, config={"frozen": True},
                  **exact),
            layer("block", "Of the last block one rank trained, or all blocks.", ALL, m,
                  config={"r": 6, "rank": 4, "block_size": 2, "frozen": True}, **exact),
        ],
        "loha": [
            layer("rank-one", "A rank's axis squeezed away where r = 1.", ALL, m, config={"r": 1, "alpha": 3.0}),
            layer("rank-above", "A rank larger than both sides of W.", ALL, m, config={"r": 6}, o=4, i=3),
            layer("cores", "One core for both products, ΔW as [o, k, i]; dB₁ with the core of the other product.",
                  ["cores-grads", "cores"], m, i=3),
        ],
        "lokr": [
            layer("full", "Both factors full: α/r left out of the scale, though no rank is there.", ALL, m,
                  config={"r": 4, "alpha": 2.0}, **exact),
            layer("both", "C a product too: its two factors exchanged, or one of them not trained.", ALL, m,
                  config={"decompose_both": True}, o=16, i=12, **exact),
            layer("factor", "decompose_factor not used, or for D in place of C.", ALL, m,
                  config={"decompose_factor": 2}, o=8, i=12, **exact),
            layer("primes", "A side that is a prime, where C is one number.", ALL, m, o=5, i=7, **exact),
            layer("product", "What linear hunts, where B is zero: here it is not.", ALL, m, **exact),
        ],
        "glora": [
            layer("rank-one", "A rank's axis squeezed away where r = 1.", ALL, m, config={"r": 1, "alpha": 3.0}),
            layer("embedding", "A of the table's rows, which is [v, v], taken for one of its columns.", ALL, m,
                  kind="embedding", bias=False, **exact),
        ],
    }  # fmt: skip
    return [
        layer("linear", "The scale forgotten or applied twice; factors exchanged, or their product transposed.", ALL, m,
              **exact),
        layer("linear-square", "ΔW merged transposed, which no shape gives away.", ALL, m, o=4, i=4, bias=False,
              **exact),
        layer("conv1d", "W is stored as [i, o]: ΔW of the wrong side.", ALL, m, kind="conv1d", **exact),
        layer("float64", "Something computed in float32 inside, the scale among it.", ALL, m, dtype="float64",
              config={"r": 3, "alpha": 7.0}, o=9, i=16),
        *own[m],
    ]  # fmt: skip


def rotations() -> list[Question]:
    def ask(name: str, hunts: str, **fields: Any) -> Question:
        return layer(name, hunts, ALL, "oft", **fields)

    exact, shared, out = {"use_cayley_neumann": False}, {"block_share": True}, {"side": "output"}
    return [
        ask("linear", "v with the other sign, or along columns of the triangle; W turned on the other side."),
        ask("linear-square", "Outputs turned for inputs, which no shape gives away.", o=6, i=6),
        ask("conv1d", "W is stored as [i, o]: turned on the wrong side.", kind="conv1d"),
        ask("exact", "(I − Q)(I + Q)⁻¹ for (I + Q)(I − Q)⁻¹.", config=exact),
        ask("exact-square", "The inverse rotation of a square W.", config=exact, o=6, i=6),
        ask("terms", "A series that ends a term too early, or always after five.",
            config={"num_cayley_neumann_terms": 7}),
        ask("shared", "One block for all: the gradient of one of them only.", config=shared),
        ask("one-block", "All inputs turned by one matrix.", config={"oft_block_size": 12}),
        ask("not-dividing", "A block size that does not divide the inputs, of which 4 is nearest.",
            config={"oft_block_size": 5}),
        ask("blocks", "The number of blocks taken for their size.", config={"r": 2, "oft_block_size": 0}),
        ask("output", "A bias that is turned with the outputs.", config={**out, **exact}, o=6),
        ask("float64", "Something computed in float32 inside.", dtype="float64"),
    ]  # fmt: skip


def butterflies() -> list[Question]:
    def ask(name: str, hunts: str, **fields: Any) -> Question:
        return layer(name, hunts, ALL, "boft", **fields)

    two = {"boft_block_size": 2, "boft_n_butterfly_factor": 2}
    return [
        ask("linear", "The inverse rotation; S without its half; a bias that is scaled."),
        ask("linear-square", "Outputs turned for inputs, which no shape gives away.", o=6, i=6),
        ask("conv1d", "W is stored as [i, o]: turned, or scaled, on the wrong side.", kind="conv1d"),
        ask("without-bias", "A layer without a bias, which gets none.", bias=False),
        ask("two-factors", "Factors in the other order, or that mix the same blocks.", config=two),
        ask("three-factors", "Halves of blocks that are not 4 halves apart in the third.", i=16,
            config={**two, "boft_n_butterfly_factor": 3}),
        ask("blocks", "The number of blocks taken for their size.", config={"boft_block_size": 0, "boft_block_num": 2}),
        ask("output", "A bias that is turned with the outputs; factors in the other order.",
            config={**two, "side": "output"}, o=8),
        ask("float64", "Something computed in float32 inside.", dtype="float64"),
    ]  # fmt: skip


def lives(m: str) -> list[Question]:
    return [
        layer("empty-batch", "A batch without rows refused; a gradient of no rows that is not zero.",
              ["forward", "param-grads"], m, edge="empty-batch"),
        layer("one-token", "A batch of one row and one position, whose axes a squeeze takes away.", ALL, m,
              edge="one-token"),
        layer("rows", "A row of the batch that has an influence on the others.", ["batch"], m, batch=[3, 2]),
        layer("bfloat16", "An output or a merged weight that leaves the layer's dtype, or loses more than it must.",
              ["dtype"], m, dtype="bfloat16"),
        layer("trained", "The layer's own W and b trained too; a fresh adapter that changes the output.",
              ["frozen", "init"], m),
        layer("changed", "Something cached that new values of the parameters make stale.", ["sensitive"], m),
        layer("unmerged", "Unmerging that does not give back what was there.", ["unmerge"], m),
        layer("disabled", "Disabled and enabled again, the adapter stays away.", ["disable"], m),
    ]  # fmt: skip


def models(m: str) -> list[Question]:
    return [
        model("count", "What is not trained counted, or the entries of a product.", ["count"], m, "llama",
              regime="exact"),
        model("llama", "Gradients that take another path through a model than its outputs.", RUN, m, "llama"),
        model("bert-merged", "A merged model with the adapter's tensors left in it, or with one not merged.",
              ["merge"], m, "bert"),
        model("two", "Two adapters, where the second is run with the first one's config or before it.", ["order"], m,
              "llama", swap=True),
        model("two-merged", "Two adapters, of which one is merged.", ["two-merged"], m, "gpt2"),
        *(patterns(m) if m in SUMS and m != "dylora" else ()),
        *([BUTTERFLY] if m == "boft" else ()),
    ]  # fmt: skip


def patterns(m: str) -> list[Question]:
    return [
        model("patterns", "rank_pattern and alpha_pattern with keys of their own, read as one list.", ["patterns"], m,
              "llama", key="[a-z]*.0..*{}"),
    ]  # fmt: skip


BUTTERFLY = model(
    "butterfly", "Three factors, of which one is left out or comes too early.", ["butterfly"], "boft", "llama"
)
