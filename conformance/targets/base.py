"""What a target is: something that says what it can do, and answers cases."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from refpeft.conformance.case import Case
from refpeft.ops import Array

Arrays = dict[str, Array]
Info = Mapping[str, Any]


class Skip(Exception):  # noqa: N818 - the word for it everywhere
    """Raised by `run` for what the target cannot be asked, with the reason. A skip is never a pass."""


class Target(Protocol):
    """info() → name, version, and what is declared:

        levels     of layer, model, lifecycle, story, export
        methods    of `refpeft methods`
        dtypes     of float16, bfloat16, float32, float64
        features   what it can be asked to do, see FEATURES
        without    optional: method → features that it lacks for this method, and settings
        families   optional: of gpt2, llama, qwen2, bert, roberta, t5, bart, those that it can build
        linears    optional: family → the layers that it can adapt
        stories    optional: of these, the one that stories are told on, where there can be no chain of layers
        options    optional: method → fields of its config, with the only value that it has
        stored     optional: 'nf4', if it keeps W in four bits: then W is one that this does not change
        configs    optional: false where it reads an adapter's tensors and no config, which it could refuse
        settings   optional: what it can be set to and makes no difference → the values to try

    run(case) → the arrays that the case wants, by name.
    """

    def info(self) -> Info: ...
    def run(self, case: Case) -> Arrays: ...
    def close(self) -> None: ...


FEATURES: Mapping[str, str] = {
    "forward": "run forwards",
    "grads": "give gradients of the adapter's parameters, and of a layer's input",
    "frozen": "say which parameters are trained",
    "init": "make a fresh adapter by itself",
    "change": "take new values for an adapter's parameters, in place",
    "merge": "fold an adapter into the weights",
    "unmerge": "take it out again",
    "unload": "merge an adapter and leave a plain layer, with nothing of the adapter around it",
    "disable": "run as if there were no adapter, and go back",
    "several": "hold several adapters, one of them active",
    "together": "have several adapters active at once",
    "weighted": "make an adapter that is a weighted sum of others",
    "combine": "make an adapter of others in the ways of `refpeft.combine`",
    "average": "make an adapter whose tensors are the weighted sums of those of others",
    "train": "take a step of training",
    "train-loaded": "train an adapter that was loaded from a file",
    "train-any": "of several adapters, train any that is active",
    "swap": "put a saved adapter in the place of another",
    "delete": "forget an adapter",
    "heir": "make another adapter active where the active one is deleted",
    "save": "write an adapter's tensors to a safetensors file, and read them back",
    "convert": "save an adapter that started from factors of the weights as one of the untouched weights, and load it",
    "over-merged": "switch, disable and delete while something is merged, which is then taken out",
    "chain": "adapt a model that is a chain of layers, and no transformer",
    "embedding": "adapt embeddings",
    "cores": "LoHa with cores, as of convolutions: a matrix [o, i k] is one that sees k places of its input",
    "conv1d": "adapt layers that store W as [i, o]",
    "bias": "lora_bias: a bias on B",
    "modules_to_save": "train modules whole beside the adapter",
    "patterns": "rank_pattern and alpha_pattern",
    "cache": "decode with keys and values kept from before",
    "loss": "give the loss of a language model for labels",
    "drop": "put what a network made in its place: a prompt without its encoder",
    "rows": "run several adapters in one batch, each for some of its rows",
    "pull": "give the gradient of a linear function of the merged weights",
    "butterfly": "more than one butterfly factor of BOFT",
    "nf4": "store the weights of a layer in four bits, NF4",
    "tied": "tied input and output embeddings",
}


class Life:
    """A model and what is done to it, a method for each step; what is said then, and the logits after it."""

    def logits(self) -> Array:
        raise NotImplementedError

    def run(self, steps: Sequence[Mapping[str, Any]]) -> Arrays:
        found: Arrays = {}
        for k, step in enumerate(steps):
            said = getattr(self, step["do"])(**arguments(step)) or {}
            found |= {f"{k}/{name}": a for name, a in {**said, "logits": self.logits()}.items()}
        return found


def arguments(step: Mapping[str, Any]) -> dict[str, Any]:
    """Of a step: all but what it is called, and whether it may be refused."""
    return {name: value for name, value in step.items() if name not in ("do", "may")}
