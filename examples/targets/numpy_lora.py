"""A target that is a program: LoRA on linear layers in NumPy, with no other dependency.

    refpeft check "program:python examples/targets/numpy_lora.py" --method lora --level layer

What a program has to do is in docs/conformance-protocol.md; `lora` below is the implementation under test.
"""

import json
import math
import sys

import numpy as np

INFO = {
    "name": "numpy_lora", "version": "1.0", "levels": ["layer"], "methods": ["lora"],
    "dtypes": ["float32", "float64"], "features": ["forward", "grads", "merge"],
}  # fmt: skip


def lora(config, x, W, A, B, dy, b=None):
    """y = x W′ᵀ + b with W′ = W + s B A: everything a case can want, by the names the protocol gives it."""
    s = config["lora_alpha"] / config["r"]
    bias = 0 if b is None else b
    y = x @ W.T + bias + s * (x @ A.T) @ B.T
    W1 = W + s * B @ A
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    yield "output", {"y": y}
    yield "first_row", {"y_row": y[:1]}
    yield "grads", {"dx": dy @ W1, "dA": s * (drows @ B).T @ rows, "dB": s * drows.T @ (rows @ A.T)}
    yield "merged", {"W_merged": W1, "y_merged": x @ W1.T + bias, **({} if b is None else {"b_merged": b})}


def run(path, out):
    case, arrays = read(path)
    if unknown := sorted(set(case["config"]) - {"r", "lora_alpha"}):
        raise ValueError(f"no idea what {unknown[0]} is")  # better than to do something else than was asked
    answers = dict(lora(case["config"], **arrays))
    write(out, {name: array for wanted in case["want"] for name, array in answers[wanted].items()})
    return {"ok": True}


# ── safetensors: the length of the header in 8 bytes, the header in JSON, the arrays one after the other ─────────────

NAMES = {"F32": np.dtype("float32"), "F64": np.dtype("float64")}


def read(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        case = json.loads(header.pop("__metadata__")["refpeft"])
        arrays = {}
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = NAMES[about["dtype"]]
            data = file.read(math.prod(about["shape"]) * dtype.itemsize)
            arrays[name] = np.frombuffer(bytearray(data), dtype).reshape(about["shape"])
    return case, arrays


def write(path, arrays):
    header, data = {}, b""
    for name, array in arrays.items():
        dtype = next(key for key, dtype in NAMES.items() if dtype == array.dtype)
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)


for line in sys.stdin:
    message = json.loads(line)
    if "stop" in message:
        break
    try:
        reply = INFO if "start" in message else run(message["run"], message["out"])
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), flush=True)
