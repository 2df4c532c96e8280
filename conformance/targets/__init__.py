"""Targets: the implementations under test, one file each, opened by name."""

import importlib
from collections.abc import Callable, Mapping, Sequence

from refpeft.conformance.targets.base import FEATURES, Skip, Target
from refpeft.conformance.targets.libraries import LIBRARIES

__all__ = ["FEATURES", "TARGETS", "Skip", "Target", "open_target"]

TARGETS: Mapping[str, tuple[str, str]] = {  # name → what it is, module:factory (called with what follows the colon)
    "spec": ("this specification itself", "refpeft.conformance.targets.spec:Spec"),
    "peft": ("Hugging Face peft, as installed", "refpeft.conformance.targets.peft:Peft"),
    "onnxruntime": ("our ONNX export, run by onnxruntime", "refpeft.conformance.targets.onnxruntime:OnnxRuntime"),
    **{name: (library.about, library.factory) for name, library in LIBRARIES.items()},
    "program:": ("any program that speaks JSON lines: program:CMD", "refpeft.conformance.targets.program:Program"),
    "python:": ("any Python object: python:package.module:object", "refpeft.conformance.targets.python:load"),
    "mutant:": ("a deliberately wrong copy of the specification: mutant:NAME", "refpeft.conformance.mutants:target"),
}


def open_target(name: str) -> Target:
    """The target of this name: one of TARGETS, with what its colon asks for: 'peft', 'program:CMD', 'mutant:NAME', …"""
    module, factory, rest = place(name)
    try:
        make: Callable[..., Target] = getattr(importlib.import_module(module), factory)
    except ModuleNotFoundError as error:
        if name in LIBRARIES and error.name:
            raise ValueError(LIBRARIES[name].lacks(name, error.name)) from None
        raise
    return make(*rest)


def place(name: str) -> tuple[str, str, Sequence[str]]:
    """The module of a target, what in it makes one, and what of its name that is given."""
    head, colon, rest = name.partition(":")
    known = TARGETS.get(head + colon)
    if known is None or (colon and not rest):
        raise ValueError(
            f"unknown target {name!r}: expected one of {', '.join(t + ('…' * t.endswith(':')) for t in TARGETS)}"
        )
    module, _, factory = known[1].partition(":")
    return module, factory, (rest,) if colon else ()
