"""refpeft export against the other exporters to ONNX: time and memory of an export, and how fast onnxruntime runs it.

    python bench/exporters.py                       what is installed, on the shapes of GPT-2-small and of a small LLaMA
    python bench/exporters.py --install mobius      an environment for one of them: mobius, genai, optimum
    python bench/exporters.py --write README.md     and the table there
    python bench/exporters.py --latency --threads 2 --rounds 9 --shape llama8

An export is a whole process, imports included: a model in HF's format with random weights → a graph with keys and
values on disk, not verified (nobody else does). Memory is the peak of what is not a map of a file. Every graph then
runs on this onnxruntime, in processes of its own; they take turns, and a ratio is the median over the rounds of
ours/theirs. The best of the others is chosen by the other processes than those that are compared: where several tie,
the quickest of the same rounds would be the luckiest. Prefill reads 128 tokens after an empty past, decode one token
after 128; LoRA of r = 8 is on every linear layer, the head of LLaMA too.
"""

import argparse
import compileall
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import peers
from bench.figures import MARK, Figure, middle, reached, rewrite, summary, table
from bench.step import write

GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 12, "n_embd": 768, "n_head": 12,
    "vocab_size": 50257, "n_positions": 1024, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8, "hidden_size": 512,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_theta": 10000.0, "head_dim": 64, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"gpt2-small": GPT2, "llama8": LLAMA}
TARGETS = {
    "gpt2-small": "c_attn c_fc c_proj",
    "llama8": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
}
CASES = {  # batch, tokens, past
    "prefill 1×128": (1, 128, 0), "prefill 4×128": (4, 128, 0), "decode 1": (1, 1, 128), "decode 4": (4, 1, 128),
}  # fmt: skip
INT8 = {"accuracy_level": 4, "head": True}  # activations too, in products with 4 bits
BASE, LORA = False, True
OURS: dict[str, tuple[bool, dict[str, Any]]] = {  # with the adapter or without, and options of `refpeft export`
    "refpeft": (BASE, {}),
    "refpeft, last logits": (BASE, {"last_logits": True}),
    "refpeft, merged LoRA": (LORA, {}),
    "refpeft, unmerged LoRA": (LORA, {"form": "unmerged"}),
    "refpeft, LoRA as input": (LORA, {"form": "inputs"}),
    "refpeft, portable": (BASE, {"graph": "portable"}),
    "refpeft, linked": (LORA, {"form": "unmerged", "graph": "portable", "link": True}),
    "refpeft, int4": (BASE, {"dtype": "int4", "blocks": INT8}),
    "refpeft, int4, LoRA as input": (LORA, {"form": "inputs", "dtype": "int4", "blocks": INT8}),
    "refpeft, int4 by 32": (BASE, {"dtype": "int4", "blocks": INT8 | {"size": 32}}),
}  # fmt: skip
FETCHED = 3 << 30  # bytes of memory, and half of what is free at most
OFTEN = 6  # rounds of decode for one of prefill: short, and who else uses the memory's bandwidth changes
TURNS, WINDOW = 2, 25  # of an exporter and of ours beside it, at least; seconds, in which quick ones take more turns
AGAINST = ("refpeft", "refpeft, merged LoRA")  # whose seconds are compared with theirs
SLOW = ("torch", "transformers", "optimum")
UNSUPPORTED = {("genai", "gpt2-small"): "its builder knows no GPT-2"}
EXPORT_LIMITS = {"mobius": 0.2, "torch": 0.05, "optimum": 0.05}
TUNED_LIMIT = 0.08  # of torch, with LoRA merged, which it takes as it is
MEMORY, TUNED_MEMORY, LINKED, LATENCY, LAST, PREFILL, DECODE = 100.0, 200.0, 45.0, 1.0, 0.75, 1.10, 1.20
INT4 = {  # against the same form in float32; of smaller blocks, which keep more of a weight, nothing was to be reached
    "refpeft, int4": ("refpeft", 0.4), "refpeft, int4, LoRA as input": ("refpeft, LoRA as input", 0.4),
    "refpeft, int4 by 32": ("refpeft", math.inf),
}  # fmt: skip


# ── environments ─────────────────────────────────────────────────────────────────────────────────────────────────────


def python_of(name: str) -> str | None:
    """The python that has an exporter; None if nothing has."""
    from refpeft.conformance.targets.libraries import folder

    if name in peers.HERE:
        return sys.executable if all(map(find_spec, ("torch", "transformers", "onnxscript"))) else None
    there = folder() / name / "bin" / "python"
    return str(there) if there.is_file() else None


def install(name: str) -> None:
    from refpeft.conformance.targets.libraries import folder, pip

    home = folder() / name
    if not home.exists():
        venv.create(home, with_pip=True)
    pip([str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *peers.REQUIRES[name]])


def lacking(name: str) -> str:
    how = "pip install 'refpeft[dev]'" if name in peers.HERE else f"python bench/exporters.py --install {name}"
    return f"{name} is not measured: {how}"


# ── exports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(root: Path, shape: str) -> Path:
    """A model of random weights with a tokenizer, and a LoRA adapter for it."""
    import refpeft

    folder = root / shape
    write(str(folder), SHAPES[shape])
    tokenizer(folder)
    model = refpeft.load(folder)
    config = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS[shape].split(), "init_lora_weights": False}
    refpeft.save_adapter(refpeft.init("lora", config, model), root / f"{shape} adapter")
    return folder


def tokenizer(folder: Path) -> None:
    """Without one genai's builder refuses a model."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def command(name: str, folder: Path, out: Path) -> list[str]:
    if name not in OURS:
        return [str(python_of(name)), str(Path(peers.__file__)), name, str(folder), str(out)]
    tuned, options = OURS[name]
    return ours(folder, out, {"graph": "fast", **options}, Path(f"{folder} adapter") if tuned else None)


def ours(folder: Path, out: Path, options: dict[str, Any], adapter: Path | None = None) -> list[str]:
    script = Path(__file__).with_name("ours.py")
    return [sys.executable, str(script), str(folder), str(out), json.dumps(options), *[str(adapter)] * bool(adapter)]


def compiled() -> None:
    """refpeft's modules, as pip compiles those of the others when it installs them."""
    for module in ("refpeft", "refpeft.export", "refpeft.conformance"):
        for folder in find_spec(module).submodule_search_locations:  # type: ignore[union-attr]
            compileall.compile_dir(folder, quiet=1)


def exported(command: Sequence[str], out: Path, graph: str = "model.onnx") -> tuple[float, float]:
    """Of a command: seconds, and the peak of anonymous memory of its process and those that it starts, in MB. What
    others have written is on the disk before, and memory that a virtual machine gave back to its host is fetched again,
    so that nobody waits for that."""
    os.sync()
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0  # macOS does not tell
    np.ones(min(FETCHED, pages * os.sysconf("SC_PAGE_SIZE") // 2), np.uint8)
    start, peak = time.perf_counter(), 0.0
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode or not (out / graph).is_file():
            said.seek(0)
            raise RuntimeError(f"{' '.join(command[:3])} failed: {' '.join(said.read().split())[-300:]}")
    return seconds, peak


def anonymous(pid: int) -> float:
    """Anonymous memory of a process and its children in MB, as Linux counts it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:"))
    except (OSError, StopIteration):  # gone already
        return 0.0
    return own / 1024 + sum(anonymous(int(child)) for child in children)


# ── latency ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def serve(folder: Path, shape: str, threads: int, cpu: bool) -> None:
    """A session that answers each line on standard input, a case and a number of runs, with the seconds of each."""
    import onnxruntime

    clock = time.process_time if cpu else time.perf_counter
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
    adapter, how = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    if (folder / "adapter.onnx_adapter").is_file():
        adapter.Load(str(folder / "adapter.onnx_adapter"))
        how.add_active_adapter(adapter)
    print("ready", flush=True)
    made: dict[str, Any] = {}
    for line in sys.stdin:
        case, runs = line.rstrip().rsplit(" ", 1)
        if case not in made:
            made = {case: feeds(session, SHAPES[shape], *CASES[case])}
            session.run(None, made[case], how)
        seconds = []
        for _ in range(int(runs)):
            begin = clock()
            session.run(None, made[case], how)
            seconds.append(clock() - begin)
        print(json.dumps(seconds), flush=True)


def feeds(session: Any, config: dict[str, Any], b: int, s: int, past: int) -> dict[str, Any]:
    """What a graph of any exporter wants, by the names and ranks of its inputs."""
    rng = np.random.default_rng(0)
    heads = config.get("num_key_value_heads") or config["n_head"]
    width = config.get("head_dim") or config["n_embd"] // config["n_head"]
    whole = {
        "input_ids": rng.integers(3, 20000, (b, s)), "attention_mask": np.ones((b, past + s), np.int64),
        "position_ids": np.tile(np.arange(past, past + s), (b, 1)),
    }  # fmt: skip
    cache = rng.standard_normal((b, heads, past, width), np.float32)
    return {i.name: whole.get(i.name, cache) for i in session.get_inputs()}


class Session:
    """A process with a graph, or several."""

    def __init__(self, words: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise RuntimeError(" ".join(self.process.stderr.read().split())[-300:])
        return line

    def run(self, case: str, runs: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case} {runs}\n")
        self.process.stdin.flush()
        return statistics.median(json.loads(self.answer()))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def repeated(
    measure: Callable[[dict[str, Path]], dict[str, dict[str, list[float]]]], folders: dict[str, Path], processes: int
) -> dict[str, dict[str, list[float]]]:
    """Case → graph → all rounds of all its processes. They are started several times anew, each time in another order:
    which pages of memory one gets makes it up to a tenth slower or faster for as long as it lives."""
    found: dict[str, dict[str, list[float]]] = {}
    names = list(folders)
    for k in range(processes):
        first = k * len(names) // processes
        order = (names[first:] + names[:first])[:: -1 if k % 2 else 1]
        for case, times in measure({name: folders[name] for name in order}).items():
            for name, t in times.items():
                found.setdefault(case, {}).setdefault(name, []).extend(t)
    return found


def latencies(folders: dict[str, Path], shape: str, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Case → graph → milliseconds of every round, in which all take their turn."""
    sessions: dict[str, Session] = {}
    for name, folder in folders.items():
        try:
            words = [sys.executable, __file__, "--serve", str(folder), shape, "--threads", str(options.threads)]
            sessions[name] = Session([*words, *["--cpu"] * options.cpu])
        except RuntimeError as error:
            print(f"{name} is not measured: onnxruntime cannot load its graph: {error}")
    found: dict[str, dict[str, list[float]]] = {}
    try:
        for case, (_, tokens, _) in CASES.items():
            runs, often = (1, 1) if tokens > 1 else (4, OFTEN)
            found[case] = {name: [] for name in sessions}
            for session in sessions.values():
                session.run(case, runs)  # memory is taken, caches are warm
            for _ in range(options.rounds * often):
                for name, session in sessions.items():
                    found[case][name].append(1e3 * session.run(case, runs))
    finally:
        for session in sessions.values():
            session.close()
    return found


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def ratio(case: dict[str, list[float]], a: str, b: str, processes: int) -> tuple[float, float]:
    """a/b, and its error."""
    return middle([x / y for x, y in zip(case[a], case[b], strict=True)], processes)


def against_best(case: dict[str, list[float]], ours: str, others: Sequence[str], processes: int) -> tuple[float, float]:
    """The ratio to the best of the others: in the rounds of each process, to which was best in those of all others."""
    rounds = len(case[ours]) // processes
    ratios: list[float] = []
    for k in range(processes):
        here = slice(k * rounds, (k + 1) * rounds)
        elsewhere = {name: t[: here.start] + t[here.stop :] or t for name, t in case.items()}
        best = min(others, key=lambda name: statistics.median(elsewhere[name]))
        ratios += [x / y for x, y in zip(case[ours][here], case[best][here], strict=True)]
    return middle(ratios, processes)


def latency_figures(shape: str, found: dict[str, dict[str, list[float]]], processes: int) -> Iterator[Figure]:
    for case, times in found.items():
        others = [name for name in times if name not in OURS]
        prefill = case.startswith("prefill")
        at = f"{shape}, {case}"
        if others:
            best = min(others, key=lambda name: statistics.median(times[name]))
            latency = against_best(times, "refpeft", others, processes)
            yield Figure.of(f"{at}: against the best of the others, {best}", latency, LATENCY)
            if prefill:
                latency = against_best(times, "refpeft, last logits", others, processes)
                yield Figure.of(f"{at}, last logits: against the best of the others, {best}", latency, LAST)
        for name in ("refpeft, unmerged LoRA", "refpeft, LoRA as input"):
            what, limit = name.removeprefix("refpeft, "), PREFILL if prefill else DECODE
            yield Figure.of(f"{at}, {what}: against merged", ratio(times, name, "refpeft", processes), limit)
        for name, (float32, limit) in INT4.items() if not prefill else ():
            what = name.removeprefix("refpeft, ")
            yield Figure.of(f"{at}, {what}: against float32", ratio(times, name, float32, processes), limit)


def export_figures(shape: str, found: dict[str, tuple[float, float]]) -> Iterator[Figure]:
    at, tuned = f"{shape}, export", "refpeft, merged LoRA"
    for name, limit in EXPORT_LIMITS.items():
        if name in found:
            yield Figure(f"{at}: time against {name}", found[beside("refpeft", name)][0] / found[name][0], limit)
    if "torch" in found:
        seconds = found[beside(tuned, "torch")][0]
        yield Figure(f"{at}, LoRA merged: time against torch", seconds / found["torch"][0], TUNED_LIMIT)
    yield Figure(f"{at}, LoRA merged: peak anonymous memory", found[tuned][1], TUNED_MEMORY, " MB")
    yield Figure(f"{at}: peak anonymous memory", found["refpeft"][1], MEMORY, " MB")
    yield Figure(f"{at}, linked: peak anonymous memory", found["refpeft, linked"][1], LINKED, " MB")


def beside(ours: str, name: str) -> str:
    return f"{ours}, beside {name}"


def exports(
    folder: Path, shape: str, out: Path, names: Sequence[str]
) -> tuple[dict[str, Path], dict[str, tuple[float, float]]]:
    """Each exporter's graph; seconds and memory of the quickest of its runs, because what other machines on the same
    host do only adds to them. Theirs run as often as ours beside them, taking turns."""
    made: dict[str, Path] = {}
    found: dict[str, list[tuple[float, float]]] = {}

    def run(name: str, as_what: str) -> Path:
        shutil.rmtree(out / as_what, ignore_errors=True)
        found.setdefault(as_what, []).append(exported(command(name, folder, out / as_what), out / as_what))
        return out / as_what

    for name in names:
        if why := UNSUPPORTED.get((name, shape)):
            print(f"{shape}: {name} is not measured: {why}", flush=True)
            continue
        if name not in OURS and python_of(name) is None:
            continue
        try:
            made[name] = run(name, name)
            while name not in OURS:
                for ours in AGAINST:
                    shutil.rmtree(run(ours, beside(ours, name)))  # and with it what the system keeps of it in memory
                if len(found[name]) >= TURNS and sum(seconds for seconds, _ in found[name]) >= WINDOW:
                    break
                run(name, name)
        except RuntimeError as error:
            print(f"{shape}: {error}", flush=True)
    return made, {name: min(runs) for name, runs in found.items()}


def measured(shape: str, root: Path, options: argparse.Namespace, console: Any) -> Iterator[Figure]:
    folder = prepare(root, shape)
    theirs = [] if options.ours else [n for n in peers.EXPORTERS if not (options.latency and n in SLOW)]
    (root / f"{shape} graphs").mkdir()
    made, found = exports(folder, shape, root / f"{shape} graphs", [*OURS, *theirs])
    rows = [[name, f"{s:.2f}", f"{mb:.0f}"] for name, (s, mb) in found.items()]
    console.print(table(f"{shape}: export, whole process", ("", "seconds", "peak anonymous MB"), rows))
    times = repeated(lambda folders: latencies(folders, shape, options), made, options.processes)
    rows = [
        [name, *(f"{statistics.median(t[name]):.2f}" for t in times.values())]
        for name in made
        if name in times["decode 1"]
    ]
    what = "of the processor" if options.cpu else "on onnxruntime"
    rounds = f"medians of {options.processes}×{options.rounds} rounds ({OFTEN} times as many of decode)"
    title = f"{shape}: milliseconds {what}, threads: {options.threads}, {rounds}"
    console.print(table(title, ("", *times), rows))
    yield from export_figures(shape, found)
    yield from latency_figures(shape, times, options.processes)


def conditions(options: argparse.Namespace) -> str:
    """What was measured, and on what."""
    import onnxruntime

    about = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", about.read_text()) if about.is_file() else None
    cpu = named[1] if named else platform.machine()
    return (
        f"On {cpu}, onnxruntime {onnxruntime.__version__}, threads: {options.threads}.\n"
        "Times are ratios ours/theirs. Where there are two numbers they are those of one text and of four; prefill\n"
        "reads 128 tokens, decode one after 128. ± is the error of a median over processes, of which there were\n"
        f"{options.processes}: within it two tie."
    )


def main(options: argparse.Namespace) -> None:
    from rich.console import Console

    if options.write and (options.shape or options.ours or options.latency):
        sys.exit("--write needs all figures, so neither --shape nor --ours nor --latency")
    if options.write and options.write.read_text("utf-8").count(MARK) != 2:
        sys.exit(f"{options.write} must have two lines {MARK.strip()}, and the table goes between them")
    console = Console(width=120)
    missing = [lacking(name) for name in peers.EXPORTERS if python_of(name) is None]
    figures: list[Figure] = []
    compiled()
    with tempfile.TemporaryDirectory() as root:
        for shape in options.shape or SHAPES:
            figures += measured(shape, Path(root), options, console)
    console.print(reached(figures))
    for sentence in missing:
        console.print(f"[red]{sentence}[/]")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "missing": missing}))
    if options.write:
        rewrite(options.write, MARK, f"{conditions(options)}\n\n{summary(figures)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "SHAPE"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--install", choices=peers.REQUIRES, action="append", help="make the environment of an exporter"
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime (default: 1)")
    parser.add_argument("--rounds", type=int, default=2, help="of each process (default: 2)")
    parser.add_argument("--processes", type=int, default=8, help="of each graph, one after another (default: 8)")
    parser.add_argument("--latency", action="store_true", help="without the exporters that take half a minute")
    parser.add_argument("--cpu", action="store_true", help="processor time: for a machine that does other things too")
    parser.add_argument("--ours", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--write", type=Path, metavar="README.md", help="a page with a place for the table of figures")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(Path(chosen.serve[0]), chosen.serve[1], chosen.threads, chosen.cpu)
    elif chosen.install:
        for name in chosen.install:
            install(name)
    else:
        main(chosen)
