"""Fastfood (`refpeft.fastfood`) and its transpose, against a cosine transform of a vector of the same length.

    python bench/fastfood.py        2²² parameters in float32, one thread each

scipy.fft.dct does comparable work, O(n log n), in C++. The three take turns; ratios are medians over the rounds. Memory
is the peak of what a call allocates, its result included, in vectors of that length.
"""

import argparse
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = 1 << 22
SHORT = 1000  # a projection from so few dimensions is what the methods compute
ROUNDS = 15
LIMIT, LIMIT_VECTORS = 1.5, 3.0  # of the time of scipy.fft.dct; vectors


def calls() -> dict[str, Callable[[], Any]]:
    import numpy as np
    from scipy import fft

    from refpeft.fastfood import fastfood

    rng = np.random.default_rng(0)
    B = rng.choice(np.array([-1, 1], np.int8), SIZE)
    Π = rng.permutation(SIZE).astype(np.int32)
    G = rng.standard_normal(SIZE, np.float32)
    x = rng.standard_normal(SIZE, np.float32)

    def back(θ: Any) -> Callable[[], Any]:
        _, vjp = fastfood(θ, B, Π, G, SIZE)
        return lambda: vjp(x)[0]()

    return {
        "scipy.fft.dct": lambda: fft.dct(x),
        "forward": lambda: fastfood(x, B, Π, G, SIZE),
        "transpose": back(x),
        f"forward, d = {SHORT}": lambda: fastfood(x[:SHORT], B, Π, G, SIZE),
        f"transpose, d = {SHORT}": back(x[:SHORT]),
    }


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def vectors(f: Callable[[], Any]) -> float:
    """The peak of what a call allocates, in vectors of 2²² numbers in float32."""
    tracemalloc.start()
    f()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / (4 * SIZE)


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before NumPy is imported
    named = calls()
    for f in named.values():
        f()
    rounds = [{name: seconds(f) for name, f in named.items()} for _ in range(ROUNDS)]
    table = Table(title=f"A projection to {SIZE:,} parameters, float32, 1 thread (medians of {ROUNDS} rounds)")
    table.add_column("")
    for column in ("ms", "ratio to dct", "at most", "vectors", "at most"):
        table.add_column(column, justify="right")
    figures = {}
    for name, f in named.items():
        ms = statistics.median(r[name] for r in rounds) * 1e3
        ratio = statistics.median(r[name] / r["scipy.fft.dct"] for r in rounds)
        figures[name] = {"ms": ms, "ratio": ratio, "vectors": vectors(f)}
        limits = ("", "") if "dct" in name else (f"{LIMIT:g}", f"{LIMIT_VECTORS:g}")
        table.add_row(name, f"{ms:.1f}", f"{ratio:.2f}", limits[0], f"{figures[name]['vectors']:.2f}", limits[1])
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
