"""Where a graph may point: to files in its own folder, from wherever in it, whatever the dtype."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from refpeft.export import initialisers, runtime

SECRET = b"a secret"
U8 = TensorProto.UINT8


def outside(place: str, name: str = "t", dtype: int = U8, size: int = 8) -> TensorProto:
    made = TensorProto(name=name, data_type=dtype, dims=[size], data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=place)
    return made


def constant(tensor: TensorProto, name: str, op: str = "Constant", inputs: tuple[str, ...] = ()) -> NodeProto:
    node = helper.make_node(op, inputs, [name])
    node.attribute.append(helper.make_attribute("value", tensor))
    return node


def model(nodes: list[NodeProto], tensors: tuple[TensorProto, ...] = (), asks: bool = False) -> ModelProto:
    inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, [])] if asks else []
    outputs = [helper.make_tensor_value_info("y", U8, [8])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def branch(nodes: list[NodeProto], tensors: tuple[TensorProto, ...] = ()) -> ModelProto:
    body = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("b", U8, [8])], tensors)
    return model([helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)], asks=True)


def sparse(place: str) -> ModelProto:
    made = model([helper.make_node("Identity", ["t"], ["y"])])
    found = made.graph.sparse_initializer.add(dims=[8])
    found.values.CopyFrom(outside(place))
    found.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [8], list(range(8))))
    return made


PLACES: dict[str, Callable[[str], ModelProto]] = {
    "a constant": lambda place: model([constant(outside(place), "y")]),
    "another attribute": lambda place: model(
        [constant(outside(place, size=1), "y", "ConstantOfShape", ("s",))],
        (helper.make_tensor("s", TensorProto.INT64, [1], [8]),),
    ),
    "a branch's initialiser": lambda place: branch([helper.make_node("Identity", ["t"], ["b"])], (outside(place),)),
    "a branch's constant": lambda place: branch([constant(outside(place), "b")]),
    "a sparse initialiser": sparse,
    "a dtype that is not compared": lambda place: model(
        [helper.make_node("Cast", ["t"], ["y"], to=U8)], (outside(place, dtype=TensorProto.FLOAT8E5M2),)
    ),
}


@pytest.mark.ort
@pytest.mark.parametrize("what", PLACES)
def test_no_tensor_lies_outside_the_folder(what: str, tmp_path: Path) -> None:
    """onnxruntime reads all of these."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    (folder / "inside").write_bytes(SECRET)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = folder / "model.onnx"
    path.write_bytes(PLACES[what]("inside").SerializeToString())
    initialisers.read(path)
    if "dtype" not in what:
        runner = runtime.Runner(folder, runtime.session(path, "cpu"))
        found = runner.run({"c": np.array(True)} if runner.inputs else {})["y"]
        assert found.tobytes() == (SECRET if "another" not in what else SECRET[:1] * 8)
    for place in ("../secret", str(tmp_path / "secret"), "link", "..\\secret"):
        path.write_bytes(PLACES[what](place).SerializeToString())
        with pytest.raises(ValueError, match=r"must lie in the model's folder|is a link that leaves"):
            initialisers.read(path)
