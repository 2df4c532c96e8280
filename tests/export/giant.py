"""A LLaMA of 7 billion parameters that takes no room: sparse files, of which only the first bytes of each tensor are
written. Run as a program, it exports one and prints how much memory that took:

    python -m tests.export.giant MODEL OUT FORM DTYPE [link|inside]
"""

import json
import math
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.checkpoint.families import plan

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
SHARD = 5_000_000_000
FIRST = 1000  # numbers of each tensor that are not zero


def make(folder: Path, dtype: Any, config: dict[str, Any] = CONFIG, shard: int = SHARD) -> Path:
    """The checkpoint, in files of at most `shard` bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard
    for name, shape in plan(config).shapes.items():
        need = math.prod(shape) * np.dtype(dtype).itemsize
        if need > room and files[-1]:
            files.append({})
            room = shard
        room -= need
        files[-1][name] = shape
    names = [f"model-{k + 1:05d}-of-{len(files):05d}.safetensors" for k in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        write(folder / name, tensors, np.dtype(dtype))
    weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write(file: Path, tensors: dict[str, tuple[int, ...]], dtype: "np.dtype[Any]") -> None:
    header, at = {}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        kind = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}[dtype.name]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for k, (name, shape) in enumerate(tensors.items()):
            f.seek(8 + len(raw) + header[name]["data_offsets"][0])
            f.write(np.random.default_rng(k).normal(size=min(FIRST, math.prod(shape))).astype(dtype).tobytes())
        f.truncate(8 + len(raw) + at)


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def peak(f: Any) -> tuple[int, int]:
    """How much f takes at most beside files, looked up every millisecond: above what was there before, and in all."""
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        f()
    finally:
        done.set()
        watcher.join()
    return max(0, most[0] - before), most[0]


def main(model: str, out: str, form: str, dtype: str, *rest: str) -> None:
    import refpeft
    from refpeft.export.program import export

    def run() -> None:
        base = refpeft.load(model)
        names = ["c_attn"] if base.config.family == "gpt2" else ["q_proj", "v_proj"]
        targets = {"r": 8, "target_modules": names, "init_lora_weights": False}
        few = {} if form != "merged" else {"layers_to_transform": [base.config.num_layers - 1]}
        adapter = refpeft.init("lora", targets | few, base)
        how: dict[str, Any] = {"link": "link" in rest, "external": False if "inside" in rest else None}
        export(base, adapter, out, form, dtype, verify=False, source=model, decode=True, **how)

    start = time.perf_counter()
    above, whole = peak(run)
    print(json.dumps({"above": above, "whole": whole, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
