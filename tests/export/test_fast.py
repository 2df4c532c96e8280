"""--graph fast: the same function as the portable graph, by fewer nodes, for every family, method and form."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import refpeft
from refpeft.export.program import export
from refpeft.export.verification import LIMIT
from refpeft.model import Model
from refpeft.tune import LINEAR
from tests.export.adapters import CASES, made
from tests.export.test_decode import WRITERS
from tests.models import ARCHITECTURES, ENCODER_DECODERS, tiny

F32 = np.dtype(np.float32)


def nodes(folder: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(str(folder / "model.onnx")).graph.node)


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int4"])
@pytest.mark.parametrize("form", ["merged", "unmerged", "inputs"])
@pytest.mark.parametrize("family", WRITERS)
def test_graphs_that_decode(family: str, form: str, dtype: str, tmp_path: Path) -> None:
    model, adapter = made("lora", family)
    result = export(model, adapter, tmp_path / "out", form, dtype, decode=True, graph="fast")
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    plain = export(model, adapter, tmp_path / "plain", form, dtype, verify=False, decode=True)
    assert result.nodes < plain.nodes
    assert (result.inputs, result.optional_inputs, result.outputs) == (
        plain.inputs, plain.optional_inputs, plain.outputs,
    )  # fmt: skip


@pytest.mark.ort
@pytest.mark.parametrize(("method", "family"), CASES)
def test_every_method_and_family(method: str, family: str, tmp_path: Path) -> None:
    """Of whole texts, the adapter beside the weights."""
    model, adapter = made(method, family)
    result = export(model, adapter, tmp_path / "out", "unmerged", graph="fast")
    assert max(c["ratio"] for c in result.cases) <= LIMIT


FORMS = [("prompt", "prompt_tuning"), ("prefix", "prefix_tuning"), ("multi", "lora"), ("multi", "dora")]


@pytest.mark.ort
@pytest.mark.parametrize("last_logits", [False, True])
@pytest.mark.parametrize(("form", "method"), FORMS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_other_forms(family: str, form: str, method: str, last_logits: bool, tmp_path: Path) -> None:
    """Prefixes and several positions after a past, for more than one text: what GroupQueryAttention refuses."""
    model, adapter = made(method, family)
    out = tmp_path / "out"
    result = export(model, adapter, out, form, decode=True, last_logits=last_logits, graph="fast")
    assert max(c["ratio"] for c in result.cases) <= LIMIT


@pytest.mark.ort
def test_training(tmp_path: Path) -> None:
    model, adapter = made("lora", "llama")
    result = export(model, adapter, tmp_path / "out", "training", graph="fast")
    assert max(c["ratio"] for c in result.cases) <= LIMIT


@pytest.mark.ort
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders(name: str, tmp_path: Path) -> None:
    family, architecture, config = ENCODER_DECODERS[name]
    model = tiny(family, architecture, dtype=F32, **config)
    adapter = refpeft.init("lora", {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}, model)
    result = export(model, adapter, tmp_path / "out", "unmerged", graph="fast")
    assert max(c["ratio"] for c in result.cases) <= LIMIT


TWO = [("T5", form, dtype) for form in ("merged", "unmerged", "inputs") for dtype in ("float32", "int4")]
TWO += [("T5 v1.1", "unmerged", "float32"), ("BART", "inputs", "float32"), ("BART", "merged", "bfloat16")]
TWO += [("BART, scaled", "merged", "float16"), ("T5", "multi", "float32"), ("T5", "prompt", "float32")]


@pytest.mark.ort
@pytest.mark.parametrize(("name", "form", "dtype"), TWO)
def test_encoder_decoders_that_decode(name: str, form: str, dtype: str, tmp_path: Path) -> None:
    """Two graphs, each with sizes that its own inputs tell; a last product that is scaled, where a head is tied."""
    family, architecture, config = ENCODER_DECODERS[name]
    model = tiny(family, architecture, dtype=F32, **config)
    options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    method, own = ("prompt_tuning", {"num_virtual_tokens": 3}) if form == "prompt" else ("lora", options)
    adapter = refpeft.init(method, own, model)
    blocks = {"head": True} if dtype == "int4" else None
    result = export(model, adapter, tmp_path / "out", form, dtype, decode=True, graph="fast", blocks=blocks)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    plain = export(model, adapter, tmp_path / "plain", form, dtype, verify=False, decode=True, blocks=blocks)
    assert (result.inputs, result.outputs, result.encoder) == (plain.inputs, plain.outputs, plain.encoder)


# ── what the rewrites are ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_residual_and_a_bias_are_added_by_gemm(tmp_path: Path) -> None:
    """LLaMA has no biases: o and down add the residual. GPT-2 has: its four layers add those, and residuals remain."""
    export(wide("llama"), None, tmp_path / "llama", verify=False, decode=True, graph="fast")
    export(tiny("gpt2", dtype=F32), None, tmp_path / "gpt2", verify=False, decode=True, graph="fast")
    llama, gpt2 = nodes(tmp_path / "llama"), nodes(tmp_path / "gpt2")
    assert (llama["Gemm"], llama["MatMul"]) == (2 * 5, 1)  # and the head, which is not of rows
    assert (gpt2["Gemm"], gpt2["MatMul"]) == (2 * 4, 1)
    assert sum(len(n.input) == 3 for n in gemms(tmp_path / "llama")) == 2 * 2
    assert sum(len(n.input) == 3 for n in gemms(tmp_path / "gpt2")) == 2 * 4


OF_EVERY_PLACE = [(f, a) for f, a in ARCHITECTURES if "Sequence" not in a]
OF_EVERY_PLACE += [(f, a) for f, a, _ in ENCODER_DECODERS.values() if "Sequence" not in a]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("family", "architecture"), sorted({*OF_EVERY_PLACE}))
def test_what_a_graph_answers_with_is_computed_in_its_shape(
    family: str, architecture: str, adapted: bool, tmp_path: Path
) -> None:
    """A runtime would copy rows into it: logits of a large vocabulary take as long as a layer."""
    model = tiny(family, architecture, dtype=F32)
    every = [site.path for site in model.sites.values() if site.kind in ("linear", "conv1d")]
    adapter = refpeft.init("lora", {"r": 2, "target_modules": every}, model) if adapted else None
    export(model, adapter, tmp_path / "out", "unmerged", verify=False, graph="fast")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    made_by = {name: n.op_type for n in graph.node for name in n.output}
    ops = {made_by[o.name] for o in graph.output}
    assert ops
    assert ops <= {"MatMul", "Add", "Mul", "LayerNormalization", "RMSNormalization"}


def wide(family: str) -> Model:
    """Its MLP is as wide as in real models, or what it reads would be joined too."""
    return tiny(family, dtype=F32, intermediate_size=32)


@pytest.mark.parametrize(("family", "biases"), [("llama", False), ("qwen2", True), ("bert", True), ("roberta", True)])
def test_queries_keys_and_values_are_one_product(family: str, biases: bool, tmp_path: Path) -> None:
    """Their matrices, and their biases, are joined under the names that they have, which a runtime does on loading."""
    model = wide(family)
    export(model, None, tmp_path / "out", verify=False, graph="fast")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    weights = {i.name for i in graph.initializer} & model.params.keys()
    joined = [list(n.input) for n in graph.node if n.op_type == "Concat" and weights.issuperset(n.input)]
    kinds = Counter(tuple(sorted(name.rpartition(".")[2] for name in names)) for names in joined)
    assert kinds == {("weight",) * 3: 2} | ({("bias",) * 3: 2} if biases else {})
    splits = [n for n in graph.node if n.op_type == "Split"]
    assert [len(n.output) for n in splits] == [3, 3]
    assert all(name for n in splits for name in n.output)


def test_gpt2s_queries_keys_and_values_are_taken_apart_by_one_node(tmp_path: Path) -> None:
    export(tiny("gpt2", dtype=F32), None, tmp_path / "out", verify=False, decode=True, graph="fast")
    found = nodes(tmp_path / "out")
    assert (found["Split"], found["Slice"]) == (2, 0)


def test_weights_that_something_else_reads_stay_apart(tmp_path: Path) -> None:
    """In training most are needed for the gradient of x too, and those joined would be there twice."""
    model, adapter = made("lora", "llama")
    export(model, adapter, tmp_path / "out", "training", verify=False, graph="fast")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    reads = Counter(name for n in graph.node for name in n.input)
    joined = [n.input for n in graph.node if n.op_type == "Concat" and model.params.keys() >= set(n.input)]
    assert joined
    assert {reads[name] for names in joined for name in names} == {1}
    assert max(reads[name] for name in model.params) > 1


def gemms(folder: Path) -> list[onnx.NodeProto]:
    return [n for n in onnx.load(str(folder / "model.onnx")).graph.node if n.op_type == "Gemm"]


def test_an_adapter_costs_two_products_and_no_sum(tmp_path: Path) -> None:
    """q, k, v and gate, up read the same input: one product for all their A. The scale is inside."""
    model, adapter = made("lora", "llama")
    export(model, None, tmp_path / "base", verify=False, decode=True, graph="fast")
    export(model, adapter, tmp_path / "tuned", "unmerged", verify=False, decode=True, graph="fast")
    base, tuned = nodes(tmp_path / "base"), nodes(tmp_path / "tuned")
    assert tuned["Gemm"] - base["Gemm"] == 2 * (7 + 1 + 1 + 1 + 1)
    assert (tuned["Add"], tuned["Mul"]) == (base["Add"], base["Mul"])


def test_keys_and_values_are_joined_inside_attention(tmp_path: Path) -> None:
    """No Concat, no Transpose of activations; the mask is made of numbers once."""
    export(tiny("llama", dtype=F32), None, tmp_path / "out", verify=False, decode=True, graph="fast")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    past = [(n.op_type, name) for n in graph.node for name in n.input if name.startswith("past_key_values")]
    assert Counter(op for op, _ in past) == {"Attention": 4, "Shape": 1}
    attentions = [n for n in graph.node if n.op_type == "Attention"]
    assert len({n.input[3] for n in attentions}) == 1
    assert [list(n.output[1:]) for n in attentions] == [[f"present.{n}.key", f"present.{n}.value"] for n in (0, 1)]
    assert [list(n.input) for n in graph.node if n.op_type == "Transpose"] == [["lm_head.weight"]]


def test_a_graph_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph must be one of portable, fast, found 'quick'"):
        export(tiny("gpt2", dtype=F32), None, tmp_path / "out", graph="quick")


@pytest.mark.parametrize("family", WRITERS)
def test_matrices_of_4_bits_stay_so(family: str, tmp_path: Path) -> None:
    """Each is read by one MatMulNBits, those that read the same x by one together, and none is dequantised."""
    adapter = refpeft.init("lora", {"r": 2, "target_modules": "all-linear"}, wide(family))
    for graph in ("fast", "portable"):
        out = tmp_path / graph
        export(wide(family), adapter, out, "unmerged", "int4", verify=False, decode=True, graph=graph)
    fast, portable = (nodes(tmp_path / graph) for graph in ("fast", "portable"))
    matrices = sum(s.kind in LINEAR for s in wide(family).sites.values()) - 1
    joined = 0 if family == "gpt2" else 2 * (2 + 1)  # layers; q, k and v, gate and up
    assert (fast["MatMulNBits"], portable["MatMulNBits"]) == (matrices - joined, matrices)
    assert fast["BitShift"] == 0


@pytest.mark.ort
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("form", ["merged", "inputs"])
@pytest.mark.parametrize("family", WRITERS)
def test_rows_of_several_blocks(family: str, form: str, zero_points: bool, tmp_path: Path) -> None:
    """Of 16 and of 32 columns, the last one not full: joined and apart they are the same numbers."""
    sizes = {"n_embd": 72, "n_head": 4} if family == "gpt2" else {"hidden_size": 72, "intermediate_size": 104}
    model = tiny(family, dtype=F32, **sizes)
    adapter = refpeft.init("lora", {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}, model)
    for size in (16, 32):
        blocks = {"size": size, "zero_points": zero_points}
        out = tmp_path / str(size)
        result = export(model, adapter, out, form, "int4", decode=True, graph="fast", blocks=blocks)
        assert max(c["ratio"] for c in result.cases) <= LIMIT
        scales = [t for t in onnx.load(str(out / "model.onnx")).graph.initializer if t.name.endswith(".scales")]
        assert {t.dims[1] for t in scales} > {-(-72 // size)}


@pytest.mark.ort
@pytest.mark.parametrize(("form", "joined"), [("unmerged", 2), ("inputs", 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_are_written_once(family: str, form: str, joined: int, tmp_path: Path) -> None:
    """A head with a LoRA beside it: one product with both where they are weights; else that is added."""
    model = tiny(family, dtype=F32, tie_word_embeddings=False)
    own = {"r": 2, "lora_alpha": 6, "target_modules": ["lm_head"], "init_lora_weights": False}
    adapter = refpeft.init("lora", own, model)
    result = export(model, adapter, tmp_path / "out", form, decode=True, graph="fast")
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    made = {name: n for n in graph.node for name in n.output}
    last = made["logits"]
    assert last.op_type == ("MatMul" if joined == 2 else "Add")
    product = last if joined == 2 else next(made[n] for n in last.input if made[n].op_type == "MatMul")
    stored = made[made[product.input[1]].input[0]].input if joined == 2 else made[product.input[1]].input
    assert len(stored) == joined
    assert "lm_head.weight" in stored
