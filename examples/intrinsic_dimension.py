"""How many numbers does it take to learn to read digits? d₉₀ of a small network, by DID and by SAID.

    python examples/intrinsic_dimension.py [--out FOLDER] [--quick]          needs refpeft[examples]

The data are scikit-learn's 1,797 handwritten digits (8×8 pixels), the network is 64 → 64 → 64 → 10 with 9,000
parameters. It is trained whole, and then in random subspaces of d dimensions around the same random start:
θ = θ₀ + P θ_d. d₉₀ is the smallest d that reaches 90 % of what training all of it reaches. Li et al. 2018
(arXiv 1804.08838) found that it is far below the number of parameters; this shows it again, in a minute or two.

The network is made of the specification's own parts, so its gradients are those of `refpeft`, with nothing added.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from common import figure, fit, options, trainable
from perceptron import Images, Network, accuracy, digits, network

import refpeft
from refpeft.train import Plan

METHODS = ("did", "said")
WIDTHS = (64, 64, 64, 10)
FULL = "full"  # training of all parameters


def reached(net: Network, tests: Images, images: Images, adapter: refpeft.Adapter, steps: int) -> float:
    """Accuracy on the test digits after so many steps of Adam on all of the training digits, the rate falling to 0."""
    rate = 0.01 * np.sqrt(net.size / trainable(adapter))  # columns of P have length 1: to move θ as far,
    plan = Plan(steps=steps, batch=len(images.x), lr=rate)  # fewer numbers must go further
    adapter, _ = fit(plan, net, adapter, images.objective, range(len(images.x)))
    return accuracy(net, adapter, tests)


def score(data: tuple[Images, Images], method: str, d: int, steps: int, seeds: int) -> float:
    """The mean accuracy over several starts and subspaces."""
    images, tests = data
    found = []
    for seed in range(seeds):
        net = network(WIDTHS, seed)
        adapter = refpeft.init(method, {} if method == FULL else {"d": d}, net, seed)  # type: ignore[arg-type]
        found.append(reached(net, tests, images, adapter, steps))
    return float(np.mean(found))


def plot(file: Path, curves: Mapping[str, Mapping[int, float]], full: float, d90: Mapping[str, int | None]) -> None:
    with figure(file, 1, 7, 4.5) as axes:
        axes.axhline(full, color="black", linewidth=1, label="all parameters")
        axes.axhline(0.9 * full, color="black", linewidth=1, linestyle="dotted", label="90 % of that")
        for (method, scores), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
            axes.plot([*scores], [*scores.values()], "o-", color=colour, markersize=4, label=method.upper())
            if d90[method]:
                axes.axvline(d90[method], color=colour, linewidth=1, linestyle="dashed", label=f"d₉₀ = {d90[method]}")
        axes.set(xscale="log", xlabel="dimensions d", ylabel="accuracy on test digits", title="Digits in a subspace")
        axes.legend()


def main() -> None:
    given = options(__doc__, "intrinsic-dimension").parse_args()
    start = time.perf_counter()
    data = digits()
    steps, seeds = (80, 1) if given.quick else (120, 3)
    grid = (16, 64, 512) if given.quick else (16, 32, 64, 128, 256, 512, 1024)
    fine = [round(12 * 2 ** (n / 4)) for n in range(24 if given.quick else 28)]  # from 12 on, 19 % apart
    total = network(WIDTHS, 0).size

    full = score(data, FULL, total, steps, seeds)
    print(f"all {total:,} parameters: {full:.3f}", flush=True)
    curves: dict[str, dict[int, float]] = {}
    d90: dict[str, int | None] = {}
    for method in METHODS:
        scores = {d: score(data, method, d, steps, seeds) for d in grid}

        def known(d: int, method: str = method, scores: dict[int, float] = scores) -> float:
            if d not in scores:
                scores[d] = score(data, method, d, steps, seeds)
            return scores[d]

        found = refpeft.intrinsic_dimension(known, full, fine)
        d90[method], curves[method] = found.dimension, dict(sorted(scores.items()))
        print(f"{method.upper()}: tried {len(scores)} dimensions in {time.perf_counter() - start:.0f} s", flush=True)

    print(f"\n{'d':>6}" + "".join(f"{method.upper():>8}" for method in METHODS))
    for d in sorted({d for scores in curves.values() for d in scores}):
        print(f"{d:6}" + "".join(f"{curves[m][d]:8.3f}" if d in curves[m] else " " * 8 for m in METHODS))
    print(f"{'all':>6}{full:8.3f}{full:8.3f}")
    print(f"{'d₉₀':>6}" + "".join(f"{d90[m] or 'none':>8}" for m in METHODS) + f"   of {total:,}")

    file = given.out / "intrinsic-dimension.png"
    plot(file, curves, full, d90)
    print(f"\n{file}, after {time.perf_counter() - start:.0f} s")
    if given.quick:
        check(full, curves, d90, total)


def check(full: float, curves: Mapping[str, Mapping[int, float]], d90: Mapping[str, int | None], total: int) -> None:
    """What the papers say, as far as a short run can show it."""
    assert full > 0.9, f"training all parameters reached {full:.3f} only"
    for method, scores in curves.items():
        d = d90[method]
        assert d is not None, f"{method}: no dimension reached 90 %"
        assert 10 < d < total / 10, f"{method}: d₉₀ = {d} is not far below {total}"
        assert scores[16] < 0.9 * full <= scores[512], f"{method}: accuracy does not grow with d: {scores}"
    print("As the papers say: 90 % of the accuracy in less than 10 % of the dimensions.")


if __name__ == "__main__":
    main()
