"""From a graph of symbols to an ONNX model: opset 23, IR version 10, standard ops only.

Opset 23 has Attention, RotaryEmbedding and RMSNormalization, and is the newest for which onnxruntime has CUDA kernels
throughout; onnx's own defaults are newer than onnxruntime accepts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from refpeft.export.symbols import Branch, Graph, Node, Symbol

OPSET, IR_VERSION = 23, 10


def to_model(
    graph: Graph,
    inputs: Sequence[str] | Mapping[str, str],
    outputs: Mapping[str, Symbol],
    weights: Mapping[str, TensorProto],
    optional: Sequence[str] = (),
) -> ModelProto:
    """The part of the graph that the outputs need. Inputs stay in the signature even if nothing reads them; optional
    ones are weights that a caller may replace. Inputs may have other names in `graph` than in the model."""
    inputs = inputs if isinstance(inputs, Mapping) else {name: name for name in inputs}
    live = graph.live(outputs.values())
    names = {graph.made[own]: name for name, own in inputs.items() if name != own}
    for name, y in outputs.items():
        if y.node.op and y.node not in names:
            names[y.node] = name
    more = further(live)
    nodes = [node(x, names, more.get(x, ())) for x in live if x.op not in ("", "Constant", "Output")]
    nodes += [
        helper.make_node("Identity", [called(y.node, names)], [name], name=name)
        for name, y in outputs.items()
        if called(y.node, names) != name
    ]
    constants = [tensor(x.name, x.attrs["value"]) for x in live if x.op == "Constant"]
    read = {x.name for x in live}
    used = [weights[x.name] for x in live if x.name in weights]
    used += [weights[name] for name in optional if name not in read]
    proto = helper.make_graph(
        nodes,
        "refpeft",
        [value(name, graph.made[own]) for name, own in (*inputs.items(), *zip(optional, optional, strict=True))],
        [value(name, y) for name, y in outputs.items()],
        [*constants, *used],
    )
    domains = {"": OPSET} | {n.domain: 1 for n in nodes if n.domain}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="refpeft")


def called(x: Node | None, names: Mapping[Node, str]) -> str:
    """An output has the name it was given; what is left out has none."""
    return "" if x is None else names.get(x, x.name)


def further(live: Sequence[Node]) -> dict[Node, list[Node | None]]:
    """Of nodes with more than one output, those after the first."""
    found: dict[Node, list[Node | None]] = {}
    for x in live:
        if x.op == "Output" and x.args[0] is not None:
            outputs = found.setdefault(x.args[0], [])
            outputs += [None] * (x.attrs["index"] - len(outputs))
            outputs[x.attrs["index"] - 1] = x
    return found


def node(x: Node, names: Mapping[Node, str], more: Sequence[Node | None] = ()) -> NodeProto:
    attrs = {key: attribute(x, key, v, names) for key, v in x.attrs.items()}
    args = x.args[:1] if x.op == "If" else x.args  # its branches see the others by themselves
    inputs, outputs = ([called(a, names) for a in nodes] for nodes in (args, (x, *more)))
    if x.op == "Split" and x.args[1] is not None:  # which has all of its outputs, read or not
        outputs += [""] * (len(x.args[1].attrs["value"]) - len(outputs))
        outputs = [name or f"{x.name}_{k}" for k, name in enumerate(outputs)]
    return helper.make_node(x.op, inputs, outputs, name=x.name, **attrs)


def attribute(x: Node, key: str, v: Any, names: Mapping[Node, str]) -> Any:
    if isinstance(v, np.dtype):
        return elem_type(v)
    if not isinstance(v, Branch):
        return v
    name = f"{x.name}_{key}"
    inside = helper.make_node(v.op, [called(x.args[k], names) for k in v.args], [name], name=name, **dict(v.attrs))
    return helper.make_graph([inside], name, [], [value(name, x)])


def value(name: str, x: Node | Symbol) -> ValueInfoProto:
    shape = x.attrs.get("shown", x.shape) if isinstance(x, Node) else x.shape
    return helper.make_tensor_value_info(name, elem_type(x.dtype), [d if isinstance(d, int) else str(d) for d in shape])


def tensor(name: str, array: np.ndarray[Any, Any]) -> TensorProto:
    array = np.asarray(array)
    return TensorProto(name=name, data_type=elem_type(array.dtype), dims=array.shape, raw_data=array.tobytes())


def elem_type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))
