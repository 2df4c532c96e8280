"""Auditing ONNX models: initialisers by name and by content, and files that must not be trusted."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

import refpeft
from refpeft.checkpoint.safetensors import Malformed
from refpeft.export import export, initialisers
from tests.audit.test_audit import Folders, audit, made, wrong

Change = Callable[[ModelProto], object]


def exported(where: Path, family: str = "llama", **options: Any) -> tuple[Path, Folders]:
    folders = made(where, family)
    model = refpeft.load(folders["base"])
    adapter = refpeft.load_adapter(folders["lora0"], model)
    export(model, adapter, where / "onnx", verify=False, **options)
    return where / "onnx" / "model.onnx", folders


def change(path: Path, f: Change) -> Path:
    model = onnx.load(path, load_external_data=False)
    f(model)
    path.write_bytes(model.SerializeToString())
    return path


def rename(model: ModelProto, old: str, new: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == old:
            tensor.name = new


def matrices(model: ModelProto) -> list[TensorProto]:
    return [t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == TensorProto.FLOAT]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("external", [False, True])
def test_our_own_export_holds(family: str, external: bool, tmp_path: Path) -> None:
    path, folders = exported(tmp_path, family, external=external)
    result = audit(path, folders)
    assert result.exit_code == 0, result.output
    assert audit(path.parent, folders).exit_code == 0


def test_half_precision_holds(tmp_path: Path) -> None:
    path, folders = exported(tmp_path, dtype="float16")
    assert audit(path, folders).exit_code == 0


def test_weights_of_16_bits_hold_and_those_of_4_are_refused(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "int4"):
        (tmp_path / dtype).mkdir()
        path, folders = exported(tmp_path / dtype, dtype=dtype)
        result = audit(path, folders)
        if dtype == "bfloat16":
            assert result.exit_code == 0, result.output
        else:
            assert result.exit_code == 2
            assert "has 4 bits" in result.stderr


def test_of_a_linked_folder_the_graph_is_audited(tmp_path: Path) -> None:
    """And not the base model's file, which lies beside it."""
    folders = made(tmp_path, "llama")
    model, out = refpeft.load(folders["base"]), tmp_path / "linked"
    adapter = refpeft.load_adapter(folders["lora0"], model)
    export(model, adapter, out, link=True, source=folders["base"], verify=False)
    assert (out / "model.safetensors").is_file()
    result = audit(out, folders)
    assert result.exit_code == 0, result.output


def test_prefixes_and_anonymous_transposed_matrices_are_found(tmp_path: Path) -> None:
    """As torch's exporter does: 'onnx::MatMul_123' for the transposed weight of a linear layer."""
    path, folders = exported(tmp_path)

    def as_torch(model: ModelProto) -> None:
        for n, tensor in enumerate(list(model.graph.initializer)):
            if "proj" in tensor.name:
                turned = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
                tensor.CopyFrom(numpy_helper.from_array(turned, f"onnx::MatMul_{n}"))
            elif tensor.name.startswith("model."):
                tensor.name = "wrapped." + tensor.name

    result = audit(change(path, as_torch), folders)
    assert result.exit_code == 0, result.output
    assert "20 were found under another name" in result.stdout
    found = json.loads((path.parent / "found.json").read_text())["tensors"]
    assert sum((f["stored_as"] or "").endswith("(transposed)") for f in found) == 14


def test_a_wrong_weight_is_found_under_a_strange_name(tmp_path: Path) -> None:
    path, folders = exported(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"

    def forget(model: ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(refpeft.load(folders["base"]).params[name].T.copy(), "val_7"))

    audit(change(path, forget), folders)
    assert [(f["name"], f["verdict"], f["stored_as"]) for f in wrong(path)] == [(name, "base", "val_7 (transposed)")]


def test_constant_nodes_hold_weights_too(tmp_path: Path) -> None:
    path, folders = exported(tmp_path)

    def to_constant(model: ModelProto) -> None:
        tensor = model.graph.initializer.pop()
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))

    assert audit(change(path, to_constant), folders).exit_code == 0


def test_numbers_in_typed_fields_are_read(tmp_path: Path) -> None:
    path, folders = exported(tmp_path)

    def typed(model: ModelProto) -> None:
        for t in matrices(model):
            a = numpy_helper.to_array(t)
            t.CopyFrom(helper.make_tensor(t.name, t.data_type, a.shape, a.ravel()))

    assert audit(change(path, typed), folders).exit_code == 0


# ── what is refused: one sentence, nothing read that is not in the folder ────────────────────────────────────────────


def entry(key: str, value: str) -> Change:
    def f(model: ModelProto) -> None:
        tensor = matrices(model)[0]
        kept = [(e.key, e.value) for e in tensor.external_data if e.key != key]
        del tensor.external_data[:]
        for k, v in [*kept, (key, value)]:
            tensor.external_data.add(key=k, value=v)

    return f


def dims(*sizes: int) -> Change:
    def f(model: ModelProto) -> None:
        del matrices(model)[0].dims[:]
        next(t for t in model.graph.initializer if not t.dims and t.external_data).dims.extend(sizes)

    return f


def same_name(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def overlap(model: ModelProto) -> None:
    first, second = matrices(model)[:2]
    begin = int(next(e.value for e in first.external_data if e.key == "offset"))
    next(e for e in second.external_data if e.key == "offset").value = str(begin + 8)


BAD: dict[str, tuple[Change, str]] = {
    "a parent": (entry("location", "../secret"), "must lie in the model's folder"),
    "a parent within": (entry("location", "a/../../secret"), "must lie in the model's folder"),
    "an absolute path": (entry("location", "/etc/passwd"), "must lie in the model's folder"),
    "a drive": (entry("location", "C:\\secret"), "must lie in the model's folder"),
    "a parent in Windows' way": (entry("location", "..\\secret"), "must lie in the model's folder"),
    "a missing file": (entry("location", "nothing"), "is missing"),
    "the folder": (entry("location", "."), "is missing"),
    "no name": (entry("location", ""), "must name a file"),
    "a zero byte": (entry("location", "a\0b"), "must name a file"),
    "a link that leaves": (entry("location", "link"), "is a link that leaves"),
    "a linked folder": (entry("location", "linked/secret"), "is a link that leaves"),
    "an offset past the end": (entry("offset", "999999999"), "should end at byte"),
    "a negative offset": (entry("offset", "-8"), "offset must be a natural number"),
    "an offset in words": (entry("offset", "eight"), "offset must be a natural number"),
    "an offset beyond all": (entry("offset", "9" * 40), "offset must be a natural number"),
    "a length that does not fit": (entry("length", "4"), "bytes, external_data gives 4"),
    "a huge shape": (dims(2**62, 2**62), "bytes, external_data gives"),
    "a negative shape": (dims(-1, 4), "dims must be natural numbers"),
    "a name twice": (same_name, "there are two tensors"),
    "an overlap": (overlap, "overlap in part"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_external_data_is_refused(name: str, tmp_path: Path) -> None:
    path, folders = exported(tmp_path, external=True)
    (tmp_path / "secret").write_bytes(bytes(100_000))
    (path.parent / "link").symlink_to(tmp_path / "secret")
    (path.parent / "linked").symlink_to(tmp_path)
    f, words = BAD[name]
    result = audit(change(path, f), folders)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("refpeft: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not (path.parent.parent / "found.json").exists()


def test_a_link_that_stays_in_the_folder_is_followed(tmp_path: Path) -> None:
    path, folders = exported(tmp_path, external=True)
    os.rename(path.parent / "model.onnx.data", path.parent / "weights")
    (path.parent / "model.onnx.data").symlink_to("weights")
    assert audit(path, folders).exit_code == 0


def test_raw_data_of_another_size_is_refused(tmp_path: Path) -> None:
    path, folders = exported(tmp_path)

    def cut(model: ModelProto) -> None:
        matrices(model)[0].raw_data = b"1234"

    result = audit(change(path, cut), folders)
    assert result.exit_code == 2
    assert "found 4" in result.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    where = tmp_path_factory.mktemp("fuzz")
    path = where / "model.onnx"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    far = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "data", "offset": "0", "length": "8"}.items():
        far.external_data.add(key=key, value=value)
    (where / "data").write_bytes(bytes(8))
    graph = helper.make_graph([], "g", [], [], [*tensors, far])
    onnx.save(helper.make_model(graph), path)
    return path, path.read_bytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_with_changed_bytes_is_read_or_refused(small: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = small
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, len(raw) - 1]))])
    try:
        found = initialisers.read(path)
    except Malformed as error:
        said = str(error)
    else:
        said = f"read {sum(a.size for a in found.values())} numbers"
    assert said
    assert "\n" not in said
