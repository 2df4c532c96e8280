"""unmerged: base weights untouched, the adapters beside them as they run in training.

For every method, those that cannot be merged too, and for what must stay apart: the base weights are those of the
checkpoint, to the bit, and can be shared with other models or quantised. Networks that only training needs (the encoder
of P-tuning, the MLP of prefix tuning) are replaced by what they give.
"""

from refpeft.export import verification
from refpeft.export.form import (
    Check,
    Made,
    Store,
    Subject,
    base_tensors,
    dtypes,
    hooks_of,
    named,
    needed,
    symbolic,
    symbols,
    trained,
    with_values,
)  # fmt: skip
from refpeft.export.graphs import run
from refpeft.export.precision import Tensor
from refpeft.export.symbols import Graph
from refpeft.hooks import Hooks
from refpeft.model import Model

FOLDS = False


def check(subject: Subject) -> None:
    if subject.decode:
        no_prompts(subject)


def no_prompts(subject: Subject) -> None:
    """A graph that decodes is run once per token, and a prompt or prefix belongs before the first one only. An
    encoder-decoder has its prompt in the encoder, which runs once, and a prefix beside the keys and values it keeps."""
    if subject.model.config.encoder_decoder:
        return
    hooks = [(a, hooks_of([a], subject.model)) for a in subject.adapters]
    for a, h in hooks:
        if h.prompt is not None:
            raise ValueError(
                f"{a.method} brings a prompt, which a graph that decodes takes from outside: --form prompt"
            )
        if any(h.memory(f"layers.{n}.attn.") for n in range(subject.model.config.num_layers)):
            raise ValueError(f"{a.method} is a prefix, which a graph that decodes takes from outside: --form prefix")


def make(subject: Subject, graph: Graph, store: Store) -> Made:
    model, hooks, own = beside(subject, graph)
    inputs, outputs = run(graph, model, hooks, subject)
    return Made(inputs, outputs, store(needed(graph, outputs, [*base_tensors(subject), *own])), subject.model)


def beside(subject: Subject, graph: Graph) -> tuple[Model, Hooks, list[Tensor]]:
    """The model on symbols, the adapters' hooks, and what these hold."""
    adapters = [trained(a) for a in subject.adapters]
    values, types = named(adapters), dtypes(subject, adapters)
    model = symbolic(graph, subject.model, subject.dtype)
    hooks = hooks_of(with_values(adapters, symbols(graph, values, types)), model)
    return model, hooks, [(name, a, types[name]) for name, a in values.items()]


def checks(subject: Subject) -> list[Check]:
    return verification.checks(subject)
