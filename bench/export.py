"""Export of GPT-2-small's shape with a LoRA adapter merged, as a whole process: refpeft against torch.onnx.

    python bench/export.py          wall time and peak memory of each, and their ratios

Ours: read the checkpoint and the adapter, merge, write the ONNX folder and check it with onnx's checker (no run on
onnxruntime). Theirs: load the model that is merged already, torch.onnx.export(dynamo=True), written to disk. Each is a
process of its own, imports included; they take turns, and ratios are medians over the rounds.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

LIMIT, LIMIT_MB = 0.08, 200
ROUNDS = 3
CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 12, "n_embd": 768, "n_head": 12,
    "vocab_size": 50257, "n_positions": 1024, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def prepare(root: Path) -> None:
    """Random weights, a LoRA adapter for every c_attn, and the merged model, each in HF format."""
    import refpeft
    from refpeft.checkpoint.families import describe
    from refpeft.model import Model

    d, rng = CONFIG["n_embd"], np.random.default_rng(0)
    shapes = {"wte": (CONFIG["vocab_size"], d), "wpe": (CONFIG["n_positions"], d)}
    shapes |= {"c_attn": (d, 3 * d), "c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d), "attn.c_proj": (d, d)}
    fields, sites, _ = describe(CONFIG)
    params: dict[str, Any] = {}
    for site in sites.values():
        shape = next((s for end, s in shapes.items() if site.path.endswith(end)), (d,))
        if site.weight not in params:
            params[site.weight] = 0.02 * rng.standard_normal(shape, np.float32) + (len(shape) == 1)
        if site.kind in ("conv1d", "layer_norm"):
            params[site.bias] = np.zeros(shape[-1], np.float32)
    model = Model(fields, sites, params, CONFIG)
    config = {"r": 8, "target_modules": ["c_attn"], "init_lora_weights": False, "fan_in_fan_out": True}
    adapter = refpeft.init("lora", config, model)
    refpeft.save(model, root / "model")
    refpeft.save_adapter(adapter, root / "adapter")
    refpeft.save(refpeft.merge(model, adapter), root / "merged")


def ours(root: Path, out: Path) -> None:
    import refpeft
    from refpeft.export import export

    model = refpeft.load(root / "model")
    export(model, refpeft.load_adapter(root / "adapter", model), out, verify=False)


def theirs(root: Path, out: Path) -> None:
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(root / "merged").eval()

    class Logits(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    out.mkdir()
    ids = torch.ones((2, 16), dtype=torch.int64)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=CONFIG["n_positions"])
    shapes = [{0: batch, 1: sequence}] * 2
    inputs = (ids, torch.ones_like(ids))  # apart, or the mask would be the ids
    torch.onnx.export(Logits(), inputs, out / "model.onnx", dynamo=True, dynamic_shapes=shapes, external_data=True)


def worker(engine: str, root: Path, out: Path) -> None:
    peak = watch()
    {"refpeft": ours, "torch": theirs}[engine](root, out)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"anonymous": peak[0], "resident": rss}))


def watch() -> list[float]:
    """The peak of this process's anonymous memory in MB (what is not a map of a file), looked at every 10 ms."""
    peak = [0.0]

    def look() -> None:
        while True:
            with open("/proc/self/smaps_rollup") as file:
                kB = next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))
            peak[0] = max(peak[0], kB / 1024)
            time.sleep(0.01)

    threading.Thread(target=look, daemon=True).start()
    return peak


def run(engine: str, root: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        command = [sys.executable, __file__, "--worker", engine, str(root), str(Path(folder) / "onnx")]
        start = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-2000:]}")
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def main(json_file: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        rounds = [(run("refpeft", root), run("torch", root)) for _ in range(ROUNDS)]

    def median(which: int, what: str) -> float:
        return statistics.median(r[which][what] for r in rounds)

    print(f"Export of GPT-2-small's shape, LoRA merged, whole process, medians of {ROUNDS} rounds (no verification)\n")
    print(f"{'':28}{'refpeft':>10}{'torch.onnx':>12}")
    for what, label in (("seconds", "seconds"), ("anonymous", "peak anonymous MB"), ("resident", "peak resident MB")):
        print(f"{label:28}{median(0, what):10.2f}{median(1, what):12.2f}")
    ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in rounds)
    memory = median(0, "anonymous")
    print(f"\ntime ratio {ratio:.3f} (at most {LIMIT}), peak anonymous memory {memory:.0f} MB (at most {LIMIT_MB})")
    if json_file:
        json_file.write_text(json.dumps({"ratio": ratio, "anonymous_mb": memory, "rounds": rounds}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, metavar=("ENGINE", "ROOT", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    if options.worker:
        engine, *folders = options.worker
        worker(engine, *map(Path, folders))
    else:
        main(options.json)
