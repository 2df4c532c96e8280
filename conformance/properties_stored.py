"""Properties of layers whose weights are stored in fewer bits: NF4, the base of QLoRA.

What else is asked of such a layer are the properties of any layer, with a W that storing it does not change.
"""

from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from refpeft.conformance import build, strategies
from refpeft.conformance.case import Case
from refpeft.conformance.property import Info, Property
from refpeft.conformance.strategies import Strategy, Structure

SIDES = ((3, 5), (8, 8), (9, 15), (16, 20), (1, 1), (1, 65))  # one block or several, the last of them full or not


def stored(
    name: str, statement: str, want: str, needs: Sequence[str], regime: str, more: Structure, methods: Sequence[str]
) -> Property:
    """`more`: fields of the structure that are not drawn."""

    def draw(method: str, info: Info) -> Strategy:
        dtypes = [d for d in info["dtypes"] if d != "float64" and (regime == "float" or d == "float32")]
        if not dtypes:
            return st.nothing()
        own = {"dtype": st.sampled_from(dtypes), "sides": st.sampled_from(SIDES)}
        base = strategies.layer(method, info, kind="linear", regime=regime, edge="none", **more)
        return st.builds(sized, base, st.fixed_dictionaries(own))

    def corners(method: str, info: Info) -> Sequence[Structure]:
        plain = strategies.layer_corners(method, info, {"kind": ["linear"], "regime": [regime], "dtype": ["float32"]})
        return [sized({**s, **more}, {"sides": side}) for s, side in zip(plain * len(SIDES), SIDES, strict=False)]

    def make(method: str, s: Structure, seed: int) -> Case:
        return build.layer(method, name, s, seed, [want])

    return Property(name, "layer", statement, draw, corners, make, needs, methods=methods)


def sized(s: Structure, own: Mapping[str, object]) -> Structure:
    """With other sides than were drawn."""
    sides = own["sides"]
    assert isinstance(sides, tuple)
    return {**s, **{k: v for k, v in own.items() if k != "sides"}, "o": sides[0], "i": sides[1]}


STORED: Sequence[Property] = [
    stored(
        "nf4",
        "Codes and scales of weights in NF4 are those of the paper, bit for bit, and so are weights read from there.",
        "nf4",
        ["nf4"],
        "float",
        {},
        ["lora"],
    ),
    stored(
        "nf4-merged",
        "Merged and stored again in NF4, weights are those of W′, and the bias is b′.",
        "merged_nf4",
        ["nf4"],
        "exact",
        {"stored": "nf4", "bias": True},
        ["lora", "rslora"],
    ),
]
