"""--form inputs: one session for the base model and for many adapters, fed as inputs or from files."""

import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint import safetensors
from refpeft.export import adapters as files
from refpeft.export import slots, verification
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from refpeft.export.runtime import Runner, open_folder
from refpeft.export.verification import LIMIT, example, ratio
from tests.export.adapters import CASES, SMALL, made, moved
from tests.models import tiny

F32 = np.dtype(np.float32)


@pytest.mark.ort
@pytest.mark.parametrize(("method", "family"), CASES)
def test_every_method_on_every_family(method: str, family: str, tmp_path: Path) -> None:
    """With the adapter from its file it is the adapter's model, without it is the base model to the bit."""
    model, adapter = made(method, family)
    for dtype in ("float32", "float16")[: 1 + (family in ("gpt2", "qwen2", "roberta"))]:
        result = export(model, adapter, tmp_path / dtype, "inputs", dtype)
        assert {c["what"] for c in result.cases} == {"", "no adapter"}
        assert max(c["ratio"] for c in result.cases) <= LIMIT
        assert all(name.startswith("adapter.") for name in result.optional_inputs)
    export(model, None, tmp_path / "base", verify=False)
    inputs = example(model, 3, 7)
    bare, base = (answer(literal(tmp_path / name), inputs) for name in ("float32", "base"))
    assert np.array_equal(bare, base)


def literal(folder: Path) -> Runner:
    """Run node for node: what onnxruntime fuses differs from graph to graph, and so may the last bit."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return Runner(folder, onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"]))


def answer(runner: Runner, inputs: Any, **more: Any) -> Any:
    return next(iter(runner.run({**{n: inputs[n] for n in runner.inputs if n in inputs}, **more}).values()))


SWAPS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {  # exported with, then fed
    "another rank and scale": ("lora", {"r": 2}, "lora", {"r": 5, "lora_alpha": 3}),
    "ranks by pattern": ("lora", {"r": 2}, "rslora", {"r": 4, "rank_pattern": {"h.1.attn.c_attn": 1}}),
    "fewer layers": ("lora", {"r": 2}, "lora", {"r": 2, "layers_to_transform": [1]}),
    "lora into slots of dora": ("dora", {"r": 2}, "lora", {"r": 3}),
    "another dora": ("dora", {"r": 2}, "dora", {"r": 3, "lora_alpha": 5}),
    "one that started from pissa": ("lora", {"r": 2}, "lora", {"r": 3, "init_lora_weights": "pissa"}),
    "loha of another rank": ("loha", {"r": 2}, "loha", {"r": 3, "alpha": 5, "alpha_pattern": {"h.1.*": 2}}),
    "loha with cores": ("loha", {"r": 2, "taps": 2}, "loha", {"r": 3, "taps": 2}),
    "another lokr": ("lokr", {"r": 2}, "lokr", {"r": 2, "alpha": 3}),
    "glora of another rank": ("glora", {"r": 2}, "glora", {"r": 3, "alpha": 5, "use_rslora": True}),
    "dylora of another rank": ("dylora", {"r": 4, "rank": 2}, "dylora", {"r": 6, "rank": 3, "alpha": 5}),
    "an exact rotation": ("oft", {}, "oft", {"use_cayley_neumann": False}),
    "other butterflies": ("boft", {"boft_block_size": 2}, "boft", {"boft_block_size": 2}),
    "a longer prompt": ("prompt_tuning", {"num_virtual_tokens": 2}, "prompt_tuning", {"num_virtual_tokens": 5}),
    "a prompt with an encoder": ("prompt_tuning", {"num_virtual_tokens": 2}, "p_tuning", {"num_virtual_tokens": 4}),
    "a shorter prefix": ("prefix_tuning", {"num_virtual_tokens": 5}, "prefix_tuning", {"num_virtual_tokens": 1}),
    "other vectors": ("ia3", {}, "ia3", {"target_modules": ["c_attn"]}),
    "other vectors of one projection": ("vera", {"r": 4}, "vera", {"r": 4, "d_initial": 0.5}),
    "adalora into slots of lora": ("lora", {"r": 2}, "adalora", {"init_r": 3, "target_r": 1, "total_step": 9}),
    "other biases": ("bitfit", {}, "bitfit", {}),
    "other rows": ("trainable_tokens", {"token_indices": [3, 1]}, "trainable_tokens", {"token_indices": [3, 1]}),
    "another head": ("partial", {"layers": 0, "tied": True}, "partial", {"layers": 0, "tied": True}),
}


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("swap", SWAPS)
def test_another_adapter_in_the_same_graph(swap: str, dtype: str, tmp_path: Path) -> None:
    """The file is made from the folder and an HF adapter folder alone."""
    first, config, second, other = SWAPS[swap]
    model = tiny("gpt2", dtype=F32)
    export(model, moved(refpeft.init(first, config, model)), tmp_path / "out", "inputs", dtype, verify=False)
    adapter = moved(refpeft.init(second, other, model, seed=3), seed=4)
    refpeft.save_adapter(adapter, tmp_path / "other")
    adapter_only(tmp_path / "out", [tmp_path / "other"], tmp_path / "other.onnx_adapter")
    runner = open_folder(tmp_path / "out")
    got = answer(runner.using(runner.load(tmp_path / "other.onnx_adapter")), inputs := example(model, 3, 7))
    half = np.dtype(dtype)
    subject = verification.Subject(model, [adapter], half)
    spec, ref = (
        m.astype(t)(inputs["input_ids"], [verification.in_dtype(a, t) if t == np.float64 else a for a in adapters],
                    inputs["attention_mask"])[0]
        for t in (half, np.float64)
        for m, adapters in [verification.rounded(subject, False)]
    )  # fmt: skip
    assert ratio(got, ref, spec, half) <= LIMIT
    assert not np.allclose(got[:, -7:], answer(runner, inputs), atol=1e-3)


@pytest.mark.ort
def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)

    def saved(name: str, method: str, **config: Any) -> Path:
        refpeft.save_adapter(refpeft.init(method, config, model), tmp_path / name)
        return tmp_path / name

    export(model, refpeft.init("lora", {"r": 2}, model), tmp_path / "lora", "inputs", verify=False)
    export(model, refpeft.init("trainable_tokens", {"token_indices": [1]}, model), tmp_path / "tokens", "inputs")
    export(model, None, tmp_path / "merged", verify=False)
    for name in ("ia3", "vera"):
        export(model, refpeft.init(name, {"r": 2} if name == "vera" else {}, model), tmp_path / name, "inputs")
    wrong = {
        r"takes .*mlp\.c_proj\.ia3_l of shape \[1, 64\], found \[16, 1\]": (
            "ia3",
            saved("d", "ia3", feedforward_modules=[]),
        ),
        "projection is .* in the vera adapter, and .* in the graph": (
            "vera",
            saved("e", "vera", r=2, projection_prng_key=1),
        ),
        "no input adapter.transformer.h.0.mlp.c_fc.lora_A": ("lora", saved("a", "lora", target_modules=["c_fc"])),
        "no input .*lora_gain, which the dora adapter needs": ("lora", saved("b", "dora", r=2)),
        r"token_indices is \[2\] .* and \[1\] in the graph": (
            "tokens",
            saved("c", "trainable_tokens", token_indices=[2]),
        ),
        "its form is 'merged', which takes no adapter": ("merged", tmp_path / "a"),
    }
    for message, (folder, adapter) in wrong.items():
        with pytest.raises(ValueError, match=message):
            adapter_only(tmp_path / folder, [adapter], tmp_path / "out.onnx_adapter")
    with pytest.raises(ValueError, match="takes 1 adapters together, found 2"):
        adapter_only(tmp_path / "lora", [tmp_path / "a"] * 2, tmp_path / "out.onnx_adapter")
    assert not list(tmp_path.glob("*.onnx_adapter"))
    with pytest.raises(ValueError, match="needs an adapter"):
        export(model, None, tmp_path / "none", "inputs", verify=False)


@pytest.mark.ort
def test_the_traps_of_adapter_files(tmp_path: Path) -> None:
    """Nothing stops applying, is drowned by another, or is taken for what it is not, without a word."""
    model, adapter = made("lora", "gpt2")
    export(model, adapter, tmp_path / "out", "inputs", verify=False)
    file = tmp_path / "out" / "adapter.onnx_adapter"
    inputs, runner = example(model, 1, 5), open_folder(tmp_path / "out")
    bare = answer(runner, inputs)
    using = runner.using(runner.load(file))
    gc.collect()
    adapted = answer(using, inputs)
    assert not np.allclose(adapted, bare, atol=1e-2)
    assert np.array_equal(answer(using.using(), inputs), bare)
    fed = files.read(file)
    assert np.array_equal(answer(runner, inputs, **fed), adapted)
    with pytest.raises(ValueError, match=r"is fed, and .*adapter\.onnx_adapter holds it too"):
        answer(using, inputs, **fed)
    with pytest.raises(ValueError, match="both hold adapter"):
        runner.using(runner.load(file), runner.load(file))
    for name, tensors, message in (
        ("half", {n: a.astype(np.float16) for n, a in fed.items()}, r"must be a tensor\(float\), found float16"),
        ("wide", {n: np.concatenate([a, a], axis=1) for n, a in fed.items()}, "must have the shape"),
        ("strange", {"x": np.ones(3, F32)}, "x is not an input of the graph"),
    ):
        files.write(tmp_path / name, tensors)
        with pytest.raises(ValueError, match=message):
            runner.load(tmp_path / name)
    (tmp_path / "text").write_text("no adapter")
    for name, message in (("text", "not an adapter file"), ("none", "no such file")):
        with pytest.raises(ValueError, match=message):
            runner.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"there is no refpeft\.json"):
        open_folder(tmp_path)


@pytest.mark.ort
def test_tensors_to_be_fed_by_hand(tmp_path: Path) -> None:
    model, adapter = made("dora", "gpt2")
    export(model, adapter, tmp_path / "out", "inputs", verify=False)
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    adapter_only(tmp_path / "out", [tmp_path / "adapter"], tmp_path / "out.safetensors")
    fed = safetensors.read(tmp_path / "out.safetensors")
    inputs, runner = example(model, 2, 5), open_folder(tmp_path / "out")
    using = runner.using(runner.load(tmp_path / "out" / "adapter.onnx_adapter"))
    assert np.array_equal(answer(runner, inputs, **fed), answer(using, inputs))


@pytest.mark.ort
@pytest.mark.parametrize("methods", [("prefix_tuning", "prefix_tuning"), ("prompt_tuning", "prefix_tuning")])
def test_adapters_of_different_lengths_together(methods: tuple[str, str], tmp_path: Path) -> None:
    """Each has a length of its own: onnxruntime takes two sizes of one name for one size."""
    model = tiny("llama", dtype=np.float32)
    adapters = [
        moved(refpeft.init(m, {"num_virtual_tokens": n}, model, n), n) for m, n in zip(methods, (2, 5), strict=True)
    ]
    result = export(model, adapters, tmp_path / "out", "inputs")
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert len({shape[0] for shape in result.optional_inputs.values()}) == 2


@pytest.mark.ort
def test_several_adapters_together(tmp_path: Path) -> None:
    model = tiny("llama", dtype=F32)
    lora, dora = (moved(refpeft.init(m, {"r": 2}, model, seed), seed) for seed, m in enumerate(("lora", "dora")))
    prefix = moved(refpeft.init("prefix_tuning", {"num_virtual_tokens": 2}, model))
    prompt = moved(refpeft.init("prompt_tuning", {"num_virtual_tokens": 2}, model))
    head = refpeft.init("lora", {"modules_to_save": ["lm_head"], "target_modules": ["v_proj"]}, model)
    for n, adapters in enumerate(([lora, dora], [dora, lora], [prefix, lora, prompt], [lora, moved(head)])):
        result = export(model, adapters, tmp_path / str(n), "inputs")
        assert max(c["ratio"] for c in result.cases) <= LIMIT


def test_a_method_without_slots_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have some; this is for those to come."""
    model, adapter = made("did", "gpt2")
    monkeypatch.setattr(slots, "VECTORS", {})
    with pytest.raises(ValueError, match=r"^did cannot be exported in the form inputs: did has no slots"):
        export(model, adapter, tmp_path / "out", "inputs", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.ort
@pytest.mark.parametrize("method", ["did", "said"])
def test_an_adapter_of_d_numbers(method: str, tmp_path: Path) -> None:
    """Another θ for the same projection is a file of d numbers; with another projection it is refused."""
    model, adapter = made(method, "gpt2")
    other, foreign = moved(adapter, 9), refpeft.init(method, SMALL[method], model, seed=2)
    export(model, adapter, tmp_path / "out", "inputs", verify=False)
    for name, a in (("other", other), ("foreign", foreign)):
        refpeft.save_adapter(a, tmp_path / name)
    tensors = adapter_only(tmp_path / "out", [tmp_path / "other"], tmp_path / "other.onnx_adapter")
    assert sum(math.prod(shape) for shape in tensors.values()) == adapter.config.d
    inputs, runner = example(model, 2, 5), open_folder(tmp_path / "out")
    got = answer(runner.using(runner.load(tmp_path / "other.onnx_adapter")), inputs)
    wide = other.replace(params={n: a.astype(np.float64) for n, a in other.params.items()})
    rest = {n: a for n, a in inputs.items() if n != "input_ids"}
    expected = model.astype(np.float64)(inputs["input_ids"], wide, **rest)[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="projection is"):
        adapter_only(tmp_path / "out", [tmp_path / "foreign"], tmp_path / "foreign.onnx_adapter")
