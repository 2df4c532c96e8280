"""The graphs of an export: one, model.onnx; of an encoder-decoder that writes two (`refpeft.export.seq2seq`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refpeft.export import seq2seq, signature
from refpeft.export.form import Made, Outputs, Subject
from refpeft.export.runtime import DECODER, ENCODER, MODEL
from refpeft.export.seq2seq import DECODER_IDS, IDS
from refpeft.export.signature import HIDDEN
from refpeft.export.symbols import Graph, Symbol
from refpeft.hooks import Hooks
from refpeft.model import Model


@dataclass(frozen=True)
class File:
    """One of the files: its inputs, each with its name in the graph of symbols; what of these is optional; outputs."""

    inputs: Mapping[str, str]
    optional: Sequence[str]
    outputs: Outputs

    def tell(self, graph: Graph) -> None:
        """From here on its own inputs tell all sizes."""
        graph.tell([Symbol(graph, graph.made[n]) for n in (*self.inputs.values(), *self.optional)])


def apart(subject: Subject) -> bool:
    """Are encoder and decoder graphs of their own?"""
    return subject.decode and subject.model.config.encoder_decoder


def run(
    graph: Graph, model: Model, hooks: Hooks, subject: Subject, decoder: Hooks | None = None
) -> tuple[list[str], Outputs]:
    """The model on the inputs that the subject's graphs have: their names, and the outputs. `decoder`: the hooks of
    that graph, where there are two and its own are others."""
    if apart(subject):
        return seq2seq.run(graph, model, hooks, subject, decoder)
    return signature.run(graph, model, hooks, subject)


def files(made: Made, subject: Subject) -> dict[str, File]:
    """What is written. Inputs that a form adds are those of both graphs, so that they are fed alike; so are optional
    ones, read or not: an adapter's file is for both."""
    if not apart(subject):
        return {MODEL: File({n: n for n in made.inputs}, made.optional, made.outputs)}
    encoder, decoder = seq2seq.inputs(subject.model)
    added = [n for n in made.inputs if n not in encoder and n not in decoder]
    rest = {name: y for name, y in made.outputs.items() if name != HIDDEN}
    own = {DECODER_IDS: IDS}
    return {
        ENCODER: File({n: n for n in (*encoder, *added)}, made.optional, {HIDDEN: made.outputs[HIDDEN]}),
        DECODER: File({own.get(n, n): n for n in (*decoder, *added)}, made.optional, rest),
    }
