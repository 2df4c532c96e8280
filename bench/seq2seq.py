"""Encoder-decoders that write, on onnxruntime: the fast graph against the portable one, and both against optimum's.

    python bench/seq2seq.py [--cpu] [--rounds 4] [--processes 4] [--shape t5-small] [--json FILE]

The shapes of T5-small and BART-base with random weights; two graphs each. Every folder has a process of its own, all
take turns, and a ratio is the median over the rounds; as it is a matter of luck which pages of memory a process gets,
all are started several times anew, each time in another order. The first step makes keys and values of 128 places of
the encoder, decode writes a token after 128 others. One thread; `--cpu` takes the processor's time, for a machine that
does other things too.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.exporters import INT8, Session, command, exported, ours, python_of, ratio, repeated
from bench.figures import Figure, reached, table
from bench.step import write

T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 512, "d_kv": 64, "d_ff": 2048,
    "num_layers": 6, "num_decoder_layers": 6, "num_heads": 8, "vocab_size": 32128, "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "tie_word_embeddings": True,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "is_encoder_decoder": True,
}  # fmt: skip
BART = {
    "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "d_model": 768, "encoder_layers": 6,
    "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072, "vocab_size": 50265, "max_position_embeddings": 1024, "activation_function": "gelu",
    "scale_embedding": False, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "is_encoder_decoder": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"t5-small": T5, "bart-base": BART}
GRAPHS = {
    "fast": {"graph": "fast"}, "portable": {}, "fast, int4": {"graph": "fast", "dtype": "int4", "blocks": INT8},
}  # fmt: skip
ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
CASES = {  # graph, batch, places of the encoder, of the decoder
    "encoder 4×128": (ENCODER, 4, 128, 0), "first step 4": ("first", 4, 128, 0),
    "decode 1": (DECODER, 1, 128, 128), "decode 4": (DECODER, 4, 128, 128),
}  # fmt: skip
AGAINST_PORTABLE, AGAINST_OPTIMUM = 1.05, 1.0  # where the one has little to gain it ties with the other


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def serve(folder: Path, cpu: bool) -> None:
    """Both sessions; answers each line on standard input, a case and a number of runs, with the seconds of each."""
    import onnxruntime

    clock = time.process_time if cpu else time.perf_counter
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = {
        name: onnxruntime.InferenceSession(folder / name, options, ["CPUExecutionProvider"])
        for name in (ENCODER, DECODER)
    }
    config = json.loads((folder / "config.json").read_text())
    print("ready", flush=True)
    for line in sys.stdin:
        case, runs = line.rstrip().rsplit(" ", 1)
        graph, b, t, past = CASES[case]
        session = sessions.get(graph, sessions[DECODER])
        fed = feeds(session, config, b, t, past)
        session.run(None, fed)
        seconds = []
        for _ in range(int(runs)):
            begin = clock()
            session.run(None, fed)
            seconds.append(clock() - begin)
        print(json.dumps(seconds), flush=True)


def feeds(session: Any, c: dict[str, Any], b: int, t: int, past: int) -> dict[str, Any]:
    """What a graph wants, by the names of its inputs: `past` places of the decoder, and all of the encoder if any."""
    rng = np.random.default_rng(0)
    heads = c.get("num_heads") or c["decoder_attention_heads"]
    width, d = c.get("d_kv") or c["d_model"] // heads, c["d_model"]
    whole = {
        "attention_mask": np.ones((b, t), np.int64), "encoder_attention_mask": np.ones((b, t), np.int64),
        "encoder_hidden_states": rng.standard_normal((b, t, d), np.float32),
        "use_cache_branch": np.array([past > 0]),
    }  # fmt: skip
    decodes = any(i.name == "encoder_hidden_states" or "past" in i.name for i in session.get_inputs())
    whole["input_ids"] = rng.integers(3, 20000, (b, 1 if decodes else t))

    def fed(name: str) -> Any:
        if name in whole:
            return whole[name]
        places = 0 if not past else t if ".encoder." in name else past
        return rng.standard_normal((b, heads, places, width), np.float32)

    return {i.name: fed(i.name) for i in session.get_inputs()}


def latencies(folders: dict[str, Path], rounds: int, cpu: bool) -> dict[str, dict[str, list[float]]]:
    """Case → graph → milliseconds of every round."""
    workers = {
        name: Session([sys.executable, __file__, "--serve", str(folder), *["--cpu"] * cpu])
        for name, folder in folders.items()
    }
    found: dict[str, dict[str, list[float]]] = {case: {name: [] for name in folders} for case in CASES}
    try:
        for case, times in found.items():
            runs = 8 if case.startswith("decode") else 2
            for _ in range(rounds):
                for name, worker in workers.items():
                    times[name].append(1e3 * worker.run(case, runs))
    finally:
        for worker in workers.values():
            worker.close()
    return found


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def figures(shape: str, found: dict[str, dict[str, list[float]]], processes: int) -> Iterator[Figure]:
    for case, times in found.items():
        for other, limit in (("portable", AGAINST_PORTABLE), ("optimum", AGAINST_OPTIMUM)):
            if other in times:
                both = ratio(times, "fast", other, processes)
                yield Figure.of(f"{shape}, {case}: fast against {other}", both, limit)


def measured(shape: str, root: Path, options: argparse.Namespace, console: Any) -> list[Figure]:
    model = root / shape
    write(str(model), SHAPES[shape])
    folders = {name: root / f"{shape} {name}" for name in GRAPHS}
    for name, folder in folders.items():
        exported(ours(model, folder, GRAPHS[name]), folder, DECODER)
    if python_of("optimum"):
        folders["optimum"] = root / f"{shape} optimum"
        exported(command("optimum", model, folders["optimum"]), folders["optimum"], DECODER)
    found = repeated(lambda order: latencies(order, options.rounds, options.cpu), folders, options.processes)
    rows = [[name, *(f"{statistics.median(t[name]):.2f}" for t in found.values())] for name in folders]
    rounds = f"{options.processes}×{options.rounds}"
    what = "of the processor" if options.cpu else "on onnxruntime"
    console.print(table(f"{shape}: milliseconds {what}, medians of {rounds} rounds", ("", *CASES), rows))
    return list(figures(shape, found, options.processes))


def main(options: argparse.Namespace) -> None:
    from rich.console import Console

    console, found = Console(width=120), list[Figure]()
    with tempfile.TemporaryDirectory() as root:
        for shape in options.shape or SHAPES:
            found += measured(shape, Path(root), options, console)
    console.print(reached(found))
    if python_of("optimum") is None:
        console.print("[red]optimum is not measured: python bench/exporters.py --install optimum[/]")
    if options.json:
        options.json.write_text(json.dumps({"figures": found}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these (default: all)")
    parser.add_argument("--rounds", type=int, default=4, help="of each process (default: 4)")
    parser.add_argument("--processes", type=int, default=4, help="of each graph, one after another (default: 4)")
    parser.add_argument("--cpu", action="store_true", help="processor time: for a machine that does other things too")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.cpu)
    else:
        main(chosen)
