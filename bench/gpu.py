"""Every form of export on a GPU: equal to the specification there and to the CPU, and timed beside it.

    make gpu-check                                 on a machine with an NVIDIA GPU and refpeft[gpu]
    python -m bench.gpu --write docs/gpu.md        and what was found, into that page
    python -m bench.gpu --device cpu --quick       the same without a GPU, to see that this script works

Of each export: the ratio that every export is verified by, below 10, measured on the device; the largest difference
between the device's outputs and the CPU's, relative to the largest number, which should be below 100 units of rounding;
of those that decode, the tokens of bound runs beside the CPU's, which may differ only where two are that near; how many
nodes stayed on the CPU; how many copies onnxruntime put between the two.

Exit code 0: all as expected. 1: something is not. 2: there is no such device.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import refpeft
from bench.figures import markdown
from refpeft.export import devices, runtime
from refpeft.export.form import Subject
from refpeft.export.forms import FORMS
from refpeft.export.generation import Options, open_writer, stepping, write
from refpeft.export.precision import DTYPES, precision
from refpeft.export.program import export
from refpeft.export.verification import LIMIT, measured, named_answer

SMALL = {"vocab_size": 512, "hidden_size": 64, "layers": 2, "heads": 4}
LARGE = {"vocab_size": 32000, "hidden_size": 768, "layers": 12, "heads": 12}
METHODS = {"prompt": "prompt_tuning", "prefix": "prefix_tuning"}  # of the forms that are for one method; else LoRA
PROMPT, NEW, ROUNDS = 128, 32, 5
UNITS = 100  # float32 6.0e-06, float16 4.9e-02; TF32 would be off by about 1e-03
TEXTS = [[3, 1, 4, 1, 5], [9, 2]]
HEADING = "## Found\n"


@dataclass(frozen=True)
class Row:
    family: str
    form: str
    dtype: str
    decode: bool
    provider: str = ""
    ratio: float | None = None  # None: it did not run
    apart: float = 0.0  # device and CPU
    same: int = 0  # tokens
    near: int = 0  # others, where that is rounding
    other: int = 0  # others, where it is not
    on_cpu: int = 0
    copies: int = 0
    said: str = ""

    @property
    def equal(self) -> bool:
        """Ten steps of training move further apart than outputs do: there the ratio says whether they are equal."""
        close = self.form == "training" or self.apart <= expected(self.dtype)
        return self.ratio is not None and self.ratio <= LIMIT and close and not self.other

    @property
    def cells(self) -> list[str]:
        what = [self.family, self.form, self.dtype, "✓" * self.decode]
        if self.ratio is None:
            return [*what, self.said, "", "", "", "", "no"]
        tokens = f"{self.same}" + f" + {self.near} near" * (self.near > 0) + f", {self.other} other" * (self.other > 0)
        numbers = [f"{self.ratio:.3g}", f"{self.apart:.1e}", tokens if self.decode else ""]
        return [*what, *numbers, str(self.on_cpu), str(self.copies), "yes" if self.equal else "no"]


HEADS = ("model", "form", "dtype", "decodes", "ratio", "apart", "same tokens", "on CPU", "copies", "equal")


@dataclass(frozen=True)
class Speed:
    """Milliseconds, on the device and on the CPU."""

    family: str
    dtype: str
    prompt: tuple[float, float]
    token: tuple[float, float]

    @property
    def cells(self) -> list[str]:
        pairs = (self.prompt, self.token)
        return [self.family, self.dtype, *(c for a, b in pairs for c in (f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}"))]


SPEED = ("model", "dtype", f"prompt of {PROMPT}", "CPU", "ratio", "a token", "CPU", "ratio")


def expected(dtype: str) -> float:
    return UNITS * float(np.finfo(DTYPES[dtype]).eps) / 2


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
                        yield one(Row(family, form, dtype, decode), base, device, Path(folder) / "out")


def one(row: Row, base: refpeft.Model, device: str, out: Path) -> Row:
    own, form = [adapter(row.form, base)], FORMS[row.form]
    subject = Subject(base, own, DTYPES[row.dtype], row.decode, precision=precision(row.dtype))
    try:
        export(base, own, out, row.form, row.dtype, decode=row.decode, verify=False)
        found = measured(out, subject, form, device)
        row = replace(row, provider=found.provider or "", on_cpu=sum(found.on_cpu.values()))
        row = replace(row, ratio=found.worst["ratio"], apart=apart(row.form, subject, out, device))
        if device == "cuda":
            row = replace(row, copies=sum(devices.copies(runtime.require(), path) for path in runtime.graphs(out)))
        return replace(row, **tokens(row, out, device)) if row.decode else row
    except ValueError as error:
        return replace(row, ratio=None, said=str(error))


def apart(form: str, subject: Subject, out: Path, device: str) -> float:
    """The largest difference between what the device and the CPU answer, relative to the largest number."""
    there, here = (runtime.open_folder(out, where) for where in (device, "cpu"))
    far = [0.0]
    for check in FORMS[form].checks(subject):
        a, b = named_answer(check.ask(there)), named_answer(check.ask(here))
        far += [distance(a[name], b[name]) for name in b]
    return max(far)


def distance(a: Any, b: Any) -> float:
    off = float(np.abs(np.asarray(a, np.float64) - b).max())
    return off / (float(np.abs(b).max()) or 1.0) if off == off else float("inf")


def tokens(row: Row, out: Path, device: str) -> dict[str, int]:
    """Token by token with keys and values that stay on the device, both from the tokens that the CPU chose."""
    ids = {"adapter_ids": [0, -1]} if row.form == "multi" else {}
    writers = [open_writer(out, device=where, **ids) for where in (device, "cpu")]
    there, here = (stepping(w, [[*w.front, *text] for text in TEXTS]) for w in writers)
    found, chosen = {"same": 0, "near": 0, "other": 0}, None
    for _ in range(NEW):
        a, b = there(chosen), here(chosen)
        chosen = b.argmax(-1)
        for k, (mine, best) in enumerate(zip(a.argmax(-1), chosen, strict=True)):
            tie = b[k, best] - b[k, mine] <= 2 * expected(row.dtype) * np.abs(b[k]).max()
            found["same" if mine == best else "near" if tie else "other"] += 1
    return found


def timed(shape: dict[str, int], dtypes: list[str], device: str) -> Iterator[Speed]:
    for family in ("gpt2", "llama"):
        base = model(family, shape)
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                export(base, None, out, "merged", dtype, decode=True, last_logits=True, verify=False)
                there, here = (latency(out, where) for where in (device, "cpu"))
            yield Speed(family, dtype, (there[0], here[0]), (there[1], here[1]))


def latency(folder: Path, device: str) -> tuple[float, float]:
    """Medians of the milliseconds to read a prompt, and for each token that is written."""
    writer = open_writer(folder, device=device)
    rows = [[3 + n % 500 for n in range(PROMPT)]]
    firsts, nexts = list[float](), list[float]()
    for n in range(ROUNDS + 1):
        began = time.perf_counter()
        for k, _ in enumerate(write(writer, rows, Options(max_new_tokens=NEW))):
            now = time.perf_counter()
            if n:  # the first round is to get warm
                (firsts if k == 0 else nexts).append(1e3 * (now - began))
            began = now
    return statistics.median(firsts), statistics.median(nexts or [float("nan")])


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def page(rows: list[Row], speeds: list[Speed], about: str) -> str:
    left, right = markdown(HEADS, [r.cells for r in rows]), markdown(SPEED, [s.cells for s in speeds])
    return f"{HEADING}\n{about}\n\n{left}\nMilliseconds, medians:\n\n{right}"


def put(file: Path, text: str) -> None:
    """At the end of a page, in the place of what was found before."""
    before = file.read_text("utf-8").split(HEADING)[0] if file.is_file() else ""
    file.write_text(before + text, "utf-8")


def machine(device: str) -> str:
    """Which GPU, with which driver; or that there is none."""
    if device == "cpu" or not (program := shutil.which("nvidia-smi")):
        return f"device {device}"
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{said[0] if said else 'a GPU'} (driver)"


def main(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    console, quick = Console(width=130), options.quick
    families = ["gpt2"] if quick else ["gpt2", "llama", "bert", "t5"]
    dtypes = ["float32"] if quick else ["float32", "float16"]
    try:
        runtime.offered(options.device)
        with console.status("") as status:
            rows = list(verified(families, dtypes, options.device, status.update))
            status.update("latency")
            speeds = list(timed(SMALL if quick else LARGE, dtypes, options.device))
    except (ValueError, ImportError) as error:  # a device that is not there, or stops to work
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    limits = ", ".join(f"{dtype} {expected(dtype):.1e}" for dtype in dtypes)
    where = next((row.provider for row in rows if row.provider), options.device)
    for title, heads, cells in (
        (
            f"{where} beside specification (ratio below 10) and CPU (apart below {limits})",
            HEADS,
            [r.cells for r in rows],
        ),
        (f"Milliseconds, medians: {options.device} beside the CPU", SPEED, [s.cells for s in speeds]),
    ):
        table = Table(*heads, title=title)
        for line in cells:
            table.add_row(*line)
        console.print(table)
    equal = sum(row.equal for row in rows)
    console.print(f"{equal} of {len(rows)} exports are equal to the specification and the CPU on {options.device}.")
    if options.write:
        ort = runtime.require().__version__
        about = f"{machine(options.device)}, onnxruntime {ort}, refpeft {refpeft.__version__}. Apart below: {limits}."
        put(options.write, page(rows, speeds, about))
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="GPT-2 in float32 only, and small")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write what was found into this page too")
    sys.exit(main(parser.parse_args()))
