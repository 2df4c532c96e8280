"""Devices: CUDA is tried before it is used, nothing falls back without a word, and runs that are bound are runs."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

import refpeft
from refpeft.cli import app
from refpeft.export import devices, runtime
from refpeft.export.devices import CPU, CUDA
from refpeft.export.generation import Options, open_writer, write
from refpeft.export.program import export
from tests.export.gpu import TERSE, FakeRuntime
from tests.models import tiny


def install(fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...] = ()) -> FakeRuntime:
    monkeypatch.setattr(runtime, "require", lambda: fake)
    monkeypatch.setattr(devices, "loads", lambda library: library not in absent)
    return fake


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = reshape(x, shape(x) + 0): one node computes, and two that reckon with shapes."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Add", ["s", "zero"], ["t"], "sum"),
        helper.make_node("Mul", ["x", "x"], ["z"], "square"),
        helper.make_node("Reshape", ["z", "t"], ["y"], "back"),
    ]
    zero = helper.make_tensor("zero", TensorProto.INT64, [2], [0, 0])
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [zero]), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    onnx.save(made, str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


# ── does it work? ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_on_cuda(graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """TF32 is off, onnxruntime's own ways to fall back too; its loader's words do not stand among ours."""
    fake = install(FakeRuntime(), monkeypatch)
    for device in (None, "cuda"):
        made = runtime.session(graph, device)
        assert made.asked["providers"] == [(CUDA, {"use_tf32": "0"}), CPU]
        assert made.asked["fallback"] == 0
        assert runtime.provider(made) == CUDA
    assert runtime.session(graph, "cpu").asked["providers"] == [CPU]
    assert fake.preloaded == 2, "nothing of CUDA is loaded where the CPU is asked for"
    assert fake.severities == [devices.FATAL, devices.WARNING] * 2
    assert capsys.readouterr().out == ""


MISSING: dict[str, tuple[FakeRuntime, tuple[str, ...], str]] = {
    "the CPU's wheel": (FakeRuntime(offers=False), (), r"does not offer: pip uninstall onnxruntime, then pip install"),
    "the driver": (
        FakeRuntime(works=False), ("libcuda.so.1",),
        r"onnxruntime-gpu 1\.31\.1 cannot use it: there is no NVIDIA driver \(libcuda\.so\.1\)$",
    ),
    "libraries": (
        FakeRuntime(works=False), ("libcudart.so.13", "libcublas.so.13"),
        r"there is no CUDA 13 \(libcudart\.so\.13, libcublas\.so\.13\), which pip install 'refpeft\[gpu\]' brings$",
    ),
    "both": (
        FakeRuntime(raises="no"), ("libcuda.so.1", "libcurand.so.10"),
        r"there is no NVIDIA driver \(libcuda\.so\.1\) and no CUDA 13 \(libcurand\.so\.10\), which pip install",
    ),
    "a GPU": (
        FakeRuntime(raises=TERSE.format("100: no CUDA-capable device is detected")), (),
        "cannot use it: it says: CUDA failure 100: no CUDA-capable device is detected$",
    ),
    "it does not say": (FakeRuntime(works=False, cuda_version=""), (), "does not say why; nvidia-smi may say more$"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_said(what: str, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If CUDA was asked for; else the CPU is taken, and onnxruntime not even asked for CUDA."""
    fake, absent, words = MISSING[what]
    install(fake, monkeypatch, absent)
    with pytest.raises(ValueError, match=words):
        runtime.session(graph, "cuda")
    assert runtime.session(graph).asked["providers"] == [CPU]
    with pytest.raises(ValueError, match="must be cpu or cuda, found 'tpu'"):
        runtime.session(graph, "tpu")


@pytest.mark.ort
def test_a_real_onnxruntime_without_cuda_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of this machine, told that there is neither driver nor library."""
    ort = runtime.require()
    monkeypatch.setattr(devices, "loads", lambda library: False)
    made = ort.InferenceSession

    def refused(graph: Any, options: Any = None, providers: Any = (), **more: Any) -> Any:
        return made(graph, options, [CPU], **more)

    monkeypatch.setattr(ort, "InferenceSession", refused)
    assert devices.trouble(ort).startswith("there is no NVIDIA driver")


@pytest.mark.ort
def test_a_device_that_is_not_there_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With either wheel, on any machine: before a weight is written, or a folder read."""
    model = tiny("gpt2", "LMHeadModel", dtype=np.float32)
    refpeft.save(model, tmp_path / "model")
    assert export(model, None, tmp_path / "here", device="cpu", decode=True).provider == CPU
    ort = runtime.require()
    monkeypatch.setattr(devices, "trouble", lambda ort: "there is no NVIDIA driver (libcuda.so.1)")
    monkeypatch.setattr("refpeft.export.program.traced", lambda *args: pytest.fail("work was begun"))
    monkeypatch.setattr("refpeft.export.card.whole", lambda *args: pytest.fail("the folder was read"))
    for offers, words in (([CPU], "does not offer"), ([CUDA, CPU], "cannot use it: there is no NVIDIA driver")):
        monkeypatch.setattr(ort, "get_available_providers", lambda offers=offers: offers)
        with pytest.raises(ValueError, match=words):
            export(model, None, tmp_path / "out", device="cuda")
        with pytest.raises(ValueError, match=words):
            open_writer(tmp_path / "here", device="cuda")
        command = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--device", "cuda"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert "refpeft: CUDA was asked for, and" in done.stderr.replace("which this", "and")
        assert words in done.stderr
        done = CliRunner().invoke(app, [*command, "--no-verify"])
        assert (done.exit_code, "device says where an export is verified" in done.stderr) == (2, True)
        assert not (tmp_path / "out").exists()


# ── what runs on it? ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_nodes_without_a_kernel_are_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If CUDA was asked for. Those that reckon with shapes belong on the CPU; names that the graph does not have are
    of nodes that were fused, so they compute."""
    shapes = [("sum", "Add"), ("shape", "Shape")]
    install(FakeRuntime(stays=shapes), monkeypatch)
    found = devices.placement(runtime.session(graph, "cuda"), graph)
    assert found == devices.Placement(3, {"Add": 1, "Shape": 1}, {})
    install(FakeRuntime(stays=[*shapes, ("square", "Mul"), ("fused", "Gelu")]), monkeypatch)
    with pytest.raises(ValueError, match=r"onnxruntime 1\.31\.1 has no CUDA kernel for 1 Gelu, 1 Mul of .*model\.onnx"):
        runtime.session(graph, "cuda")
    made = runtime.session(graph)
    runner = runtime.Runner(graph.parent, made)
    assert runtime.on_cpu(runner) == {"Add": 1, "Shape": 1, "Mul": 1, "Gelu": 1}
    assert runtime.on_cpu(runtime.Runner(graph.parent, runtime.session(graph, "cpu"))) == {}


@pytest.mark.ort
def test_placement_of_a_real_session(graph: Path, tmp_path: Path) -> None:
    """onnxruntime's own record of it. On the CPU all nodes are there; which of them compute is seen by their types."""
    found = devices.placement(runtime.session(graph, "cpu"), graph)
    assert set(found.lacking) == {"Mul", "Reshape"}
    assert found.nodes == sum(found.on_cpu.values())
    export(tiny("gpt2", "LMHeadModel", dtype=np.float32), None, tmp_path / "out", decode=True)
    path = tmp_path / "out" / "model.onnx"
    found = devices.placement(runtime.session(path, "cpu"), path)
    assert found.lacking["Attention"] == found.on_cpu["Attention"] == 2
    assert found.on_cpu["Shape"] >= 1
    assert "Shape" not in found.lacking
    assert found.lacking.get("Reshape", 0) < found.on_cpu["Reshape"]


def test_copies_are_counted(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node(op, ["x"], [op]) for op in ("MemcpyToHost", "Mul", "MemcpyFromHost")]
    wrote = helper.make_model(helper.make_graph(nodes, "g", [], [])).SerializeToString()
    assert devices.copies(FakeRuntime(wrote=wrote), graph) == 2


@pytest.mark.ort
def test_what_stayed_on_the_cpu_is_shown_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refpeft.save(tiny("gpt2", "LMHeadModel", dtype=np.float32), tmp_path / "model")
    monkeypatch.setattr(runtime, "on_cpu", lambda runner: {"Reshape": 3, "Add": 1})
    done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "On the CPU stayed 1 Add, 3 Reshape." in done.stdout
    assert '"on_cpu": {\n    "Reshape": 3' in (tmp_path / "out" / "refpeft.json").read_text()


# ── bound runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ort
@pytest.mark.parametrize(("family", "architecture"), [("gpt2", "LMHeadModel"), ("t5", "ForConditionalGeneration")])
def test_bound_runs_write_the_same(
    family: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the CPU in its place: outputs are left where they are, and go in again. Only logits are looked
    at, not what an encoder answers."""
    export(tiny(family, architecture, dtype=np.float32), None, tmp_path / "out", decode=True)
    writer = open_writer(tmp_path / "out", device="cpu")
    rows, options = [[3, 1, 4], [1, 5]], Options(max_new_tokens=5)
    plain = [list(tokens) for tokens in write(writer, rows, options)]
    bound, calls = runtime.Runner.bound, list[tuple[str, int, int]]()

    def instead(self: runtime.Runner, values: Any, wanted: Any, device: str, looked: int) -> Any:
        calls.append((device, looked, "logits" in wanted))
        return bound(self, values, wanted, "cpu", looked)

    monkeypatch.setattr(runtime.Runner, "bound", instead)
    with contextlib.ExitStack() as stack:
        stack.callback(monkeypatch.undo)
        monkeypatch.setattr(runtime, "provider", lambda made: CUDA)
        assert [list(tokens) for tokens in write(writer, rows, options)] == plain
    steps = [("cuda", 1, True)] * len(plain)
    assert calls == ([("cuda", 0, False), *steps] if family == "t5" else steps)
