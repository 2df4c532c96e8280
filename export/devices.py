"""CUDA: does it work here, and what of a graph runs on it?

onnxruntime-gpu offers CUDA on every machine, and falls back to the CPU without a word where it cannot have it. So it is
tried on one number first, and if it fails it is looked up what is missing.

Nor does it object when it has no CUDA kernel for a node, and runs that on the CPU. A few nodes belong there: those that
reckon with shapes. What computes with the numbers of a model does not.
"""

import contextlib
import ctypes
import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
OPTIONS = {"use_tf32": "0"}  # float32 means float32
RECORD = "session.record_ep_graph_assignment_info"
DRIVER = "libcuda.so.1"
LIBRARIES = ("libcudart.so.{0}", "libcublas.so.{0}", "libcublasLt.so.{0}", "libcurand.so.10")
COPIES = ("MemcpyToHost", "MemcpyFromHost")
FATAL, WARNING = 4, 2


# ── does it work? ────────────────────────────────────────────────────────────────────────────────────────────────────


def trouble(ort: Any) -> str:
    """Why CUDA does not work, "" if it does. onnxruntime must offer it."""
    said = ""
    with silence(ort):
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA's libraries from the nvidia wheels, where those are installed
        try:
            probe = ort.InferenceSession(twice(), providers=[(CUDA, OPTIONS), CPU], enable_fallback=0)
            probe.run(None, {"x": np.ones(1, np.float32)})
            if probe.get_providers()[0] == CUDA:
                return ""
        except Exception as error:  # of types of its own
            said = gist(str(error))
    return missing(ort) or (f"it says: {said}" if said else "it does not say why; nvidia-smi may say more")


def gist(message: str) -> str:
    """What CUDA said, without the C++ around it."""
    line = " ".join(message.split())
    found = re.search(r"CUDA (?:failure|error)[^;]*", line)
    return (found[0].strip() if found else line)[:300]


def missing(ort: Any) -> str:
    """Which libraries cannot be loaded."""
    major = str(getattr(ort, "cuda_version", "")).split(".")[0]
    names = [name.format(major) for name in LIBRARIES] if major else []
    absent = [name for name in names if not loads(name)]
    found = [] if loads(DRIVER) else [f"NVIDIA driver ({DRIVER})"]
    if absent:
        found.append(f"CUDA {major} ({', '.join(absent)}), which pip install 'refpeft[gpu]' brings")
    return " and ".join(found) and f"there is no {' and no '.join(found)}"


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def silence(ort: Any) -> Iterator[None]:
    """What onnxruntime prints of libraries that it misses would stand among our own output."""
    ort.set_default_logger_severity(FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(WARNING)


def twice() -> bytes:
    """A graph of one node, x + x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


# ── what runs on it? ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Placement:
    """Of how many nodes a session has, the operators of those that are on the CPU; and of those the ones that compute
    with numbers of the model, not with shapes."""

    nodes: int
    on_cpu: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, int] = field(default_factory=dict)


def placement(session: Any, path: Path) -> Placement:
    """Of a session that was made with RECORD, for the graph in this file."""
    nodes = [(part.ep_name, node) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    stayed = [node for provider, node in nodes if provider != CUDA]
    whole = integers(path) if stayed else frozenset()
    lacking = Counter(node.op_type for node in stayed if node.name not in whole)
    return Placement(len(nodes), dict(Counter(node.op_type for node in stayed)), dict(lacking))


def integers(path: Path) -> frozenset[str]:
    """The names of the nodes that answer integers or truth values only."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    whole = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
    return frozenset(n.name for n in graph.node if all(types.get(name) in whole for name in n.output if name))


def copies(ort: Any, path: Path) -> int:
    """How many tensors a run carries between CPU and GPU, besides inputs and outputs: nodes that onnxruntime adds."""
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "placed.onnx")
        ort.InferenceSession(str(path), options, [(CUDA, OPTIONS), CPU], enable_fallback=0)
        placed = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return sum(node.op_type in COPIES for node in placed.graph.node)


def listed(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(operators.items()))
