"""Conformance: checks other implementations against the specification."""

from typing import Any

__all__ = ["suite"]


def suite(target: Any, **options: Any) -> type:
    """A class of pytest tests, one for each method, level and property that the target declares.

        from refpeft.conformance import suite
        TestMine = suite(MyTarget())

    `target`: an object with `info` and `run`, or a name that `refpeft check` takes. Options: `methods`, `levels`,
    `properties` (of which all are asked if not given), `examples`, `seed`, `known` (a file of known failures),
    `folder` (for the cases that fail) and `database` (in which Hypothesis remembers them).
    """
    from refpeft.conformance.testing import make

    return make(target, **options)
