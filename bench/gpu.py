"""Every form of export on a GPU: verified there against the specification, and timed beside the CPU.

    make gpu-check                                 on a machine with an NVIDIA GPU and refpeft[gpu]
    python bench/gpu.py --write docs/gpu.md        and a page of what was found
    python bench/gpu.py --device cpu --quick       the same without a GPU, to see that this script works

Exit code 0: all verified. 1: something is not equal to the specification on the device. 2: there is no such device.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import refpeft
from refpeft.export import runtime
from refpeft.export.forms import FORMS
from refpeft.export.generation import Options, open_writer, write
from refpeft.export.program import export
from refpeft.export.verification import MismatchError

SMALL = {"vocab_size": 512, "hidden_size": 64, "layers": 2, "heads": 4}
LARGE = {"vocab_size": 32000, "hidden_size": 768, "layers": 12, "heads": 12}
METHODS = {"prompt": "prompt_tuning", "prefix": "prefix_tuning"}  # of the forms that are for one method; else LoRA
PROMPT, NEW, ROUNDS = 128, 32, 5


@dataclass(frozen=True)
class Row:
    family: str
    form: str
    dtype: str
    decode: bool
    ratio: float | None  # None: not equal to the specification, or not run
    provider: str
    said: str = ""


def config(family: str, vocab_size: int, hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    """config.json of a model of this shape."""
    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    width = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden_size}
    wide = {**width, "intermediate_size": 4 * hidden_size, "max_position_embeddings": 512}
    if family == "gpt2":
        own = {"n_embd": hidden_size, "n_layer": layers, "n_head": heads, "n_positions": 512}
        return {**common, **own, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    if family == "llama":
        return {**common, **wide, "num_key_value_heads": heads // 2, "architectures": ["LlamaForCausalLM"],
                "model_type": "llama", "rms_norm_eps": 1e-6}  # fmt: skip
    if family == "bert":
        return {**common, **wide, "type_vocab_size": 2, "architectures": ["BertForMaskedLM"], "model_type": "bert"}
    own = {"d_model": hidden_size, "d_kv": hidden_size // heads, "d_ff": 4 * hidden_size, "num_heads": heads}
    return {**common, **own, "num_layers": layers, "num_decoder_layers": layers, "decoder_start_token_id": 0,
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}  # fmt: skip


def model(family: str, shape: dict[str, int]) -> refpeft.Model:
    """With random weights."""
    from refpeft.conformance import tiny

    made: refpeft.Model = tiny.model(config(family, **shape), 0, np.float32)
    return made


def adapter(form: str, base: refpeft.Model) -> refpeft.Adapter:
    fresh = refpeft.init(METHODS.get(form, "lora"), {"num_virtual_tokens": 4} if form in METHODS else {"r": 8}, base)
    rng = np.random.default_rng(0)
    moved = {n: (p + 0.05 * rng.normal(size=p.shape)).astype(p.dtype) for n, p in fresh.params.items()}
    return fresh.replace(params=moved)


def possible(family: str, form: str, dtype: str, decode: bool) -> bool:
    """What there is: encoders do not decode, prefixes come as keys and values of a model that does, and training is in
    float32."""
    if form == "prefix":
        return decode and family in ("gpt2", "llama")
    if form == "training":
        return not decode and family != "t5" and dtype == "float32"
    return not decode or family != "bert"


def verified(families: list[str], dtypes: list[str], device: str, tell: Callable[[str], None]) -> Iterator[Row]:
    for family in families:
        base = model(family, SMALL)
        for form in FORMS:
            for decode in (False, True):
                for dtype in (d for d in dtypes if possible(family, form, d, decode)):
                    tell(f"{family}, {form}, {dtype}{', decoding' * decode}")
                    with tempfile.TemporaryDirectory() as folder:
                        yield one(family, base, form, dtype, decode, device, Path(folder) / "out")


def one(
    family: str, base: refpeft.Model, form: str, dtype: str, decode: bool, device: str, out: Path
) -> Row:  # fmt: skip
    try:
        made = export(base, adapter(form, base), out, form, dtype, decode=decode, device=device)
    except MismatchError as error:
        return Row(family, form, dtype, decode, None, device, str(error))
    except ValueError as error:
        return Row(family, form, dtype, decode, None, "", str(error))
    return Row(family, form, dtype, decode, max(case["ratio"] for case in made.cases), made.provider or "")


def timed(shape: dict[str, int], dtype: str, device: str) -> Iterator[tuple[str, str, float, float]]:
    """Family, device, milliseconds to read a prompt, and for each token that is written."""
    for family in ("gpt2", "llama"):
        base = model(family, shape)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            export(base, None, out, "merged", dtype, decode=True, last_logits=True, verify=False)
            for where in dict.fromkeys((device, "cpu")):
                yield family, where, *latency(out, where)


def latency(folder: Path, device: str) -> tuple[float, float]:
    writer = open_writer(folder, device=device)
    rows = [[3 + n % 500 for n in range(PROMPT)]]
    firsts, nexts = list[float](), list[float]()
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for k, _ in enumerate(write(writer, rows, Options(max_new_tokens=NEW))):
            now = time.perf_counter()
            (firsts if k == 0 else nexts).append(1e3 * (now - began))
            began = now
    return statistics.median(firsts), statistics.median(nexts or [float("nan")])


def pages(rows: list[Row], times: list[tuple[str, str, float, float]], about: str) -> str:
    head = "| model | form | dtype | decodes | ratio | ran on |\n|---|---|---|---|---|---|\n"
    table = "".join(
        f"| {r.family} | {r.form} | {r.dtype} | {'✓' if r.decode else ''} | "
        f"{'not verified: ' + r.said if r.ratio is None else format(r.ratio, '.2f')} | {r.provider} |\n"
        for r in rows
    )
    speed = "| model | device | prompt of 128, ms | a token, ms |\n|---|---|---|---|\n"
    speed += "".join(f"| {f} | {d} | {a:.2f} | {b:.2f} |\n" for f, d, a, b in times)
    return (
        f"# On a GPU\n\n{about}\n\nWritten by `python bench/gpu.py --write docs/gpu.md` (`make gpu-check`). A ratio of "
        "about 1 means: off the specification by no more than rounding explains; the limit is 10.\n\n"
        f"{head}{table}\n{speed}"
    )


def main(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    console, quick = Console(width=120), options.quick
    try:
        runtime.offered(options.device)
    except (ValueError, ImportError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    families = ["gpt2"] if quick else ["gpt2", "llama", "bert", "t5"]
    dtypes = ["float32"] if quick else ["float32", "float16"]
    with console.status("") as status:
        try:
            rows = list(verified(families, dtypes, options.device, status.update))
            status.update("latency")
            times = list(timed(SMALL if quick else LARGE, dtypes[-1], options.device))
        except ValueError as error:  # a device that is offered and does not work
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
    table = Table("model", "form", "dtype", "decodes", "ratio", "ran on", title="Against the specification")
    for r in rows:
        found = "[red]" + r.said[:60] if r.ratio is None else f"{r.ratio:.2f}"
        table.add_row(r.family, r.form, r.dtype, "✓" * r.decode, found, r.provider)
    console.print(table)
    speed = Table("model", "device", "prompt of 128, ms", "a token, ms", title="Latency, medians")
    for family, device, a, b in times:
        speed.add_row(family, device, f"{a:.2f}", f"{b:.2f}")
    console.print(speed)
    wrong = [r for r in rows if r.ratio is None]
    console.print(f"{len(rows) - len(wrong)} of {len(rows)} exports verified on {options.device}.")
    if options.write:
        about = f"onnxruntime {runtime.require().__version__}, refpeft {refpeft.__version__}, device {options.device}."
        options.write.write_text(pages(rows, times, about), "utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="GPT-2 in float32 only, and small")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page there too")
    sys.exit(main(parser.parse_args()))
