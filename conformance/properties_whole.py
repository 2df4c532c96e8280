"""Properties of modules that are trained whole, as `modules_to_save` names them: heads above all."""

from collections.abc import Sequence

from refpeft.conformance import tiny
from refpeft.conformance.property import FIRST, FOO, Property, do, life, prefixes, whole
from refpeft.conformance.strategies import Structure


def head(s: Structure) -> Structure:
    return {"modules_to_save": [tiny.HEAD[s["family"]]]}


def parts_of_paths(s: Structure) -> Structure:
    """Modules of T5, one of whose names is a part of the other's, and of what their paths have in common."""
    return {"target_modules": ["q", "wi"], "modules_to_save": ["wo", "o"]}


WHOLE: Sequence[Property] = [
    whole(
        "modules-to-save",
        "A module trained whole runs in the place of the model's own, and is trained; the model's own is not.",
        ["logits", "grads", "count"],
        ["forward", "grads", "frozen", "modules_to_save"],
        families=tuple(tiny.HEAD),
        architectures=(tiny.CLASSIFIER,),
        configs=head,
    ),
    life(
        "modules-to-save",
        "A module trained whole is used while its adapter is active, and only then.",
        [[*FIRST, do("disable"), do("enable")]],
        ["disable", "modules_to_save"],
        configs=head,
        architectures=(tiny.CLASSIFIER,),
    ),
    life(
        "language-head",
        "The head of a language model, trained whole, is used while its adapter is active, and only then.",
        [[*FIRST, do("disable"), do("enable")]],
        ["disable", "modules_to_save"],
        configs=lambda s: {"modules_to_save": ["lm_head"]},
        families=tiny.UNTIED,
    ),
    life(
        "saved-modules",
        "Modules trained whole are saved and loaded with the adapter they belong to.",
        [[*FOO, do("save", adapter="foo"), do("save", adapter="foobar"), do("load", adapters=["foobar", "foo"])]],
        ["several", "save", "modules_to_save"],
        adapters=prefixes,
        configs=head,
        architectures=(tiny.CLASSIFIER,),
    ),
    life(
        "saved-names",
        "Modules trained whole are loaded into their places, whatever their names are a part of.",
        [[*FIRST, do("save", adapter="first"), do("load", adapters=["first"])]],
        ["save", "modules_to_save"],
        adapters=lambda s: {"first": s["config"]},
        configs=parts_of_paths,
        families=("t5",),
    ),
]
