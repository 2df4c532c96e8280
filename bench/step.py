"""One training step (forward, loss, all gradients of a LoRA adapter): the specification against transformers + peft.

    python bench/step.py            the table of ratios: the same model, adapter and batch, two threads each

Each engine runs in a process of its own; the two take turns, round by round, so that a machine whose speed drifts
slows both. A ratio is ours/theirs of one round; the table gives the medians. Both run with MALLOC_TOP_PAD_=64 MB, which
keeps glibc from giving memory back to the system after every step and taking it anew, page by page, in the next;
`--malloc-default` measures with the C library as it comes.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {  # layers, width, heads, batch, tokens, vocabulary, steps a round, rounds
    "d=64": (2, 64, 4, 1, 16, 256, 40, 15),
    "d=256": (4, 256, 4, 2, 128, 5000, 4, 11),
    "gpt2-small": (12, 768, 12, 1, 128, 50257, 1, 7),
}
GROWTH = {  # what grows → the shapes, each twice the one before
    "width": {f"d={d}, s=64": (2, d, d // 32, 1, 64, 256, 3, 5) for d in (64, 128, 256, 512)},
    "tokens": {f"d=128, s={s}": (2, 128, 4, 1, s, 256, 3, 5) for s in (32, 64, 128, 256, 512)},
}
LIMITS = {"d=64": 0.2, "d=256": 0.8, "gpt2-small": 1.0}
THREADS = 2
MALLOC = {"MALLOC_TOP_PAD_": str(64 << 20)}


def sizes(shape: str) -> tuple[int, ...]:
    return next(table[shape] for table in (SHAPES, *GROWTH.values()) if shape in table)


def config(shape: str) -> dict[str, Any]:
    layers, d, heads, _, tokens, vocab, *_ = sizes(shape)
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": layers, "n_embd": d, "n_head": heads,
        "vocab_size": vocab, "n_positions": max(tokens, 64), "bos_token_id": 0, "eos_token_id": 0,
        "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    }  # fmt: skip


def batch(shape: str) -> np.ndarray[Any, Any]:
    _, _, _, b, tokens, vocab, *_ = sizes(shape)
    return np.random.default_rng(1).integers(0, vocab, (b, tokens))


def spec_step(folder: str, shape: str, dtype: str = "float32", base: bool = False) -> Callable[[], float]:
    import refpeft
    from refpeft.ops import cross_entropy

    model = refpeft.load(folder, dtype=dtype)
    adapter = refpeft.init("lora", {"r": 8, "target_modules": ["c_attn"]}, model, seed=0)
    ids = batch(shape)
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)

    def step() -> float:
        logits, vjp = model(ids, adapter)
        loss, vjp_loss = cross_entropy(logits, labels)
        dlogits = vjp_loss(np.ones((), logits.dtype))[0]
        vjp(dlogits(), base=base)
        return float(loss)

    return step


def peft_step(folder: str, shape: str) -> Callable[[], float]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    ids = torch.tensor(batch(shape))

    def step() -> float:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    return step


ENGINES: dict[str, Callable[[str, str], Callable[[], float]]] = {
    "spec": spec_step,
    "peft": peft_step,
    "spec64": lambda folder, shape: spec_step(folder, shape, "float64"),
    "spec, all gradients": lambda folder, shape: spec_step(folder, shape, base=True),
}


def worker(make: Callable[[], Callable[[], float]]) -> None:
    """Answer every line on standard input, a number of steps, with the seconds they took and the peak memory."""
    start = memory()
    step = make()
    loss = step()
    print(json.dumps({"loss": loss}), flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps({"seconds": time.perf_counter() - begin, "peak": memory(), "start": start}), flush=True)


def memory() -> float:
    """Peak resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Engine:
    """A worker process; `run(n)` has it take n steps."""

    def __init__(
        self, name: str, folder: str, shape: str, script: str = __file__, python: str = sys.executable
    ) -> None:
        threads = {"OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS)}
        env = MALLOC | os.environ | threads | {"HF_HUB_OFFLINE": "1"}
        command = [python, script, "--worker", name, folder, shape]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.loss = self.answer()["loss"]

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self.process.args!r} ended early")
        answer: dict[str, float] = json.loads(line)
        return answer

    def run(self, n: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(a: str, b: str, folder: str, shape: str) -> dict[str, float]:
    *_, steps, rounds = sizes(shape)
    return turns((Engine(a, folder, shape), Engine(b, folder, shape)), steps, rounds)


def turns(engines: tuple[Engine, Engine], steps: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds: milliseconds a step of each, and the ratio a/b round by round."""
    pairs = [tuple(e.run(steps) for e in engines) for _ in range(rounds + 1)][1:]
    for e in engines:
        e.close()
    if abs(engines[0].loss / engines[1].loss - 1) > 1e-4:
        raise SystemExit(f"the two disagree on the loss: {engines[0].loss} and {engines[1].loss}")
    last = pairs[-1]
    return {
        "a_ms": statistics.median(p[0]["seconds"] for p in pairs) / steps * 1e3,
        "b_ms": statistics.median(p[1]["seconds"] for p in pairs) / steps * 1e3,
        "ratio": statistics.median(p[0]["seconds"] / p[1]["seconds"] for p in pairs),
        "a_mb": last[0]["peak"],
        "b_mb": last[1]["peak"],
    }


def growth(shapes: dict[str, tuple[int, ...]], scratch: str) -> Iterator[tuple[str, float, float | None]]:
    """Shape, milliseconds a step of the spec, and the power of the size with which it grew since the shape before."""
    before = None
    for shape, (*_, steps, rounds) in shapes.items():
        folder = str(Path(scratch) / f"growth {shape}")
        if not Path(folder).exists():
            write_model(folder, shape)
        engine = Engine("spec", folder, shape)
        ms = statistics.median(engine.run(steps)["seconds"] for _ in range(rounds)) / steps * 1e3
        engine.close()
        yield shape, ms, math.log2(ms / before) if before else None
        before = ms


def write_model(folder: str, shape: str) -> None:
    write(folder, config(shape))


def write(folder: str, c: dict[str, Any]) -> None:
    """The model of a config.json with random weights at GPT-2's scale."""
    import refpeft
    from refpeft.checkpoint.families import plan
    from refpeft.model import Model

    rng, p = np.random.default_rng(0), plan(c)
    norms = {site.weight for site in p.sites.values() if site.kind.endswith("norm")}
    params = {
        name: rng.normal(0, 0.02, n).astype(np.float32) if len(n) > 1 else np.full(n, name in norms, np.float32)
        for name, n in p.shapes.items()
    }
    refpeft.save(Model(p.config, p.sites, params, c), folder)


def growth_table(scratch: str) -> Any:
    from rich.table import Table

    table = Table(title="How the step's cost grows: the spec alone, 2 layers")
    for column in ("doubling", "shape", "ms a step", "grew with the power"):
        table.add_column(column, justify="right" if "m" in column else "left")
    for what, shapes in GROWTH.items():
        for shape, ms, power in growth(shapes, scratch):
            table.add_row(what, shape, f"{ms:.2f}", "" if power is None else f"{power:.2f}")
    return table


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--worker", nargs=3, metavar=("ENGINE", "FOLDER", "SHAPE"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--malloc-default", action="store_true", help="leave the C library's allocator as it comes")
    options = parser.parse_args()
    if options.malloc_default:
        MALLOC.clear()
    if options.worker:
        engine, folder, shape = options.worker
        worker(lambda: ENGINES[engine](folder, shape))
        return
    table = Table(title="One LoRA training step, float32, 2 threads (medians)")
    for column in ("shape", "against", "spec ms", "other ms", "ratio", "wanted", "spec MB", "other MB", "memory ratio"):
        table.add_column(column, justify="left" if column in ("shape", "against") else "right")
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shape or SHAPES:
            folder = str(Path(scratch) / shape)
            write_model(folder, shape)
            for other in ("peft", "spec64", "spec, all gradients"):
                r = figures[f"{shape}, {other}"] = compare("spec", other, folder, shape)
                limit = f"≤ {LIMITS[shape]}" if other == "peft" else ""
                table.add_row(
                    shape, other, f"{r['a_ms']:.2f}", f"{r['b_ms']:.2f}", f"{r['ratio']:.2f}", limit,
                    f"{r['a_mb']:.0f}", f"{r['b_mb']:.0f}", f"{r['a_mb'] / r['b_mb']:.2f}",
                )  # fmt: skip
        Console(width=120).print(table)
        if not options.shape:
            Console(width=120).print(growth_table(scratch))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
