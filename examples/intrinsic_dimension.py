"""How many numbers does it take to learn to read digits? d₉₀ of a small network, by DID and by SAID.

    python examples/intrinsic_dimension.py [--out FOLDER] [--quick]          needs refpeft[examples]

The data are scikit-learn's 1,797 handwritten digits (8×8 pixels), the network is 64 → 64 → 64 → 10 with 9,000
parameters. It is trained whole, and then in random subspaces of d dimensions around the same random start:
θ = θ₀ + P θ_d. d₉₀ is the smallest d that reaches 90 % of what training all of it reaches. Li et al. 2018
(arXiv 1804.08838) found that it is far below the number of parameters; this shows it again, in a minute or two.

The network is made of the specification's own parts, so its gradients are those of `refpeft`, with nothing added.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import refpeft
from refpeft.adapter import wrapped
from refpeft.config import Site
from refpeft.layers import chain
from refpeft.ops import cross_entropy, tanh
from refpeft.part import BASE, Part, make, op_run

Array = np.ndarray[Any, Any]
Named = dict[str, Array]
METHODS = ("did", "said")
WIDTHS = (64, 64, 64, 10)
FULL = "full"  # training of all parameters


@dataclass(frozen=True)
class Network:
    """A perceptron as a model that refpeft can adapt: where its layers are, and their parameters."""

    sites: Mapping[str, Site]
    params: Mapping[str, Array]

    def part(self, role: str) -> Part:
        s = self.sites[role]
        W, b = self.params[s.weight], self.params[s.bias]
        return make(s.path, s.kind, W, b, (BASE, s.weight), (BASE, s.bias))

    def __call__(self, x: Array, adapter: refpeft.Adapter | None = None) -> tuple[Array, Callable[[Array], Named]]:
        """logits [n, 10], vjp; vjp(dlogits) gives the gradients of the adapter, or of the network without one."""
        wrap = wrapped([adapter] if adapter else [])
        runs = [wrap(self.part(role)).run for role in self.sites]
        y, back = chain(*(f for run in runs[:-1] for f in (run, op_run(tanh))), runs[-1])(x)
        wanted = {(0, n) for n in adapter.params} if adapter else {(BASE, n) for n in self.params}
        return y, lambda dy: {name: g() for (_, name), g in back(lambda: dy, wanted)[1].items()}


def network(seed: int) -> Network:
    rng = np.random.default_rng(seed)
    names = [f"layers.{n}" for n in range(len(WIDTHS) - 1)]
    sites = {name: Site(name, "linear", name + ".weight", name + ".bias") for name in names}
    params: Named = {}
    for name, i, o in zip(names, WIDTHS, WIDTHS[1:], strict=False):
        params |= {name + ".weight": rng.normal(size=(o, i)) / np.sqrt(i), name + ".bias": np.zeros(o)}
    return Network(sites, {name: v.astype(np.float32) for name, v in params.items()})


@dataclass(frozen=True)
class Data:
    x: Array
    labels: Array
    test_x: Array
    test_labels: Array


def digits(train: int = 1200) -> Data:
    x, labels = load_digits(return_X_y=True)
    x = (x / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    a, b = order[:train], order[train:]
    return Data(x[a], labels[a], x[b], labels[b])


def adam(params: Named, grads: Named, state: Named, n: int, lr: float) -> Named:
    """p ← p − lr m̂/(√v̂ + ε).      Kingma & Ba 2015, algorithm 1; `state` holds m and v"""
    out = {}
    for name, g in grads.items():
        m = state[name + ".m"] = 0.9 * state.get(name + ".m", 0 * g) + 0.1 * g
        v = state[name + ".v"] = 0.999 * state.get(name + ".v", 0 * g) + 0.001 * g * g
        out[name] = params[name] - lr * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
    return out


def train(net: Network, data: Data, steps: int, adapter: refpeft.Adapter | None = None) -> float:
    """Accuracy on the test digits after so many steps of Adam on all of the training digits, the rate falling to 0."""
    params: Named = dict(adapter.params if adapter else net.params)
    size = np.sqrt(sum(v.size for v in net.params.values()) / sum(v.size for v in params.values()))
    rate = 0.01 * size  # columns of P have length 1: fewer numbers must go further to move θ as far
    state: Named = {}

    def run(params: Named, x: Array) -> tuple[Array, Callable[[Array], Named]]:
        return net(x, adapter.replace(params=params)) if adapter else Network(net.sites, params)(x)

    for n in range(1, steps + 1):
        logits, vjp = run(params, data.x)
        L, vjp_loss = cross_entropy(logits, data.labels)
        dlogits = vjp_loss(np.ones_like(L))[0]
        assert dlogits is not None
        params = adam(params, vjp(dlogits()), state, n, rate * (1 - (n - 1) / steps))
    logits, _ = run(params, data.test_x)
    return float((logits.argmax(1) == data.test_labels).mean())


def score(data: Data, method: str, d: int, steps: int, seeds: int) -> float:
    """The mean accuracy over several starts and subspaces."""
    found = []
    for seed in range(seeds):
        net = network(seed)
        adapter = None if method == FULL else refpeft.init(method, {"d": d}, net, seed)  # type: ignore[arg-type]
        found.append(train(net, data, steps, adapter))
    return float(np.mean(found))


def plot(file: Path, curves: Mapping[str, Mapping[int, float]], full: float, d90: Mapping[str, int | None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(full, color="black", linewidth=1, label="all parameters")
    axes.axhline(0.9 * full, color="black", linewidth=1, linestyle="dotted", label="90 % of that")
    for (method, scores), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        axes.plot([*scores], [*scores.values()], "o-", color=colour, markersize=4, label=method.upper())
        if d90[method]:
            axes.axvline(d90[method], color=colour, linewidth=1, linestyle="dashed", label=f"d₉₀ = {d90[method]}")
    axes.set(xscale="log", xlabel="dimensions d", ylabel="accuracy on the test digits", title="Digits in a subspace")
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("out/intrinsic-dimension"), help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="a small size, with checks that can fail")
    options = parser.parse_args()
    start = time.perf_counter()
    data = digits()
    steps, seeds = (80, 1) if options.quick else (120, 3)
    grid = (16, 64, 512) if options.quick else (16, 32, 64, 128, 256, 512, 1024)
    fine = [round(12 * 2 ** (n / 4)) for n in range(24 if options.quick else 28)]  # from 12 on, 19 % apart
    total = sum(v.size for v in network(0).params.values())

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

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "intrinsic-dimension.png"
    plot(file, curves, full, d90)
    print(f"\n{file}, after {time.perf_counter() - start:.0f} s")
    if options.quick:
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
