"""A tool that merges LoRA adapters, on purpose wrongly: NumPy and the safetensors library, nothing of refpeft.

It reads an HF folder and HF peft adapter folders and writes a merged folder. `MISTAKES` are what it can do wrong, each
one that some tool has shipped with, or well could.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]
PREFIX = "base_model.model."

MISTAKES = {  # name → what refpeft calls it: verdict, and words that must be in what it says
    "root": ("scaled", "α/√r in place of α/r"),
    "squared": ("scaled", "applied twice (s²)"),
    "unscaled": ("scaled", "s = α/r = 1.5 left out"),
    "no alpha": ("scaled", "left out of s"),
    "subtracted": ("scaled", "subtracted"),
    "twice": ("scaled", "applied twice"),
    "tenth": ("scaled", "no known mistake"),
    "not applied": ("base", "not applied"),
    "layer forgotten": ("base", "not applied"),
    "delta transposed": ("transposed", "ΔW was added transposed"),
    "transposed": ("transposed", "transpose"),
    "another adapter": ("differs", ""),
    "half precision": ("coarse", "bfloat16"),
    "half factors": ("coarse", "as if ΔW had been computed in bfloat16"),
    "nan": ("not finite", "1 of"),
    "cut": ("shape", "expected shape"),
    "integers": ("dtype", "expected floats"),
    "missing": ("missing", "expected of shape"),
    "extra": ("extra", "the base has no tensor"),
    "left in": ("extra", "an adapter's own tensor"),
    "another base": ("foreign", "differs from the base's"),
    "norm scaled": ("foreign", "0.5 times it"),
    "rank one": ("foreign", "a change of rank 1"),
}


def merge(base: Path, adapters: Sequence[Path], out: Path, mistake: str = "", dtype: Any = None) -> Path:
    """Merge, with one mistake."""
    tensors = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    rng = np.random.default_rng(1)
    own = sorted({n for a in adapters for n in modules(a)})
    for folder in adapters:
        for n, (path, (A, B)) in enumerate(modules(folder).items()):
            if mistake == "not applied" or (mistake == "layer forgotten" and n == 0):
                continue
            if mistake == "another adapter":
                A, B = rng.permutation(A.ravel()).reshape(A.shape), rng.permutation(B.ravel()).reshape(B.shape)
            if mistake == "half factors":
                A, B = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (A, B))
            add(tensors, path + ".weight", A, B, settings(folder), mistake, config["model_type"] == "gpt2")
    after(tensors, own, mistake, rng)
    if mistake == "half precision":
        tensors = {n: v.astype(ml_dtypes.bfloat16).astype(v.dtype) for n, v in tensors.items()}
    out.mkdir()
    shutil.copyfile(base / "config.json", out / "config.json")
    cast = {n: v if dtype is None or v.dtype.kind == "i" else v.astype(dtype) for n, v in tensors.items()}
    save_file({n: np.ascontiguousarray(v) for n, v in cast.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def modules(folder: Path) -> dict[str, tuple[Array, Array]]:
    """Module → A [r, i], B [o, r]."""
    found = load_file(folder / "adapter_model.safetensors")
    paths = sorted(n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in found if n.endswith("lora_A.weight"))
    return {p: (found[f"{PREFIX}{p}.lora_A.weight"], found[f"{PREFIX}{p}.lora_B.weight"]) for p in paths}


def add(tensors: dict[str, Array], name: str, A: Array, B: Array, c: dict[str, Any], mistake: str, conv: bool) -> None:
    r, α = len(A), c["lora_alpha"]
    s = α / math.sqrt(r) if c["use_rslora"] else α / r
    k = {
        "root": math.sqrt(r), "squared": s, "unscaled": 1 / s, "no alpha": 1 / α, "subtracted": -1.0, "twice": 2.0,
        "tenth": 0.1,
    }.get(mistake, 1.0)  # fmt: skip
    W = tensors[name]
    Δ = (k * s * (B @ A)).astype(np.float32)
    if conv != (mistake == "delta transposed" and Δ.shape == Δ.T.shape):
        Δ = Δ.T
    tensors[name] = (W.astype(np.float32) + Δ).astype(W.dtype)


def after(tensors: dict[str, Array], own: list[str], mistake: str, rng: np.random.Generator) -> None:
    """Mistakes with whole tensors."""
    adapted = own[0] + ".weight"
    other = next(n for n in sorted(tensors, reverse=True) if n[: -len(".weight")] not in own and tensors[n].ndim == 2)
    norm = next(n for n in sorted(tensors) if "norm" in n.lower() or "ln_" in n)
    W = tensors[adapted]
    if mistake == "transposed":
        tensors[adapted] = W.T
    elif mistake == "nan":
        tensors[adapted] = W.copy()
        tensors[adapted][1, 2] = np.nan
    elif mistake == "cut":
        tensors[adapted] = W[:-1, :-1]
    elif mistake == "integers":
        tensors[adapted] = (127 * W.astype(np.float32)).astype(np.int8)
    elif mistake == "missing":
        del tensors[adapted]
    elif mistake == "extra":
        tensors["model.something.weight"] = W
    elif mistake == "left in":
        tensors[own[0] + ".lora_A.default.weight"] = W
    elif mistake == "another base":
        tensors[other] = (tensors[other] + rng.normal(size=tensors[other].shape)).astype(W.dtype)
    elif mistake == "norm scaled":
        tensors[norm] = (tensors[norm].astype(np.float32) / 2).astype(W.dtype)
    elif mistake == "rank one":
        u, v = (rng.normal(size=n) for n in tensors[other].shape)
        tensors[other] = (tensors[other] + np.outer(u, v)).astype(W.dtype)
