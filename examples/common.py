"""What the experiments share: their options, training to the end, the size of an adapter on disk, plots."""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import refpeft
from refpeft import train
from refpeft.objectives import Objective

Array = np.ndarray[Any, Any]
console = Console(highlight=False)


def options(doc: str | None, out: str, model: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out") / out, help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="a small size, for tests")
    if model:
        parser.add_argument("--model", type=Path, help="a folder with MiniLM-L6 (default: the one that pip installed)")
    return parser


def fit(
    plan: train.Plan,
    model: Any,
    adapter: refpeft.Adapter,
    objective: Objective,
    rows: Sequence[Any],
    watch: Callable[[int, refpeft.Adapter], None] = lambda step, adapter: None,
) -> tuple[refpeft.Adapter, Array]:
    """The adapter after training, and the loss of every step. `watch` sees the adapter after each."""
    state = train.start(plan, adapter)
    while state.step < plan.steps:
        state = train.step(plan, model, adapter, objective, rows, state)
        watch(state.step, train.trained(adapter, state))
    return train.trained(adapter, state), state.losses


def trainable(adapter: refpeft.Adapter) -> int:
    return sum(a.size for a in adapter.params.values())


def on_disk(adapter: refpeft.Adapter) -> int:
    """How many bytes the folder of a saved adapter takes."""
    with tempfile.TemporaryDirectory() as folder:
        refpeft.save_adapter(adapter, Path(folder) / "adapter")
        return sum(file.stat().st_size for file in (Path(folder) / "adapter").iterdir())


def bytes_of(n: int) -> str:
    """1,234 → '1.2 kB'"""
    size, unit = next((n / k, unit) for k, unit in ((1e6, "MB"), (1e3, "kB"), (1, "B")) if n >= k or k == 1)
    return f"{size:.1f} {unit}" if unit != "B" else f"{n} B"


def table(title: str, caption: str, first: str, *others: str) -> Table:
    """Numbers stand on the right."""
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    made.add_column(first)
    for name in others:
        made.add_column(name, justify="right")
    return made


def smooth(losses: Array, n: int = 5) -> Array:
    """The mean of each loss and those before it, n in all, so that a curve can be read."""
    return np.array([losses[max(0, k - n + 1) : k + 1].mean() for k in range(len(losses))])


@contextmanager
def figure(file: Path, panels: int, width: float = 5.2, height: float = 4.2) -> Iterator[Any]:
    """So many panels side by side, to be drawn into and then written to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    drawn, axes = pyplot.subplots(1, panels, figsize=(width * panels, height), layout="constrained", squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="0.92")
        one.set_axisbelow(True)
    yield axes[0] if panels > 1 else axes[0, 0]
    drawn.savefig(file, dpi=150)
    pyplot.close(drawn)


def legend_above(axes: Any, side: str) -> None:
    """Where it hides nothing: on the left or the right above all panels."""
    handles, names = axes.get_legend_handles_labels()
    axes.figure.legend(handles, names, loc=f"outside upper {side}", ncols=4, frameon=False, fontsize=9)
