"""Weights of 16 and of 4 bits: the formula, the operator that reads it, every form, and what rounding costs."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import refpeft
from refpeft.checkpoint.safetensors import Malformed
from refpeft.export import adapters as files
from refpeft.export import initialisers, int4
from refpeft.export.generation import Options, open_writer, write
from refpeft.export.int4 import Blocks
from refpeft.export.precision import as_stored, precision, unpacked
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from refpeft.export.runtime import open_folder
from refpeft.export.verification import LIMIT, MismatchError
from tests.models import tiny

Array = np.ndarray[Any, Any]
F32 = np.float32
BLOCKS = [Blocks(16), Blocks(32), Blocks(16, zero_points=True), Blocks(32, zero_points=True)]
IDS = {"input_ids": np.array([[3, 1, 4, 1, 5]]), "attention_mask": np.ones((1, 5), np.int64)}


def matrix(o: int, i: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(o, i)).astype(F32)


def lora(model: Any, method: str = "lora", seed: int = 0, **config: Any) -> refpeft.Adapter:
    own = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return refpeft.init(method, own, model, seed)


def ratio(result: Any) -> float:
    return float(max(c["ratio"] for c in result.cases))


# ── the formula ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("columns", [16, 24, 64, 70])
def test_every_number_is_half_a_step_off_at_most(blocks: Blocks, columns: int) -> None:
    """Q2; Q1: but for those beyond 7 s, of the sign that the largest does not have, which are a step off at most."""
    W = matrix(5, columns)
    p = int4.quantise(W, blocks)
    off = np.abs(int4.dequantise(p, columns) - W)
    step = np.repeat(np.abs(p.s), blocks.size, axis=1)[:, :columns]
    beyond = np.abs(W) > 7 * step if not blocks.zero_points else np.zeros_like(W, bool)
    assert (off <= np.where(beyond, 1, 0.5) * step * (1 + 1e-5)).all()
    assert off.max() > 0.3 * step.max()


def test_what_larger_blocks_take_and_cost() -> None:
    """The figures of docs/export.md."""
    W = matrix(512, 1024)
    found = {k: int4.quantise(W, Blocks(k)) for k in (32, 128)}
    off = {k: float(np.linalg.norm(int4.dequantise(p, 1024) - W) / np.linalg.norm(W)) for k, p in found.items()}
    room = {k: p.q.nbytes + p.s.nbytes for k, p in found.items()}
    assert room[128] / room[32] == pytest.approx(0.85, abs=1e-3)
    assert off == pytest.approx({32: 0.086, 128: 0.103}, abs=5e-4)


def test_the_largest_and_zero_are_kept() -> None:
    """Q1, Q3"""
    W = matrix(4, 64)
    W[:, ::7] = 0
    W[2, :32] = 0
    for blocks in BLOCKS:
        got = int4.dequantise(int4.quantise(W, blocks), 64)
        assert (got[W == 0] == 0).all()
        if not blocks.zero_points:
            largest = np.abs(W.reshape(4, -1, blocks.size)).argmax(-1)[..., None]
            kept, want = (np.take_along_axis(a.reshape(4, -1, blocks.size), largest, -1) for a in (got, W))
            assert np.abs(kept - want).max() <= 1e-6


@given(st.integers(1, 40), st.integers(1, 3))
def test_packing_is_undone(n: int, rows: int) -> None:
    q = np.random.default_rng(n).integers(0, 16, (rows, n)).astype(np.uint8)
    assert np.array_equal(int4.unpack(int4.pack(q))[:, :n], q)


@pytest.mark.ort
@pytest.mark.parametrize("zero_points", [False, True])
def test_it_is_as_good_as_onnxruntimes_own(zero_points: bool) -> None:
    """onnxruntime's quantiser, symmetric, has the same scales; with zero points, the error is no larger than its."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    o, i, k = 24, 128, 32
    W = matrix(o, i)
    q, s, z = np.zeros((o, i // k, k // 2), np.uint8), np.zeros(o * i // k, F32), np.zeros((o, i // k // 2), np.uint8)
    quantize_matmul_4bits(q, np.ascontiguousarray(W.T), s, z, k, o, i, not zero_points)
    theirs = int4.Packed(q, s.reshape(o, -1), z if zero_points else None)
    ours = int4.quantise(W, Blocks(k, zero_points))
    off, other = (float(np.linalg.norm(int4.dequantise(p, i) - W)) for p in (ours, theirs))
    assert off <= other * 1.001
    if not zero_points:
        assert np.allclose(ours.s, theirs.s, rtol=1e-6, atol=0)


@pytest.mark.ort
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("columns", [16, 24, 64, 70])
def test_matmulnbits_reads_it(blocks: Blocks, columns: int) -> None:
    """Q2: x Ŵᵀ by the operator is x Ŵᵀ by NumPy, of any number of columns."""
    import onnxruntime

    W, x = matrix(7, columns), matrix(3, columns, 1)
    p = int4.quantise(W, blocks)
    parts = {"q": p.q, "s": p.s} | ({} if p.z is None else {"z": p.z})
    sizes = {"N": 7, "K": columns, "bits": 4, "block_size": blocks.size, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", *parts], ["y"], domain="com.microsoft", **sizes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 7])],
        [onnx.numpy_helper.from_array(a, n) for n, a in parts.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    want = x.astype(np.float64) @ int4.dequantise(p, columns).T.astype(np.float64)
    assert np.linalg.norm(y - want) <= 1e-6 * np.linalg.norm(want)


def test_wrong_options_are_refused() -> None:
    for wrong, words in (
        ({"size": 24}, "block_size must be a power of two, 16 or more, found 24"),
        ({"size": 8}, "block_size must be"),
        ({"accuracy_level": 2}, "accuracy_level must be 0, 1 or 4, found 2"),
    ):
        with pytest.raises(ValueError, match=words):
            precision("int4", wrong)
    with pytest.raises(ValueError, match="are of int4, and the dtype is float32"):
        precision("float32", {"size": 32})


def test_blocks_of_another_matrix_are_refused() -> None:
    p = int4.quantise(matrix(4, 40), Blocks(16))
    found = {"w.q4": p.q, "w.scales": p.s}
    assert unpacked(found, "w", "linear", (4, 40)) is not None
    for shape in ((4, 49), (4, 32), (5, 40)):
        with pytest.raises(Malformed, match="its blocks are not those of a matrix"):
            unpacked(found, "w", "linear", shape)


# ── graphs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"dtype": "int4"},
    "int4, zero points": {"dtype": "int4", "blocks": {"size": 16, "zero_points": True}},
}

CASES = [
    *(
        (family, method, form)
        for family, method in (("gpt2", "lora"), ("llama", "dora"), ("bert", "lora"))
        for form in ("merged", "unmerged", "inputs", "multi")
    ),
    ("gpt2", "lora", "training"),  # whose verification is costly
]


@pytest.mark.ort
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(("family", "method", "form"), CASES)
def test_every_form(family: str, method: str, form: str, kind: str, tmp_path: Path) -> None:
    model = tiny(family, "ForSequenceClassification" if family == "bert" else None, dtype=F32)
    decode = form != "training" and family != "bert"
    result = export(model, lora(model, method), tmp_path / "out", form, decode=decode, **OPTIONS[kind])
    assert result.dtype == OPTIONS[kind]["dtype"]
    assert ratio(result) <= LIMIT
    assert min(c["rounding"] for c in result.cases) > 1e-5


@pytest.mark.ort
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders(family: str, tmp_path: Path) -> None:
    model = tiny(family, "ForConditionalGeneration", dtype=F32)
    for k, options in enumerate(OPTIONS.values()):
        assert ratio(export(model, lora(model), tmp_path / str(k), "unmerged", **options)) <= LIMIT


@pytest.mark.ort
def test_what_rounding_costs(tmp_path: Path) -> None:
    """`rounding` is the distance between the specification on these weights and on those of the checkpoint."""
    model = tiny("llama", dtype=F32)
    far = {}
    for dtype in ("bfloat16", "int4"):
        far[dtype] = export(model, None, tmp_path / dtype, dtype=dtype).cases[0]["rounding"]
        got = open_folder(tmp_path / dtype).run(IDS)["logits"]
        seen = as_stored(precision(dtype), model)
        want, whole = (m.astype(np.float64)(IDS["input_ids"])[0] for m in (seen, model))
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
        assert np.linalg.norm(want - whole) > 1e-4 * np.linalg.norm(whole)
    assert 1e-4 < far["bfloat16"] < far["int4"] / 4


@pytest.mark.ort
def test_bfloat16_halves_the_file_and_computes_in_float32(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    export(model, None, tmp_path / "out", dtype="bfloat16")
    found = initialisers.read(tmp_path / "out" / "model.onnx")
    assert all(np.array_equal(found[n], a.astype(ml_dtypes.bfloat16)) for n, a in model.params.items())
    assert open_folder(tmp_path / "out").run(IDS)["logits"].dtype == F32
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    looked_up = [n.input[0] for n in graph.node if n.op_type == "Gather"]
    assert "transformer.wte.weight" in looked_up  # whose rows are cast, and not the table


@pytest.mark.ort
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_layers_matrices_have_4_bits(family: str, tmp_path: Path) -> None:
    model = tiny(family, dtype=F32)
    export(model, lora(model), tmp_path / "out", "inputs", "int4")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    linear = {s.weight for r, s in model.sites.items() if s.kind in ("linear", "conv1d") and r != "head.out"}
    assert {n.removesuffix(".q4") for n in kinds if n.endswith(".q4")} == linear
    assert all(kinds[n] == TensorProto.FLOAT for n in model.params.keys() - linear)
    products = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(products) == len(linear)
    assert all(n.domain == "com.microsoft" for n in products)


@pytest.mark.ort
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_are_swapped_on_a_base_of_4_bits(method: str, tmp_path: Path) -> None:
    """One graph of 4 bits, several adapters: each answers as the specification does on the dequantised base."""
    model = tiny("llama", dtype=F32)
    one, other = lora(model, method), lora(model, method, 5, r=3, target_modules=["q_proj", "down_proj"])
    export(model, one, tmp_path / "out", "inputs", "int4")
    refpeft.save_adapter(other, tmp_path / "other")
    refpeft.save_adapter(one, tmp_path / "one")
    adapter_only(tmp_path / "out", [tmp_path / "other"], tmp_path / "other.onnx_adapter")
    adapter_only(tmp_path / "out", [tmp_path / "one"], tmp_path / "one.onnx_adapter")
    assert (tmp_path / "one.onnx_adapter").read_bytes() == (tmp_path / "out" / "adapter.onnx_adapter").read_bytes()
    runner = open_folder(tmp_path / "out")
    seen = as_stored(precision("int4"), model).astype(np.float64)
    for file, adapter in ((None, []), ("one", [one]), ("other", [other])):
        using = runner if file is None else runner.using(runner.load(tmp_path / f"{file}.onnx_adapter"))
        got, want = using.run(IDS)["logits"], seen(IDS["input_ids"], adapter)[0]
        assert np.linalg.norm(got - want) <= 3e-6 * np.linalg.norm(want)


@pytest.mark.ort
def test_writing_with_4_bits(tmp_path: Path) -> None:
    model = tiny("llama", dtype=F32)
    export(model, lora(model), tmp_path / "out", "inputs", "int4", decode=True)
    seen, ids = as_stored(precision("int4"), model).astype(np.float64), [3, 1, 4]
    for (token,) in write(open_writer(tmp_path / "out"), [[3, 1, 4]], Options(max_new_tokens=6)):
        assert token == seen(np.array([ids]), lora(model))[0][0, -1].argmax()
        ids.append(token)
    assert len(ids) == 9


@pytest.mark.ort
def test_accuracy_level_4_is_measured(tmp_path: Path) -> None:
    """The graph is verified with float32 activations; what it costs to round them too is in `rounding`."""
    model = tiny("llama", dtype=F32, hidden_size=64, intermediate_size=64)
    results = {n: export(model, None, tmp_path / str(n), dtype="int4", blocks={"accuracy_level": n}) for n in (1, 4)}
    assert all(ratio(r) <= LIMIT for r in results.values())
    for level in results:
        nodes = onnx.load(str(tmp_path / str(level) / "model.onnx")).graph.node
        levels = {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"}
        assert levels == {level}
    one, four = (open_folder(tmp_path / str(n)).run(IDS)["logits"] for n in (1, 4))
    moved = float(np.linalg.norm(four - one) / np.linalg.norm(one))
    assert 1e-3 < moved < 0.1
    said = [json.loads((tmp_path / str(n) / "refpeft.json").read_text())["cases"][0]["rounding"] for n in (1, 4)]
    assert 1e-5 < abs(said[1] - said[0]) < 2 * moved


@pytest.mark.ort
def test_a_wrong_half_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves of each byte in the wrong order, in the file only."""
    from refpeft.export import weights

    store = weights.store

    def swapped(tensors: Any, *rest: Any) -> Any:
        return store(((n, a >> 4 | a << 4, t) if n.endswith(".q4") else (n, a, t) for n, a, t in tensors), *rest)

    monkeypatch.setattr(weights, "store", swapped)
    with pytest.raises(MismatchError):
        export(tiny("gpt2", dtype=F32), None, tmp_path / "out", dtype="int4")
    assert not (tmp_path / "out").exists()


@pytest.mark.ort
def test_adapters_stay_float32(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    adapter = lora(model, modules_to_save=["c_proj"], target_modules=["c_attn"])
    for dtype in ("bfloat16", "int4"):
        assert ratio(export(model, adapter, tmp_path / dtype, "inputs", dtype)) <= LIMIT
        tensors = files.read(tmp_path / dtype / "adapter.onnx_adapter")
        assert {a.dtype for a in tensors.values()} == {np.dtype(F32)}


@pytest.mark.ort
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("form", ["merged", "inputs"])
def test_a_head_in_blocks_with_the_embedding_that_is_tied_to_it(family: str, form: str, tmp_path: Path) -> None:
    """Rows that are looked up are those of the rounded table, in one graph and in two."""
    architecture = {"gpt2": "LMHeadModel", "llama": "ForCausalLM"}.get(family, "ForConditionalGeneration")
    model = tiny(family, architecture, dtype=np.float32)
    adapter = lora(model)
    result = export(model, adapter, tmp_path / "out", form, "int4", decode=True, blocks={"head": True})
    assert max(case["ratio"] for case in result.cases) < LIMIT
    graph = onnx.load(tmp_path / "out" / ("decoder_model_merged.onnx" if family in ("t5", "bart") else "model.onnx"),
                      load_external_data=False).graph  # fmt: skip
    head = model.sites["head.out"].weight
    names = {t.name for t in graph.initializer}
    assert head + ".q4" in names
    assert head not in names


@pytest.mark.ort
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_two_graphs_over_weights_of_fewer_bits(family: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(family, "ForConditionalGeneration", dtype=np.float32)
    result = export(model, None, tmp_path / "out", "merged", dtype, decode=True)
    assert 0 < max(case["ratio"] for case in result.cases) < LIMIT
