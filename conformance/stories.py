"""Stories: what is done to a model with adapters, in any order, drawn and made shorter by Hypothesis.

After each step, the model says what the formula says of the adapters active then. The moves are told by `telling`, on
models and adapters from `staging`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from refpeft.conformance.case import Case
from refpeft.conformance.property import Info, Property
from refpeft.conformance.staging import HEADS, TARGETS, case, configurations, places, plainly, shorter, stage
from refpeft.conformance.strategies import HALF, Strategy, Structure, options
from refpeft.conformance.telling import DARE, NEEDED, SUMS

LONGEST = 12


@dataclass(frozen=True)
class Kind:
    """Stories of these moves; `corners` are some that are always told, as names of moves, or (name, a, b). If `alike`,
    two of the adapters have one config."""

    moves: Sequence[str]
    corners: Sequence[Sequence[Any]]
    heads: Sequence[Structure] = HEADS
    where: Sequence[Sequence[str]] = TARGETS
    tied: Sequence[bool] = (False, True)
    dtypes: Sequence[str] = ("float32", "float64")
    alike: bool = False

    def able(self, info: Info) -> list[str]:
        return [m for m in self.moves if set(NEEDED[m]) <= set(info["features"])]

    def possible(self, info: Info) -> list[str]:
        return [d for d in self.dtypes if d in info["dtypes"]]

    def adapters(self, method: str, info: Info) -> tuple[Sequence[Structure], Sequence[Sequence[str]], Structure]:
        """What may be trained whole, the layers to adapt, and the options that the target has chosen."""
        heads = self.heads if "chain" in info["features"] else [{}]
        return heads, places(method, info, self.where), options(info, method)

    def drawn(self, method: str, info: Info) -> Strategy:
        if not self.possible(info):
            return st.nothing()
        move = st.tuples(st.integers(0, len(self.able(info))), st.integers(0, 2), st.integers(0, 10))
        fields = {
            "moves": st.lists(move, min_size=LONGEST, max_size=LONGEST),
            "configs": configurations(method, *self.adapters(method, info)),
            "tied": st.sampled_from(list(self.tied)),
            "dtype": st.sampled_from(self.possible(info)),
            "draw": st.integers(0, 3),
        }
        more = {"able": self.able(info), **stage(method, info)}
        return st.fixed_dictionaries(fields).map(lambda s: self.paired({**s, **more}))

    def always(self, method: str, info: Info) -> Sequence[Structure]:
        there, found, dtypes = self.able(info), [], self.possible(info)
        for n, corner in enumerate(self.corners if dtypes else ()):
            named = [(m, 0, 0) if isinstance(m, str) else m for m in corner]
            if all(m in there for m, _, _ in named):
                found.append({
                    "moves": [[there.index(m) + 1, a, b] for m, a, b in named], "able": there, "draw": n,
                    "configs": plainly(method, n, *self.adapters(method, info)), "tied": self.tied[n % len(self.tied)],
                    "dtype": dtypes[n % len(dtypes)], **stage(method, info),
                })  # fmt: skip
        return [self.paired(s) for s in found]

    def paired(self, s: Structure) -> Structure:
        return {**s, "configs": {**s["configs"], "foobar": s["configs"]["foo"]}} if self.alike else s


def story(
    name: str,
    statement: str,
    moves: Sequence[str],
    corners: Sequence[Sequence[Any]],
    needs: Sequence[str] = (),
    required: bool = True,
    methods: Sequence[str] | None = None,
    **more: Any,
) -> Property:
    kind = Kind(moves, corners, **more)

    def make(method: str, s: Structure, seed: int) -> Case:
        return case(method, name, s, seed)

    return Property(
        name, "story", statement, kind.drawn, kind.always, make, needs, required=required, methods=methods,
        smaller=shorter,
    )  # fmt: skip


BOTH: Sequence[Any] = (("add", 0, 0), ("add", 1, 0))
ACTIVE = ("activate", 0, 2)  # both
SECOND = ("activate", 1, 0)
STORIES: Sequence[Property] = [
    story(
        "any-order",
        "Add, switch, merge, unmerge, disable, train and delete, in any order: the model says what it says of the "
        "adapters active now.",
        ["add", "activate", "merge", "unmerge", "disable", "enable", "train", "delete"],
        [
            ["add", "merge", "merge"],
            [*BOTH, SECOND, ("delete", 1, 0), "train"],
            [*BOTH, "merge", SECOND, "merge", "unmerge"],
            ["add", "train", "merge", "unmerge", "train"],
            ["add", ("add", 2, 0), ("delete", 0, 0), "train"],
            [*BOTH, ACTIVE, "train", "merge", "disable", "enable"],
            [*BOTH, ACTIVE, ("delete", 0, 0), "merge", "unmerge"],
            [*BOTH, "merge", ("delete", 0, 0), "unmerge"],
            [*BOTH, "train", SECOND],
            ["add", "disable", "enable", "merge", "disable", "enable"],
        ],
        ["several"],
    ),
    story(
        "files",
        "What was saved is what is loaded, into a fresh model, or beside others under another name.",
        ["add", "activate", "train", "save", "load", "load_as", "merge", "unmerge", "delete"],
        [
            ["add", "save", "train", ("load_as", 0, 0), ("activate", 1, 0)],
            ["add", "train", "save", "train", "load"],
            [*BOTH, ("save", 0, 0), ("save", 1, 0), ("load", 1, 1), "train"],
            [*BOTH, ("save", 0, 0), "merge", ("load_as", 0, 0), "unmerge", ("activate", 2, 0)],
            [*BOTH, ("save", 1, 0), ("delete", 1, 0), ("load_as", 0, 1), ("activate", 1, 0)],
            [*BOTH, ("save", 0, 0), ("save", 1, 0), ("load", 0, 1), SECOND],
        ],
        ["several", "save"],
    ),
    story(
        "hot-swap",
        "An adapter put in the place of another runs with its own scale, and the others are as before.",
        ["add", "activate", "train", "save", "swap", "merge", "unmerge"],
        [
            [*BOTH, ("save", 1, 0), ("swap", 0, 0), "train", ("activate", 1, 0)],
            ["add", ("add", 2, 0), ("save", 1, 0), ("swap", 0, 0), "merge", "unmerge"],
            [*BOTH, ("save", 0, 0), ("swap", 1, 0), "train", ("activate", 1, 0)],
            [*BOTH, ("save", 0, 0), "train", ("swap", 0, 0)],
        ],
        ["several", "save", "swap"],
    ),
    story(
        "replaced",
        "An adapter loaded under a name that is taken is the one of that name from then on, unless that is refused.",
        ["add", "activate", "train", "save", "replace"],
        [[*BOTH, ("save", 1, 0), ("replace", 0, 0)], ["add", "save", "train", "replace"]],
        ["several", "save"],
        required=False,
    ),
    story(
        "averaged",
        "An average of adapters has the weighted sums of their tensors, as they are at that time.",
        ["add", "activate", "train", "merge", "unmerge", "delete", "average"],
        [
            ["add", ("average", 0, 0), ("activate", 1, 0), "train"],
            [*BOTH, ("average", 0, 1), ("activate", 2, 0)],
            [*BOTH, "train", ("average", 0, 1), "train", ("activate", 2, 0), "merge"],
        ],
        ["several", "average"],
        heads=[{}],
        alike=True,
    ),
    story(
        "sixteen-bits",
        "On a model in 16 bits the same holds, as exactly as that allows, and dtypes are what they were.",
        ["add", "activate", "merge", "unmerge", "disable", "enable", "train", "delete", "save", "load"],
        [
            ["add", "merge", "unmerge", "train"],
            ["add", "save", "load", "save", "train"],
            [*BOTH, ACTIVE, "train", "merge", "disable", "enable"],
            [*BOTH, "merge", SECOND, "merge", "merge", "unmerge"],
        ],
        dtypes=HALF,
        required=False,
    ),
    story(
        "tied",
        "Of two tied layers, the one that is not adapted is as it was, whatever was done to the other.",
        ["add", "activate", "merge", "unmerge", "disable", "enable", "train", "delete"],
        [["add", "merge"], ["add", "train", "merge", "unmerge"], [*BOTH, ACTIVE, "train"]],
        ["tied", "embedding", "merge"],
        heads=[{}],
        where=(["wte"], ["head"], ["wte"]),
        tied=[True],
        required=False,
    ),
    story(
        "combined",
        "A combination of adapters is what its definition makes of them, at that time.",
        ["add", "activate", "train", "merge", "unmerge", "delete", "combine"],
        [[*BOTH, ("combine", 0, n), ("activate", 2, 0)] for n in range(len(SUMS))]
        + [
            [*BOTH, ("combine", 2, 4), ("activate", 2, 0), "train"],
            [*BOTH, "train", ("combine", 0, 0), ("activate", 2, 0), "train", ("delete", 0, 0), "merge"],
        ],
        ["several", "combine"],
        heads=[{}],
        dtypes=["float32"],
        methods=["lora", "rslora"],
    ),
    story(
        "dare",
        "What DARE leaves of an adapter is the original over the density.",
        ["add", "activate", "train", "thin"],
        [[*BOTH, ("thin", 0, n), ("activate", 2, 0)] for n in range(len(DARE))],
        ["several", "combine"],
        heads=[{}],
        dtypes=["float32"],
        methods=["lora", "rslora"],
    ),
]
