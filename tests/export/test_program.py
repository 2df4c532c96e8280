"""Exported folders: right for every family and method, all there or not there at all."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import checker, numpy_helper

import refpeft
from refpeft.export import verification
from refpeft.export.forms import FORMS
from refpeft.export.program import export
from refpeft.export.verification import LIMIT, MismatchError
from refpeft.model import Model
from tests.models import ARCHITECTURES, tiny

ADAPTERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "none": [],
    "lora": [("lora", {"target_modules": "all-linear"})],
    "rslora": [("rslora", {"lora_bias": True})],
    "dora": [("dora", {"target_modules": "all-linear"})],
    "lora and dora": [("lora", {}), ("dora", {})],
}
F32 = np.float32


def adapters_of(model: Model, methods: list[tuple[str, dict[str, Any]]], **extra: Any) -> list[refpeft.Adapter]:
    config = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **extra}
    return [refpeft.init(name, {**config, **own}, model, seed) for seed, (name, own) in enumerate(methods)]


def loaded(folder: Path) -> Any:
    return onnx.load(str(folder / "model.onnx"))


def nodes(folder: Path) -> list[Any]:
    return [(n.op_type, list(n.input), list(n.output), list(n.attribute)) for n in loaded(folder).graph.node]


def weights(folder: Path) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in loaded(folder).graph.initializer}


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_every_architecture(family: str, architecture: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(family, architecture, dtype=F32)
    result = export(model, adapters_of(model, ADAPTERS["lora"]), tmp_path / "out", dtype=dtype)
    assert [(c["batch"], c["length"]) for c in result.cases] == [(1, 5), (1, 12), (3, 5), (3, 12)]
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    head = "Model" not in architecture.removesuffix("LMHeadModel")
    assert list(result.outputs) == ["logits" if head else "last_hidden_state"]
    types = ["token_type_ids"] if family in ("bert", "roberta") else []
    assert list(result.inputs) == ["input_ids", "attention_mask", *types]


@pytest.mark.ort
@pytest.mark.parametrize("methods", ADAPTERS)
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bert"])
def test_merged_graph_has_exactly_the_base_models_nodes(family: str, methods: str, tmp_path: Path) -> None:
    model = tiny(family, dtype=F32, use_cache=True)
    export(model, None, tmp_path / "base", verify=False)
    export(model, adapters_of(model, ADAPTERS[methods]), tmp_path / "merged")
    assert nodes(tmp_path / "merged") == nodes(tmp_path / "base")
    changed = {
        n for n, a in weights(tmp_path / "base").items() if not np.array_equal(a, weights(tmp_path / "merged")[n])
    }
    assert bool(changed) == (methods != "none")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_weights_are_those_of_refpeft_merge(family: str, tmp_path: Path) -> None:
    model = tiny(family, dtype=F32)
    adapters = adapters_of(model, ADAPTERS["lora and dora"])
    export(model, adapters, tmp_path / "out", verify=False)
    expected = refpeft.merge(model, adapters).params
    stored = weights(tmp_path / "out")
    assert {n for n in stored if not n.startswith("Constant")} <= expected.keys()
    assert all(np.array_equal(a, stored[n]) for n, a in expected.items() if n in stored)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    export(model, None, tmp_path / "out", verify=False)
    names = [n for n in weights(tmp_path / "out") if "wte" in n or "lm_head" in n]
    assert names == ["transformer.wte.weight"]


@pytest.mark.ort
def test_a_tied_layer_that_changes_alone_is_untied(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    export(model, adapters_of(model, [("lora", {"target_modules": ["wte"]})]), tmp_path / "out")
    stored = weights(tmp_path / "out")
    assert np.array_equal(stored["lm_head.weight"], model.params["transformer.wte.weight"])
    assert not np.array_equal(stored["transformer.wte.weight"], model.params["transformer.wte.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.ort
def test_whole_modules_and_biases_of_an_adapter(tmp_path: Path) -> None:
    model = tiny("bert", "ForSequenceClassification", dtype=F32)
    (adapter,) = adapters_of(model, ADAPTERS["lora"], modules_to_save=["classifier"], bias="all")
    adapter = adapter.replace(params={n: v + F32(0.1) for n, v in adapter.params.items()})
    export(model, adapter, tmp_path / "out")
    assert np.array_equal(weights(tmp_path / "out")["classifier.weight"], adapter.params["classifier.weight"])


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_checkpoints(stored: Any, dtype: str, tmp_path: Path) -> None:
    model = tiny("llama", dtype=stored)
    result = export(model, adapters_of(model, ADAPTERS["lora"]), tmp_path / "out", dtype=dtype)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert {a.dtype.name for n, a in weights(tmp_path / "out").items() if "weight" in n} == {dtype}


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_external_data(dtype: str, tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    adapters = adapters_of(model, ADAPTERS["lora"])
    beside = export(model, adapters, tmp_path / "beside", dtype=dtype, external=True)
    inside = export(model, adapters, tmp_path / "inside", dtype=dtype)
    assert (beside.external_data, inside.external_data) == (True, False)
    assert not (tmp_path / "inside" / "model.onnx.data").exists()
    a, b = weights(tmp_path / "beside"), weights(tmp_path / "inside")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_a_graph_that_holds_its_weights_is_what_protobuf_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streamed file is the other one with its numbers inside; lengths of one byte and of several, empty tensors."""
    monkeypatch.setattr("refpeft.export.weights.BLOCK", 100)
    model = tiny("gpt2", dtype=F32)
    adapters = adapters_of(model, ADAPTERS["lora"])
    for name, external in (("beside", True), ("inside", False)):
        export(model, adapters, tmp_path / name, "inputs", external=external, verify=False)
    beside, inside = (onnx.load(str(tmp_path / name / "model.onnx")) for name in ("beside", "inside"))
    for t in beside.graph.initializer:
        del t.external_data[:]
        t.ClearField("data_location")
    for t in inside.graph.initializer:
        assert not t.HasField("data_location")
    assert inside.SerializeToString(deterministic=True) == beside.SerializeToString(deterministic=True)
    assert 0 in {len(t.raw_data) for t in inside.graph.initializer}


@pytest.mark.parametrize("external", [False, True])
def test_a_graph_may_hold_no_weight_at_all(external: bool, tmp_path: Path) -> None:
    """Where all of them are trained they are inputs, and no file is left that holds none."""
    model = tiny("gpt2", dtype=F32)
    adapter = refpeft.init("full", {}, model)
    result = export(model, adapter, tmp_path / "out", "training", external=external, verify=False)
    assert not result.external_data
    assert not (tmp_path / "out" / "model.onnx.data").exists()


def test_large_weights_are_external_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refpeft.export.program.INLINE_LIMIT", 1000)
    model = tiny("gpt2", dtype=F32)
    assert export(model, None, tmp_path / "default", verify=False).external_data
    assert not export(model, None, tmp_path / "inline", external=False, verify=False).external_data


def test_large_tensors_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refpeft.export.weights.BLOCK", 100)
    model = tiny("gpt2", dtype=F32)
    transposed = {n: np.asfortranarray(a) for n, a in model.params.items()}
    model = Model(model.config, model.sites, transposed, model.source)
    export(model, None, tmp_path / "out", external=True, verify=False)
    assert all(np.array_equal(a, model.params[n]) for n, a in weights(tmp_path / "out").items() if n in model.params)


@pytest.mark.ort
def test_the_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    model = tiny("bert", dtype=F32)
    result = export(model, adapters_of(model, ADAPTERS["dora"]), tmp_path / "out", source=checkpoint)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.onnx", "refpeft.json", "tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    card = json.loads((tmp_path / "out" / "refpeft.json").read_text())
    assert card["form"] == "merged"
    assert (card["opset"], card["ir_version"]) == (23, 10)
    assert card["inputs"]["input_ids"] == ["batch", "sequence"]
    assert card["outputs"] == {"last_hidden_state": ["batch", "sequence", 16]}
    assert card["adapters"][0]["method"] == "dora"
    assert card["cases"] == list(result.cases)
    proto = loaded(tmp_path / "out")
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (10, [("", 23)])
    checker.check_model(proto, full_check=True)
    assert Counter(n.op_type for n in proto.graph.node)["Attention"] == 2


# ── what must not happen ─────────────────────────────────────────────────────────────────────────────────────────────


def refused(tmp_path: Path, error: type[BaseException], message: str, **options: Any) -> None:
    """Exporting ends in this error, and nothing has changed on disk."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        export(tiny("gpt2", dtype=F32), None, **{"out": tmp_path / "out", "verify": False, **options})
    assert sorted(tmp_path.rglob("*")) == before


def test_out_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(tmp_path, FileExistsError, "exists already")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, FileExistsError, "exists already", out=tmp_path / "link")


def test_out_in_no_folder(tmp_path: Path) -> None:
    refused(tmp_path, ValueError, "the folder .*no does not exist", out=tmp_path / "no" / "out")


def test_unknown_choices(tmp_path: Path) -> None:
    refused(tmp_path, ValueError, "form must be one of merged, .*, found 'folded'", form="folded")
    refused(tmp_path, ValueError, "dtype must be one of float32, float16, bfloat16, int4, found 'int8'", dtype="int8")


def test_what_a_merged_graph_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    (adapter,) = adapters_of(model, ADAPTERS["lora"])
    elsewhere = {"transformer.h.9.attn.c_attn.lora_A.weight": np.ones((2, 16), F32)}
    stray = adapter.replace(params={**adapter.params, **elsewhere})
    dropped = adapter.replace(masks={"transformer.h.0.attn.c_attn": np.ones((1, 4, 16), F32)})
    for wrong, message in ((stray, "parameters for transformer.h.9.attn.c_attn"), (dropped, "dropout mask")):
        with pytest.raises(ValueError, match=message):
            export(model, wrong, tmp_path / "out", verify=False)
    assert not any(tmp_path.iterdir())


def test_inline_weights_that_no_protobuf_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refpeft.export.program.PROTOBUF_LIMIT", 1000)
    refused(tmp_path, ValueError, "do not fit into model.onnx", external=False)


def test_no_space_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refpeft.export.weights.write", full)
    refused(tmp_path, OSError, "out: could not be written: no space is left on the device", external=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    refused(tmp_path, OSError, "out: needs .* MB, and .* has 0 MB left")


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refpeft.export.program.save", interrupted)
    refused(tmp_path, KeyboardInterrupt, "^$")


@pytest.mark.ort
def test_a_graph_that_is_wrong_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refpeft.export import lowering

    wrong = {**lowering.RULES, "gelu_new": lowering.gelu}  # differs in the fourth digit
    monkeypatch.setattr("refpeft.export.program.RULES", wrong)
    refused(tmp_path, MismatchError, "times what rounding explains", verify=True)


@pytest.mark.ort
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta"])
def test_verification_sees_a_weight_that_is_slightly_wrong(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(*args: Any) -> Any:
        for name, array in merged(*args):
            yield name, array * F32(1.0005) if "layers.1" in name or "h.1" in name or "layer.1" in name else array

    from refpeft.export import weights as module

    merged = module.merged
    monkeypatch.setattr(module, "merged", scaled)
    model = tiny(family, dtype=F32)
    with pytest.raises(MismatchError):
        export(model, None, tmp_path / "out")


def test_without_onnxruntime_it_says_which_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("refpeft.export.runtime.installed", list)
    refused(tmp_path, ImportError, r"refpeft\[cpu\].*--no-verify", verify=True)


def test_both_runtimes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refpeft.export.runtime.installed", lambda: ["onnxruntime", "onnxruntime-gpu"])
    refused(tmp_path, ImportError, "both installed", verify=True)


def test_padding_is_part_of_the_verification() -> None:
    inputs = verification.example(tiny("roberta"), 3, 12)
    mask = inputs["attention_mask"]
    assert mask[0].all()
    assert not mask[1, -1]
    assert not mask[2, 0]
    assert (inputs["input_ids"][mask == 0] == 1).all()


def test_the_readme_has_every_form_and_the_clients_of_the_page() -> None:
    """One table turned: forms down there, programs down in docs/export.md."""
    root = Path(__file__).parents[2]

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip().strip("|").split("|")]

    page = (root / "docs" / "export.md").read_text("utf-8").partition("## Programs that load the folder")[2]
    top, _, *rows = (cells(line) for line in page.partition("\n\n|")[2].partition("\n\n")[0].splitlines())
    said = {row[0].split()[0].strip(","): dict(zip(top[-7:], row[1:], strict=True)) for row in rows}
    readme = (root / "README.md").read_text("utf-8").partition("| form |")[2].partition("\n\n")[0].splitlines()
    clients = cells(readme[0])[1:]
    assert [cells(line)[0].strip("`") for line in readme[2:]] == list(FORMS)
    for line in readme[2:]:
        form, _, *marks = cells(line)
        assert marks == [said[client][form.strip("`")] for client in clients], form
