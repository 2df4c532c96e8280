"""llama.cpp's C library, by ctypes, as far as it takes to load a model and adapters and to read logits.

The library is the one that the npm package node-llama-cpp brings, built by its authors. Parameters are structures that
are passed by value: of those only the first fields are named here, and the rest is as the library itself filled it.
"""

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.ops import Array

MODULES = Path(sys.prefix) / "node_modules"
PACKAGE = MODULES / "node-llama-cpp"
BINARIES = MODULES / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
REST = 512  # bytes behind the fields that are named: more than the library has
F32 = 0  # GGML_TYPE_F32
NO_FLASH = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
ERROR = 4  # GGML_LOG_LEVEL_ERROR


class ModelParams(ctypes.Structure):
    _fields_ = [("devices", c_void_p), ("overrides", c_void_p), ("rest", c_int8 * REST)]


class ContextParams(ctypes.Structure):
    _fields_ = [
        *[(n, c_uint32) for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs", "per_seq")],
        *[(n, c_int32) for n in ("n_threads", "n_threads_batch", "kind", "rope", "pooling", "attention", "flash")],
        *[(n, c_float) for n in ("freq_base", "freq_scale", "ext", "attn", "fast", "slow")],
        ("yarn_orig", c_uint32), ("defrag", c_float), ("eval", c_void_p), ("eval_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("rest", c_int8 * REST),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # name without llama_ → result, arguments
    "backend_init": (None, []),
    "log_set": (None, [LOG, c_void_p]),
    "model_default_params": (ModelParams, []),
    "model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "model_free": (None, [c_void_p]),
    "context_default_params": (ContextParams, []),
    "init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "free": (None, [c_void_p]),
    "adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "batch_free": (None, [Batch]),
    "decode": (c_int32, [c_void_p, Batch]),
    "get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "get_memory": (c_void_p, [c_void_p]),
    "memory_clear": (None, [c_void_p, ctypes.c_bool]),
}
said: list[str] = []  # what the library said last, a sentence that it could not go on


def log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        said.append(text.decode(errors="replace").strip())


LISTENER = LOG(log)  # kept, for the library holds on to it


@cache
def scripts() -> Path:
    """llama.cpp's own scripts, from the bundle of its repository in the npm package, and its `gguf` with them."""
    home = Path(sys.prefix) / "share" / "llama.cpp"
    bundle = PACKAGE / "llama" / "gitRelease.bundle"
    if not bundle.is_file():
        raise ModuleNotFoundError(f"{bundle}: no such file", name="node-llama-cpp")
    if not home.is_dir():
        quiet = ["-c", "advice.detachedHead=false", "clone", "--quiet"]
        subprocess.run(["git", *quiet, str(bundle), str(home)], check=True)
    sys.path[:0] = [str(home), str(home / "gguf-py")]
    return home


@cache
def library() -> dict[str, Any]:
    """The functions, by name without `llama_`."""
    found = next(iter(BINARIES.glob("libllama.*so*")), None)
    if found is None:
        raise ModuleNotFoundError(f"{BINARIES}: no libllama", name="node-llama-cpp")
    ggml = next(BINARIES.glob("libggml.*so*"))
    backends = ctypes.CDLL(str(ggml), mode=ctypes.RTLD_GLOBAL).ggml_backend_load_all_from_path
    backends.argtypes = [c_char_p]
    dll, functions = ctypes.CDLL(str(found)), {}
    for name, (result, arguments) in FUNCTIONS.items():
        functions[name] = getattr(dll, "llama_" + name)
        functions[name].restype, functions[name].argtypes = result, arguments
    functions["log_set"](LISTENER, None)
    backends(str(BINARIES).encode())
    functions["backend_init"]()
    return functions


def demand(made: Any, what: str) -> Any:
    """What was made, or the sentence in which the library says why not."""
    if not made:
        raise ValueError(said[-1] if said else f"llama.cpp could not load {what} and does not say why")
    return made


class Llama:
    """A model of a GGUF file with adapters, each of a file; numbers are float32, those it keeps while decoding too."""

    def __init__(self, file: Path, n_ctx: int) -> None:
        self.c = library()
        said.clear()
        self.model = demand(self.c["model_load_from_file"](str(file).encode(), self.c["model_default_params"]()), "it")
        params = self.c["context_default_params"]()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 1
        params.flash, params.type_k, params.type_v = NO_FLASH, F32, F32
        self.context = demand(self.c["init_from_model"](self.model, params), "the model")
        self.adapters: dict[str, Any] = {}

    def load(self, name: str, file: Path) -> None:
        said.clear()
        self.adapters[name] = demand(self.c["adapter_lora_init"](self.model, str(file).encode()), "the adapter")

    def activate(self, names: Sequence[str]) -> None:
        n = len(names)
        handles = (c_void_p * n)(*[self.adapters[name] for name in names])
        if code := self.c["set_adapters_lora"](self.context, handles, n, (c_float * n)(*[1.0] * n)):
            raise ValueError(f"llama_set_adapters_lora ended with {code}")

    def logits(self, ids: Array, vocab: int, steps: int = 1) -> Array:
        """[s] → [s, v], all at once or in several steps."""
        self.c["memory_clear"](self.c["get_memory"](self.context), True)
        found = []
        for part in np.array_split(np.arange(len(ids)), steps):
            found += self.decode(ids, part, vocab)
        return np.stack(found)

    def decode(self, ids: Array, places: Array, vocab: int) -> list[Array]:
        n = len(places)
        batch = self.c["batch_init"](n, 0, 1)
        batch.n_tokens = n
        for k, place in enumerate(places):
            batch.token[k], batch.pos[k] = int(ids[place]), int(place)
            batch.n_seq_id[k], batch.seq_id[k][0], batch.logits[k] = 1, 0, 1
        try:
            if code := self.c["decode"](self.context, batch):
                raise ValueError(f"llama_decode ended with {code}")
            return [np.ctypeslib.as_array(self.c["get_logits_ith"](self.context, k), (vocab,)).copy() for k in range(n)]
        finally:
            self.c["batch_free"](batch)

    def close(self) -> None:
        self.c["free"](self.context)
        self.c["model_free"](self.model)
