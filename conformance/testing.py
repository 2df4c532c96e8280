"""The suite as tests of pytest's: a class with one test for each statement that a target is asked about.

What is not declared is not collected. What the target skips, or is known to do otherwise, is a skip or an expected
failure with its reason, as in `refpeft check`; a known failure that is gone fails. A failure says what should hold,
what was found, and where the smallest case is stored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from refpeft.conformance import engine
from refpeft.conformance import known as knowledge
from refpeft.conformance.targets import Target


def make(
    target: str | Target,
    methods: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
    examples: int | None = None,
    seed: int = 0,
    known: str | Path | None = None,
    folder: str | Path = engine.CASES,
    database: str | Path | None = None,
) -> type:
    """See `refpeft.conformance.suite`."""
    options = engine.Options(
        seed, examples, None, str(folder), known=engine.text(known), database=engine.text(database)
    )
    info = dict(engine.here(target).info())
    knowledge.load(info, known)
    units = [u for u in engine.chosen(info, methods, levels, properties) if asked(target, u, options)]
    if not units:
        raise ValueError(f"{engine.named(target)} declares nothing that the suite asks: see levels, methods, features")

    @pytest.mark.parametrize("unit", units, ids=[f"{u.method}-{u.level}-{u.property}" for u in units])
    def test(self: Any, unit: engine.Unit) -> None:
        judged(engine.run_unit(target, unit, options))

    about = f"Is {info['name']} as refpeft specifies?"
    return type("Suite", (), {"__doc__": about, "test": test, "__test__": True})


def asked(target: str | Target, unit: engine.Unit, options: engine.Options) -> bool:
    return engine.declared(engine.told(engine.here(target), options, unit.method), unit, engine.find(unit))


def judged(row: Mapping[str, Any]) -> None:
    """A result as pytest says it."""
    match row["status"]:
        case "pass":
            return
        case "known":
            pytest.xfail(row["detail"])
        case "skip":
            pytest.skip(row["detail"])
    needs = "required" if row["required"] else "recommended"
    lines = [f"{row['method']}, {row['level']}, {row['property']} ({needs}): {row['statement']}", row["detail"]]
    if row["ratio"] is not None:
        lines.append(f"ratio {row['ratio']:.3g}, of which a correct implementation stays below {row['limit']:g}")
    lines += [f"smallest case: {row['case']}"] if row["case"] else []
    pytest.fail("\n".join(lines), pytrace=False)
