"""The table: one entry for each bug of another library that a property of the suite is about. Data only.

The versions are the last release that had the bug and the first that was seen without it. `beside` are the releases of
other packages that each ran with, since a library of 2023 does not run with the transformers of today.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    name: str  # short, for the command line
    library: str  # as pip has it
    issue: str  # where it is written about
    bad: str  # release
    fixed: str | None  # release, or None: no release is without it
    symptom: str
    place: str  # method/level/property: what must fail
    beside: Mapping[str, Sequence[str]]  # release of the library → what it needs beside it, as pip has it
    target: str = "peft"
    kind: str = "value"  # how the bad release fails, as in a verdict
    shows: str = ""  # an expression that finds this bug, not another one, in the detail of a failure


# ── Hugging Face peft ────────────────────────────────────────────────────────────────────────────────────────────────

PEFT = "https://github.com/huggingface/peft/"
WITH: Mapping[str, Sequence[str]] = {  # transformers, each with the releases of peft that run with it
    "4.30.2": ("0.4.0", "0.5.0"),
    "4.36.2": ("0.6.0", "0.6.2", "0.7.0", "0.7.1", "0.8.2"),
    "4.45.2": ("0.9.0", "0.10.0", "0.11.1", "0.12.0", "0.13.2", "0.14.0"),
    "4.57.6": ("0.15.0", "0.15.2", "0.16.0", "0.17.1", "0.18.0", "0.18.1"),
    "5.5.4": ("0.19.0", "0.19.1", "0.20.0"),
    "5.23.0": ("0.21.0", "0.21.2"),
}
BESIDE = {
    release: (f"transformers=={version}", "accelerate", "torch>=2.0", "setuptools<80")
    for version, releases in WITH.items()
    for release in releases
}

ADAPTERS = {  # needs the transformers of its day, to the minor release
    release: (f"transformers=={version}", "torch>=2.0", "setuptools<80")
    for release, version in {"1.0.1": "4.45.2", "1.1.0": "4.47.1"}.items()
}


LYCORIS = dict.fromkeys(("1.9.0", "4.1.3"), ("einops", "toml", "torch>=2.0", "setuptools<80"))
CHANGES = "https://github.com/KohakuBlueleaf/LyCORIS/blob/main/Change.md"


def peft(
    issue: int | str, bad: str, fixed: str | None, place: str, symptom: str, shows: str = "", kind: str = "value"
) -> Bug:
    """`issue` is a number, or a name of ours for what the fixed release mended without one that we know."""
    where = f"issues/{issue}" if isinstance(issue, int) else f"releases/tag/v{fixed}"
    return Bug(f"peft-{issue}", "peft", PEFT + where, bad, fixed, symptom, place, BESIDE, kind=kind, shows=shows)


BUGS: Sequence[Bug] = (
    peft(
        736, "0.4.0", "0.5.0", "lora/lifecycle/modules-to-save",
        "disabled, modules trained whole stay active", shows="^1/logits",  # where it is disabled
    ),
    peft(
        905, "0.5.0", "0.6.0", "lora/model/modules-to-save",
        "of a module trained whole, the model's own is left trainable beside its copy", shows="^count",
    ),
    peft(
        1014, "0.5.0", "0.6.0", "ia3/layer/unload",
        "an (IA)³ merged into a Conv1D gives a Linear around weights that are not turned",
        shows="^y_unloaded",  # of a square one; of others it does not run
    ),
    peft(
        1169, "0.6.2", "0.7.0", "lora/lifecycle/weighted",
        "weights 1 and 0: B of the adapter with weight 0 is added all the same",
        shows=r"^2/logits: off by \d+(\.\d+)? of",  # the sum with these weights, and by more than rounding
    ),
    peft(
        1355, "0.7.1", "0.8.2", "lora/lifecycle/merge-twice",
        "merging what is merged adds ΔW once more",
    ),
    peft(
        1505, "0.8.2", "0.9.0", "loha/lifecycle/refused-merge",
        "a merge that is refused for its nan has already written them into the weights",
        shows="^1/logits: nan",
    ),
    peft(
        1588, "0.10.0", "0.11.1", "dora/layer/init",
        "DoRA of a Conv1D takes its norms along the wrong axis, and a fresh adapter changes the output",
        kind="error:RuntimeError", shows="size of tensor",  # where the layer is not square; in silence where it is
    ),
    peft(
        1884, "0.11.1", "0.12.0", "adalora/layer/init",
        "E of AdaLoRA is drawn from a normal, and a fresh adapter changes the output", shows="^y_fresh",
    ),
    peft(
        1930, "0.11.1", "0.12.0", "lora/lifecycle/converted",
        "a PiSSA adapter saved as a LoRA has twice the rank and α, but not in its patterns",
        shows="^1/logits",
    ),
    peft(
        2180, "0.13.2", "0.14.0", "lokr/layer/forward",
        "alpha of LoKr is ignored: the scale is 1", shows="^y: ",
    ),
    peft(
        2195, "0.13.2", "0.14.0", "lora/model/patterns",
        "rank_pattern and alpha_pattern are searched as one list, so a key of the one hides one of the other",
    ),
    peft(
        2334, "0.14.0", "0.15.0", "lora/lifecycle/saved-names",
        "modules trained whole are not loaded where the name of one is a part of another's path",
        shows="^2/logits",  # what was loaded
    ),
    peft(
        2489, "0.15.2", "0.16.0", "lora/layer/merge",
        "the bias of B is merged without the scale α/r",
    ),
    peft(
        2550, "0.15.2", "0.16.0", "lora/lifecycle/weighted-patterns",
        "'cat' keeps the alpha_pattern of the first adapter, whose scale is in the tensors already",
    ),
    peft(
        2805, "0.17.1", "0.18.0", "oft/layer/unmerge",
        "OFT is unmerged by the transpose of a matrix that is not orthogonal",
        shows=r"^W_unmerged: off by \d+(\.\d+)? of",  # by more than rounding to float32
    ),
    peft(
        2918, "0.18.1", "0.19.0", "lora/lifecycle/weighted",
        "weight −1 adds ΔW instead of subtracting it", shows="^4/logits",  # the sum with this weight
    ),
    peft(
        3152, "0.18.1", "0.19.0", "lora/story/dare",
        "what DARE leaves is not divided by the density", shows=r"^\d+/logits",
    ),
    peft(
        3282, "0.19.1", "0.20.0", "lora/lifecycle/saved-keys",
        "the file of the adapter foo has the tensors of foobar in it", kind="names", shows="foobar",
    ),
    peft(
        3532, "0.20.0", "0.21.0", "dora/layer/unmerge",
        "DoRA of a Conv1D is unmerged along the wrong axis",
        kind="error:RuntimeError", shows="size of tensor",  # as above
    ),
    peft(
        "pissa-conv1d", "0.13.2", "0.14.0", "lora/lifecycle/converted",
        "PiSSA factors a Conv1D as it is stored, so that A and B belong to a layer the other way round",
        kind="error:RuntimeError", shows=r"^RuntimeError: shape '\[2, 24\]' is invalid",  # A's of GPT-2's c_attn
    ),
    peft(
        "dora-two", "0.20.0", "0.21.0", "dora/model/two-merged",
        "two DoRA adapters merged are not two DoRA adapters active",
    ),
    peft(
        "svd-scale", "0.20.0", "0.21.0", "lora/story/combined",
        "'svd' and its kin take ΔW, which is scaled, times the weight and the scale once more",
        shows=r"^3/logits: off by \d+(\.\d+)? of",  # the first sums, by more than rounding
    ),
    peft(
        2018, "0.21.2", None, "lora/model/tied",
        "merging an adapter of a tied output layer changes the input embedding too",
    ),
    Bug(
        "adapters-760", "adapters", "https://github.com/adapter-hub/adapters/issues/760", "1.0.1", "1.1.0",
        "forward forgets the scale α/r, and merging applies it", "lora/model/logits", ADAPTERS, target="adapters",
    ),
    Bug(
        "adapters-770", "adapters", "https://github.com/adapter-hub/adapters/issues/770", "1.0.1", "1.1.0",
        "forward forgets the scale α of (IA)³, and merging applies it", "ia3/model/logits", ADAPTERS,
        target="adapters",
    ),
    Bug(
        "lycoris-tucker", "lycoris-lora", CHANGES, "1.9.0", "4.1.3",
        "the gradients of B₁ and B₂ of LoHa with cores, written by hand, have the other factor's core in them",
        "loha/layer/cores-grads", LYCORIS, target="lycoris", shows="^dB1",
    ),
)  # fmt: skip
