"""LoRA on handwritten digits: a network that reads 0 to 4 learns 5 to 9, with 2 % of its parameters or with all.

    python examples/digits.py [--out FOLDER] [--quick]          needs refpeft[examples]

A perceptron (64 → 128 → 128 → 10) is trained on the digits 0 to 4 alone. Then it is adapted to 5 to 9, without seeing
the old ones again: by full fine-tuning, by BitFit, and by LoRA of several ranks, all for as many steps. What is asked:

    new           test digits 5 to 9 that are read right, any of ten answers being possible
    old           the same of 0 to 4, which nobody trains any more: what has been forgotten
    old, of five  the same if only 0 to 4 may be answered: is what tells them apart still there?

Hu et al. 2021 (arXiv 2106.09685): LoRA reaches what full fine-tuning reaches. Ben Zaken et al. 2021 (arXiv 2106.10199):
biases alone come close, if the pretrained model is a good one. Biderman et al. 2024 (arXiv 2405.09673): LoRA learns
less and forgets less. They speak of large language models; see what holds here. Whatever is forgotten comes back when
the adapter is taken off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Array, bytes_of, console, figure, fit, on_disk, options, table, trainable
from perceptron import Images, Network, accuracy, digits, network

import refpeft
from refpeft.train import Plan

OLD, NEW = range(5), range(5, 10)
LAYERS = ("layers.0", "layers.1", "layers.2")


@dataclass(frozen=True)
class Way:
    """A method, its config, and its rate: of 0.001, 0.003, 0.01, … the smallest that is as good as any, within 0.01, on
    digits 5 to 9 that were held out of those for training. Greater ones forget more."""

    method: str
    config: Mapping[str, Any]
    lr: float


def lora(r: int, lr: float) -> Way:
    return Way("lora", {"r": r, "lora_alpha": r, "target_modules": LAYERS}, lr)


WAYS = {
    "full": Way("full", {}, 0.001),
    "BitFit": Way("bitfit", {}, 0.3),
    "LoRA, r = 1": lora(1, 0.01),
    "LoRA, r = 4": lora(4, 0.01),
    "LoRA, r = 16": lora(16, 0.003),
}


@dataclass(frozen=True)
class Result:
    """Of one way: its size, and [seeds, moments, 3] what it reads right (new; old; old, of five) at these steps."""

    parameters: int
    bytes: int
    steps: Sequence[int]
    right: Array

    @property
    def last(self) -> Array:
        mean: Array = self.right[:, -1].mean(0)
        return mean


def pretrained(images: Images, steps: int, seed: int) -> Network:
    """A network that reads 0 to 4."""
    net = network((64, 128, 128, 10), seed)
    plan = Plan(steps=steps, batch=64, lr=0.003, seed=seed)
    some = images.of(OLD)
    adapter, _ = fit(plan, net, refpeft.init("full", {}, net), some.objective, range(len(some.x)))  # type: ignore[arg-type]
    return Network(net.sites, adapter.params)


def judged(net: Network, adapter: refpeft.Adapter | None, tests: Images) -> list[float]:
    old = tests.of(OLD)
    return [accuracy(net, adapter, tests.of(NEW)), accuracy(net, adapter, old), accuracy(net, adapter, old, OLD)]


def without(nets: Sequence[Network], tests: Images) -> list[float]:
    """The mean over networks, without an adapter."""
    return [float(v) for v in np.mean([judged(net, None, tests) for net in nets], axis=0)]


def adapted(way: Way, nets: Sequence[Network], images: Images, tests: Images, steps: int) -> Result:
    """The same way for every network, judged ten times as it learns."""
    some, moments = images.of(NEW), [round(n * steps / 10) for n in range(1, 11)]
    right = []
    for seed, net in enumerate(nets):
        start = refpeft.init(way.method, way.config, net, seed)  # type: ignore[arg-type]
        seen = [judged(net, start, tests)]

        def watch(step: int, adapter: refpeft.Adapter, net: Network = net, seen: list[list[float]] = seen) -> None:
            if step in moments:
                seen.append(judged(net, adapter, tests))

        plan = Plan(steps=steps, batch=64, lr=way.lr, seed=seed)
        adapter, _ = fit(plan, net, start, some.objective, range(len(some.x)), watch)
        right.append(seen)
    return Result(trainable(adapter), on_disk(adapter), [0, *moments], np.array(right))


def show(results: Mapping[str, Result], bare: Sequence[float], total: int, seeds: int) -> None:
    mean = f", mean of {seeds} networks" if seeds > 1 else ""
    shown = table(
        f"Digits 5 to 9, after 0 to 4: test accuracy{mean}",
        "Nobody was shown the old digits again.",
        "method", "parameters", "share", "on disk", "new", "old", "old, of five",
    )  # fmt: skip
    shown.add_row("before", "", "", "", *(f"{v:.3f}" for v in bare), end_section=True)
    for name, r in results.items():
        share = f"{r.parameters / total:.1%}"
        shown.add_row(name, f"{r.parameters:,}", share, bytes_of(r.bytes), *(f"{v:.3f}" for v in r.last))
    console.print(shown)


def say(results: Mapping[str, Result]) -> None:
    new, _, old = (results["LoRA, r = 4"].last - results["full"].last).tolist()
    console.print(
        f"Beside full fine-tuning, LoRA of rank 4 reads {new:+.3f} of the new digits, and tells {old:+.3f} of the old "
        "ones apart. Without its adapter every network reads those as before."
    )


def plot(file: Path, results: Mapping[str, Result]) -> None:
    with figure(file, 2) as (learning, forgetting):
        for k, (name, r) in enumerate(results.items()):
            new, _, told_apart = r.right.mean(0).T
            learning.plot(r.steps, new, "o-", color=f"C{k}", markersize=3, label=f"{name} ({r.parameters:,})")
            forgetting.plot(r.steps, told_apart, "o-", color=f"C{k}", markersize=3)
        learning.set(xlabel="step", ylabel="new digits read right", title="Learning 5 to 9")
        forgetting.set(xlabel="step", ylabel="old digits told apart, of five", title="What is left of 0 to 4")
        learning.legend(title="trainable parameters in brackets", frameon=False)


def check(results: Mapping[str, Result], bare: Sequence[float], after: Sequence[float]) -> None:
    """What must hold at any size. `after`: the networks without adapters, when all is done."""
    assert after == bare, f"the networks read {bare}, and {after} after they were adapted"
    full, last = results["full"].last[0], {name: r.last[0] for name, r in results.items()}
    assert bare[0] == 0, "a network that never saw a 5 answers 5"
    assert bare[1] > 0.95, f"pretraining reached {bare[1]:.3f} only"
    assert full > 0.9, f"full fine-tuning reached {full:.3f} only"
    assert last["LoRA, r = 4"] > full - 0.05, f"LoRA of rank 4 is not close to full fine-tuning: {last}"
    assert last["LoRA, r = 16"] > full - 0.03, f"LoRA of rank 16 is not close to full fine-tuning: {last}"
    assert 0.3 < last["BitFit"] < full, f"BitFit: {last}"
    for name, r in results.items():
        assert np.allclose(r.right[:, 0].mean(0), bare), f"{name} does not start from the network as it was"


def main() -> None:
    given = options(__doc__, "digits").parse_args()
    steps, seeds = (150, 1) if given.quick else (300, 3)
    images, tests = digits()
    nets = [pretrained(images, 200, seed) for seed in range(seeds)]
    bare = without(nets, tests)
    results = {}
    for name, way in WAYS.items():
        with console.status(f"{name}, {seeds} × {steps} steps"):
            results[name] = adapted(way, nets, images, tests, steps)
    show(results, bare, nets[0].size, seeds)
    say(results)
    file = given.out / "digits.png"
    plot(file, results)
    console.print(file)
    check(results, bare, without(nets, tests))


if __name__ == "__main__":
    main()
