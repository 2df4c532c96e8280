"""Configs that must be refused: what cannot be honoured is not to be accepted and forgotten.

Two kinds of odd fields are asked about. Some mean nothing to anybody: a field that does not exist, a layer that the
model
does not have, a rank of 0. Others are of the specification and not of the target, which leaves their feature out of
what it declares: those it may honour after all, and must refuse if not.

A refusal is an error (or a skip) whose text names the field or its value. A target that goes on is `accepted`, one that
fails without saying why is `unclear`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from refpeft.conformance import build, strategies, tiny
from refpeft.conformance.case import Case
from refpeft.conformance.property import Info, Property
from refpeft.conformance.strategies import Strategy, Structure
from refpeft.conformance.traits import LORA
from refpeft.conformance.yardstick import Verdict

Odd = Mapping[str, Any]
NONSENSE: Mapping[str, Sequence[Odd]] = {  # which the specification refuses itself
    "layer": ({"lora_alfa": 16.0},),
    "model": (
        {"lora_alfa": 16.0},
        {"r": 0},
        {"target_modules": ["no_such_layer"]},
        {"target_modules": ["norm"]},
        {"bias": "some"},
        {"init_lora_weights": "no_such_start"},
        {"layers_pattern": "h"},
        {"modules_to_save": ["no_such_layer"]},
        {"lora_dropout": -0.5},
    ),
}
OPTIONAL: Mapping[str, Mapping[str, Odd]] = {  # level → feature → a field that is about it
    "layer": {"bias": {"lora_bias": True}, "patterns": {"alpha_pattern": {"layer": 5.0}}},
    "model": {"patterns": {"alpha_pattern": {".*": 5.0}}},
}


def rejects(level: str) -> Property:
    def odd(method: str, info: Info) -> list[Odd]:
        lacking = [o for feature, o in OPTIONAL[level].items() if feature not in info["features"]]
        return [*NONSENSE[level], *(o for o in lacking if not (method == "dora" and "lora_bias" in o))]

    def corners(method: str, info: Info) -> Sequence[Structure]:
        base = (
            strategies.layer_corners(method, info, {"kind": ["linear"], "regime": ["float"], "i": [3]})
            if level == "layer"
            else strategies.model_corners(method, info, ("gpt2", "llama"), ("",))
        )
        return [{**base[n % len(base)], "odd": dict(o)} for n, o in enumerate(odd(method, info))]

    def draw(method: str, info: Info) -> Strategy:
        return st.sampled_from(list(corners(method, info))) if info.get("configs", True) else st.nothing()

    def make(method: str, s: Structure, seed: int) -> Case:
        return layer(method, s, seed) if level == "layer" else model(method, s, seed)

    statement = "A config that cannot be honoured is refused, in words that say what of it."
    return Property("rejects", level, statement, draw, corners, make, methods=LORA)


def layer(method: str, s: Structure, seed: int) -> Case:
    odd = s["odd"]
    valid = {name: value for name, value in odd.items() if name == "lora_bias"}  # has a parameter of its own
    case = build.layer(method, "rejects", {**s, "config": {**s["config"], **valid}}, seed, ["output"])
    return Case({**case.meta, "config": {**case.meta["config"], **odd}, "refuse": next(iter(odd))}, case.arrays)


def model(method: str, s: Structure, seed: int) -> Case:
    odd = {name: norms(value, s["family"]) for name, value in s["odd"].items()}
    case = build.model(method, "model", "rejects", s, seed, want=["logits"])
    own = case.meta["adapters"]["default"]
    asked = {"default": {**own, "config": {**own["config"], **odd}}}
    return Case({**case.meta, "adapters": asked, "refuse": next(iter(odd))}, case.arrays)


def norms(value: Any, family: str) -> Any:
    return [tiny.NORMS[family][0]] if value == ["norm"] else value


def asked_for(case: Case) -> tuple[str, Any]:
    """The odd field and its value."""
    config = case.meta["config"] if case.level == "layer" else case.meta["adapters"]["default"]["config"]
    return case.meta["refuse"], config[case.meta["refuse"]]


def refused(case: Case, text: str) -> Verdict:
    """Is it a refusal that says what is refused?"""
    field, value = asked_for(case)
    said, words = " ".join(text.lower().replace("_", " ").split()), field.replace("_", " ").rstrip("s")
    named = value if isinstance(value, list | dict) else [value]
    if words in said or any(str(v).lower().replace("_", " ") in said for v in named if v not in (0, True)):
        return Verdict(None, 0.0)
    return Verdict("unclear", None, f"{field}={value!r} failed with words that do not name it: {text[:200]}")


def accepted(case: Case) -> Verdict:
    field, value = asked_for(case)
    return Verdict("accepted", None, f"{field}={value!r} was accepted")


REJECTS: Sequence[Property] = (rejects("layer"), rejects("model"))
