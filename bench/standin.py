"""What onnxruntime would leave on the CPU on a machine with a GPU, found on one without.

    pip install onnxruntime-gpu            in an environment of its own; its CUDA libraries are not needed
    python -m bench.standin                needs cc and nm; Linux

Where a node runs, whether it has a kernel for these types, which tensors are copied, and which way a kernel takes, is
decided by code that runs on the CPU. The libraries that onnxruntime's CUDA provider is linked with are replaced by ones
of the same names and functions, which allocate and copy in main memory and do nothing else. So every graph is placed
and every run goes its way, but for the numbers: what comes out is nonsense, and is not looked at.

Exit code 0: nothing that computes stays on the CPU. 1: something does, or cannot run. 2: it could not be asked.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FAMILIES, DTYPES = ("gpt2", "llama", "bert", "t5"), ("float32", "float16", "bfloat16", "int4")
PROVIDER = "capi/libonnxruntime_providers_cuda.so"
UNVERSIONED = "libcuda.so.1"
ALLOCATE = "*p = aligned_alloc(256, (n / 256 + 1) * 256); return 0;"
BODIES = {  # of what answers more than "success"; a GPU of compute capability 9.0 with 8 GB
    "cudaMalloc": ("int", "void **p, size_t n", ALLOCATE),
    "cudaMallocHost": ("int", "void **p, size_t n", ALLOCATE),
    "cudaHostAlloc": ("int", "void **p, size_t n, unsigned f", ALLOCATE),
    "cudaMallocFromPoolAsync": ("int", "void **p, size_t n, void *a, void *b", ALLOCATE),
    "cudaFree": ("int", "void *p", "free(p); return 0;"),
    "cudaFreeHost": ("int", "void *p", "free(p); return 0;"),
    "cudaFreeAsync": ("int", "void *p, void *s", "free(p); return 0;"),
    "cudaMemcpy": ("int", "void *d, void *s, size_t n, int k", "memcpy(d, s, n); return 0;"),
    "cudaMemcpyAsync": ("int", "void *d, void *s, size_t n, int k, void *t", "memcpy(d, s, n); return 0;"),
    "cudaMemset": ("int", "void *d, int v, size_t n", "memset(d, v, n); return 0;"),
    "cudaMemsetAsync": ("int", "void *d, int v, size_t n, void *t", "memset(d, v, n); return 0;"),
    "cudaMemGetInfo": ("int", "size_t *a, size_t *b", "*a = *b = 8ul << 30; return 0;"),
    "cudaGetDeviceCount": ("int", "int *n", "*n = 1; return 0;"),
    "cudaGetDevice": ("int", "int *n", "*n = 0; return 0;"),
    "cudaDriverGetVersion": ("int", "int *n", "*n = 13000; return 0;"),
    "cudaRuntimeGetVersion": ("int", "int *n", "*n = 13000; return 0;"),
    "cudaGetErrorString": ("const char *", "int e", 'return "";'),
    "cudaGetErrorName": ("const char *", "int e", 'return "";'),
    "cublasGetStatusName": ("const char *", "int e", 'return "";'),
    "cublasGetStatusString": ("const char *", "int e", 'return "";'),
    "cudaDeviceGetAttribute": (
        "int", "int *v, int a, int d",
        "*v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 100 : a == 97 ? 200000 : a == 1 ? 1024 : a == 10 ? 32 : 1; "
        "return 0;",
    ),
    "cudaGetDeviceProperties": (  # the fields at their places in CUDA 13's cudaDeviceProp
        "int", "char *p, int d",
        "memset(p, 0, 700); *(size_t *)(p + 288) = 8ul << 30; *(size_t *)(p + 296) = 49152; *(int *)(p + 304) = 65536; "
        "*(int *)(p + 308) = 32; *(int *)(p + 320) = *(int *)(p + 324) = *(int *)(p + 328) = 1024; "
        "*(int *)(p + 332) = 64; *(int *)(p + 336) = 2147483647; *(int *)(p + 340) = *(int *)(p + 344) = 65535; "
        "*(size_t *)(p + 352) = 65536; *(int *)(p + 360) = 9; *(int *)(p + 384) = 100; return 0;",
    ),
    "cudaStreamCreate": ("int", "void **p", "*p = malloc(16); return 0;"),
    "cudaStreamCreateWithFlags": ("int", "void **p, unsigned f", "*p = malloc(16); return 0;"),
    "cudaEventCreate": ("int", "void **p", "*p = malloc(16); return 0;"),
    "cudaEventCreateWithFlags": ("int", "void **p, unsigned f", "*p = malloc(16); return 0;"),
    "cudaStreamIsCapturing": ("int", "void *s, int *c", "*c = 0; return 0;"),
    "cudaPointerGetAttributes": ("int", "int *a, void *p", "memset(a, 0, 24); *a = 2; return 0;"),
    "cudaGetDriverEntryPointByVersion": (
        "int", "char *n, void **p, unsigned v, unsigned long f, int *s", "*p = 0; if (s) *s = 1; return 0;",
    ),
    "cublasCreate_v2": ("int", "void **p", "*p = malloc(16); return 0;"),
    "cublasLtCreate": ("int", "void **p", "*p = malloc(16); return 0;"),
    "cublasGetMathMode": ("int", "void *h, int *m", "*m = 0; return 0;"),
    "__cudaRegisterFatBinary": ("void **", "void *p", "static void *x; return &x;"),
}  # fmt: skip


def build(provider: Path, folder: Path) -> None:
    """The libraries that the provider is linked with, each with the functions that it wants of it."""
    said = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True).stdout
    wanted = defaultdict[str, list[str]](list, {UNVERSIONED: [], "libcurand.so.10": []})
    for symbol in (line.split()[-1] for line in said.splitlines()):
        name, _, library = symbol.partition("@")
        if library.startswith("libcu") or (not library and name.startswith("cu")):
            wanted[library or UNVERSIONED].append(name)
    for library, names in wanted.items():
        code = "#include <stdlib.h>\n#include <string.h>\n" + "".join(map(function, names))
        (folder / "code.c").write_text(code)
        (folder / "names.map").write_text(f"{library} {{ global: *; }};\n")
        versions = [] if library == UNVERSIONED else [f"-Wl,--version-script={folder / 'names.map'}"]
        made = ["-shared", "-fPIC", "-w", "-o", folder / library, folder / "code.c", f"-Wl,-soname,{library}"]
        subprocess.run(["cc", *made, *versions], check=True)


def function(name: str) -> str:
    kind, arguments, body = BODIES.get(name, ("int", "", "return 0;"))
    return f"{kind} {name}({arguments}) {{ {body} }}\n"


# ── with them ────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows() -> Iterator[tuple[list[str], bool]]:
    """What is said of an export, and whether it is well."""
    from bench.gpu import SMALL, model, possible
    from refpeft.export.forms import FORMS

    for family in FAMILIES:
        base = model(family, SMALL)
        for form in FORMS:
            for decode in (False, True):
                for dtype in (d for d in DTYPES if possible(family, form, d, decode)):
                    with tempfile.TemporaryDirectory() as folder:
                        said, well = one(base, form, dtype, decode, Path(folder) / "out")
                    yield [family, form, dtype, "✓" * decode, *said], well


def one(base: Any, form: str, dtype: str, decode: bool, out: Path) -> tuple[list[str], bool]:
    from bench.gpu import adapter
    from refpeft.export import devices, precision, runtime
    from refpeft.export.form import Subject
    from refpeft.export.forms import FORMS
    from refpeft.export.program import export

    own = [adapter(form, base)]
    export(base, own, out, form, dtype, decode=decode, verify=False)
    lacking, on_cpu, nodes, copies = Counter[str](), Counter[str](), 0, 0
    for path in runtime.graphs(out):
        found = devices.placement(runtime.session(path), path)
        on_cpu.update(found.on_cpu)
        lacking.update(found.lacking)
        nodes += found.nodes
        copies += devices.copies(runtime.require(), path)
    subject, said = Subject(base, own, precision.DTYPES[dtype], decode, precision=precision.precision(dtype)), "runs"
    try:
        FORMS[form].checks(subject)[-1].ask(runtime.open_graph(out))
    except ValueError as error:
        said = str(error).split("Status Message: ")[-1]
    counts = [str(nodes), devices.listed(on_cpu), devices.listed(lacking), str(copies), said]
    return counts, not lacking and said == "runs"


def inside() -> int:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from refpeft.export import runtime

    if not runtime.offered():
        raise ValueError("onnxruntime does not take CUDA, not even with stand-ins for its libraries")
    table = Table("model", "form", "dtype", "decodes", "nodes", "on CPU", "that compute", "copies", "a run",
                  title=f"onnxruntime-gpu {runtime.require().__version__}, placed without a GPU")  # fmt: skip
    ill = 0
    with np.errstate(all="ignore"):
        for cells, well in rows():
            table.add_row(*cells)
            ill += not well
    Console(width=160).print(table)
    return 1 if ill else 0


def main() -> int:
    found = importlib.util.find_spec("onnxruntime")
    provider = Path(found.origin or "").parent / PROVIDER if found else Path(PROVIDER)
    if not provider.is_file():
        print("standin: needs onnxruntime-gpu, for Linux: pip install onnxruntime-gpu", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        build(provider, Path(folder))
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "import sys; from bench.standin import inside; sys.exit(inside())",
        ]
        return subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": folder}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
