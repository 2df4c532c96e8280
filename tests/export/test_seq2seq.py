"""Encoder-decoders that write: two graphs over one file of weights, in every form that there is of them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import refpeft
from refpeft.export import runtime, seq2seq
from refpeft.export.program import export
from refpeft.export.verification import LIMIT
from tests.export.adapters import moved
from tests.export.graphs import gap
from tests.export.pairs import NAMES, PROMPTS, base, made, specified, written
from tests.models import ENCODER_DECODERS, tiny

F32 = np.float32
NEW = "sequence - past_encoder_sequence"
CASES = {
    "merged": ("lora", {}), "unmerged": ("houlsby", {}), "inputs": ("dora", {}), "multi": ("lora", {}),
    "prompt": ("p_tuning", {}), "unmerged prompt": ("prompt_tuning", {}), "unmerged prefix": ("prefix_tuning", {}),
    "inputs prompt": ("prompt_tuning", {}), "inputs prefix": ("prefix_tuning", {}),
    "multi prefix": ("prefix_tuning", {}), "inputs norms": ("ln_tuning", {}),
    "inputs necks": ("houlsby", {"cross_adapter": True}),
    "unmerged butterflies": ("boft", {}), "inputs butterflies": ("boft", {}), "multi butterflies": ("boft", {}),
    "unmerged subspace": ("did", {}), "multi rotations": ("oft", {}),
    "multi subspace": ("said", {"d": 99, "target_modules": ["q", "q_proj"]}),
    "unmerged prefix without places": ("prefix_tuning", {"position_shift": False}),
    "prefix": ("prefix_tuning", {}), "prefix without places": ("prefix_tuning", {"position_shift": False}),
}  # fmt: skip
EACH = [(name, case) for name in ("T5", "BART") for case in CASES]
EACH += [("T5 v1.1", case) for case in ("merged", "inputs", "multi", "unmerged prompt")]  # whose head is another one


def exported(case: str, name: str, folder: Path, **how: Any) -> tuple[Any, Any, list[Any]]:
    """The model, what the export says, and the adapter of each of the prompts."""
    method, config = CASES[case]
    model, adapter = made(method, name, **config)
    form = case.split()[0]
    adapters = [adapter, moved(adapter, 7)] if form == "multi" else [adapter]
    result = export(model, adapters, folder, form, decode=True, **how)
    return model, result, [adapters[0], None, adapters[1]] if form == "multi" else adapters * len(PROMPTS)


@pytest.mark.ort
@pytest.mark.parametrize(("name", "case"), EACH)
def test_every_form(name: str, case: str, tmp_path: Path) -> None:
    """Verified in steps, rows padded on either side; and then the tokens of the specification, each row by itself."""
    model, result, each = exported(case, name, tmp_path / "out")
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert {c["what"] for c in result.cases} <= {"decoding", "no adapter, decoding", "no prefix, decoding"}
    ids = {"adapter_ids": [0, -1, 1]} if case.startswith("multi") else {}
    found = written(tmp_path / "out", PROMPTS, **ids)
    assert found == specified(model, each, PROMPTS)
    assert len({tuple(row) for row in found}) > 1


@pytest.mark.ort
@pytest.mark.parametrize("form", ["merged", "unmerged", "inputs"])
@pytest.mark.parametrize("name", ["T5", "BART, scaled"])
def test_float16_and_the_last_logits(name: str, form: str, tmp_path: Path) -> None:
    """With three layers in the decoder, and two in the encoder."""
    family, architecture, config = ENCODER_DECODERS[name]
    model = tiny(family, architecture, dtype=F32, **config)
    adapter = moved(refpeft.init("lora", {"r": 2}, model))
    result = export(model, adapter, tmp_path / "out", form, "float16", decode=True, last_logits=True)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert result.outputs["logits"] == ["batch", 1, 29]
    assert result.outputs["present.2.encoder.value"] == ["batch", 4, NEW, model.config.head_dim]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_optimum(name: str, tmp_path: Path) -> None:
    _, result, _ = exported("unmerged prompt", name, tmp_path / "out", verify=False)
    e, width = (4, 4) if name == "BART" else (6, "head_width")
    layers = 3 if name == "BART" else 2
    pairs = [(n, side) for n in range(layers) for side in ("decoder", "encoder")]
    past = [f"past_key_values.{n}.{side}.{kind}" for n, side in pairs for kind in ("key", "value")]
    assert result.encoder == {
        "inputs": {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]},
        "outputs": {"last_hidden_state": ["batch", "3 + sequence", 16]},
    }
    assert list(result.inputs) == ["input_ids", "encoder_attention_mask", "encoder_hidden_states", *past]
    assert result.inputs["input_ids"] == ["batch", "decoder_sequence"]
    assert result.inputs["encoder_hidden_states"] == ["batch", "3 + sequence", 16]
    assert result.inputs["past_key_values.0.decoder.key"] == ["batch", 4, "past_sequence", width]
    assert result.inputs["past_key_values.0.encoder.key"] == ["batch", 4, "past_encoder_sequence", width]
    assert list(result.outputs) == ["logits", *(n.replace("past_key_values", "present") for n in past)]
    assert result.outputs["present.1.decoder.key"] == ["batch", 4, "decoder_sequence + past_sequence", e]
    assert result.outputs["present.1.encoder.key"] == ["batch", 4, f"3 + {NEW}", e]


def test_both_graphs_share_the_weights(tmp_path: Path) -> None:
    """Each is stored once, and what both read has one place."""
    model = base("T5")
    export(model, None, tmp_path / "out", decode=True, verify=False)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "config.json", "decoder_model_merged.onnx", "encoder_model.onnx", "model.onnx.data", "refpeft.json",
    ]  # fmt: skip
    places: dict[str, set[Any]] = {}
    for file in (runtime.ENCODER, runtime.DECODER):
        graph = onnx.load(str(tmp_path / "out" / file), load_external_data=False).graph
        for t in graph.initializer:
            if t.external_data:
                places.setdefault(t.name, set()).add(tuple((e.key, e.value) for e in t.external_data))
    assert places.keys() == model.params.keys()
    assert all(len(found) == 1 for found in places.values())


@pytest.mark.ort
def test_weights_may_be_inside(tmp_path: Path) -> None:
    """Of each graph its own, if that is asked for."""
    model, result, each = exported("merged", "BART", tmp_path / "out", external=False)
    assert not result.external_data
    assert not (tmp_path / "out" / "model.onnx.data").exists()
    assert written(tmp_path / "out", PROMPTS) == specified(model, each, PROMPTS)


@pytest.mark.ort
@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_is_read_once(name: str, tmp_path: Path) -> None:
    """What the first step made of it is used from then on: the states may be anything."""
    model, _, _ = exported("merged", name, tmp_path / "out", verify=False)
    runner = runtime.open_folder(tmp_path / "out")
    assert runner.encoder is not None
    ids = np.array([[3, 1, 4, 1, 5]])
    (states,) = runner.encoder.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}).values()
    known = {seq2seq.MASK: np.ones_like(ids), seq2seq.STATES: states}
    _, *present = runner.run({"input_ids": np.array([[2, 7]]), **known, **seq2seq.start(model.config, F32, 1)}).values()
    past = dict(zip(seq2seq.caches(model.config, "past_key_values"), present, strict=True))
    then = [
        runner.run({"input_ids": np.array([[8]]), **known, seq2seq.STATES: x, **past})["logits"]
        for x in (states, np.full_like(states, np.nan))
    ]
    assert np.isfinite(then[1]).all()
    assert (then[0] == then[1]).all()


@pytest.mark.ort
@pytest.mark.parametrize("graph", ["portable", "fast"])
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_no_step_copies_what_the_encoder_made(name: str, graph: str, tmp_path: Path) -> None:
    """Nothing but its size is read outside of the attention to it, and it comes out once; whoever feeds what came out
    of every step, nothing where it is empty, gets the same answers."""
    model, _, _ = exported("merged", name, tmp_path / "out", verify=False, graph=graph)
    nodes = onnx.load(str(tmp_path / "out" / runtime.DECODER), load_external_data=False).graph.node
    read = {n.op_type for n in nodes for a in n.input if a.startswith("past_key_values") and ".encoder." in a}
    assert read == {"Shape"}
    assert sum(n.op_type == "If" for n in nodes) == model.config.num_decoder_layers
    runner = runtime.open_folder(tmp_path / "out")
    ids = np.array([[3, 1, 4, 1, 5]])
    (states,) = runner.encoded({"input_ids": ids, "attention_mask": np.ones_like(ids)}).values()
    known = {seq2seq.MASK: np.ones_like(ids), seq2seq.STATES: states}
    past = seq2seq.start(model.config, F32, 1)
    first = stepped(runner, known, past, 2)
    after = renewed(past, first, every=True)
    second = stepped(runner, known, after, 7)
    assert {a.shape[2] for n, a in first.items() if ".encoder." in n} == {5}
    assert {a.shape[2] for n, a in second.items() if ".encoder." in n} == {0}
    again, once = (stepped(runner, known, renewed(after, second, every), 9) for every in (True, False))
    assert {a.shape[2] for n, a in again.items() if ".encoder." in n} == {5}
    assert gap(once["logits"], again["logits"]) < 1e-6


def stepped(runner: runtime.Runner, known: Any, past: Any, token: int) -> dict[str, Any]:
    return runner.run({"input_ids": np.array([[token]]), **known, **past})


def renewed(past: Any, out: Any, every: bool) -> dict[str, Any]:
    """What is fed next: all that came out, or what is not kept."""
    names = seq2seq.renewed(past, first=every)
    return {**past, **{n: out[n.replace("past_key_values", "present")] for n in names}}


@pytest.mark.ort
@pytest.mark.parametrize("graph", ["portable", "fast"])
def test_an_empty_past_may_have_the_sizes_of_other_programs(graph: str, tmp_path: Path) -> None:
    """optimum's is d/h wide, which is not the width of a head in every T5; transformers.js's is that of no text."""
    model, _, _ = exported("merged", "T5", tmp_path / "out", verify=False, graph=graph)
    runner = runtime.open_folder(tmp_path / "out")
    feeds = {
        "input_ids": np.array([[0, 3], [0, 5]]), seq2seq.MASK: np.ones((2, 4), np.int64),
        seq2seq.STATES: np.random.default_rng(0).normal(size=(2, 4, 16)).astype(F32),
    }  # fmt: skip
    empty = seq2seq.start(model.config, F32, 2)
    others = [{name: np.zeros(shape, F32) for name in empty} for shape in ((2, 4, 0, 4), (0, 4, 0, 6))]
    found = [runner.run({**feeds, **past})["logits"] for past in (empty, *others)]
    assert all((logits == found[0]).all() for logits in found)


@pytest.mark.ort
def test_adapters_from_outside_are_of_both_graphs(tmp_path: Path) -> None:
    """One file, whichever of the two reads a tensor; without it, the base model."""
    model, result, _ = exported("inputs prefix", "BART", tmp_path / "out", verify=False)
    names = ["adapter.prompt_embeddings", "adapter.encoder.prompt_embeddings", "adapter.cross.prompt_embeddings"]
    assert sorted(result.optional_inputs) == sorted(names)
    assert written(tmp_path / "out", PROMPTS, bare=True) == specified(model, [None] * 3, PROMPTS)
    runner = runtime.open_folder(tmp_path / "out")
    using = runner.using(runner.load(tmp_path / "out" / "adapter.onnx_adapter"))
    assert using.encoder is not None
    assert runner.encoder is not None
    ids = np.array([[3, 1, 4]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with_it, without = (r.run(feeds)["last_hidden_state"] for r in (using.encoder, runner.encoder))
    assert gap(with_it, without) > 0.1


def test_what_does_not_write_is_refused(tmp_path: Path) -> None:
    for name, architecture in (("T5Model", "T5Model"), ("BART classifier", "BartForSequenceClassification")):
        family, own, config = ENCODER_DECODERS[name]
        with pytest.raises(ValueError, match=f"decoding needs a causal language model, and {architecture} is none"):
            export(tiny(family, own, dtype=F32, **config), None, tmp_path / "out", verify=False, decode=True)
    for form, method, message in (
        ("prefix", "lora", "needs an adapter that is a prefix"),
        ("merged", "prompt_tuning", "has no merge"),
        ("multi", "prompt_tuning", "makes a row longer"),
    ):  # fmt: skip
        model, adapter = made(method, "T5")
        with pytest.raises(ValueError, match=message):
            export(model, adapter, tmp_path / "out", form, verify=False, decode=True)
    assert not (tmp_path / "out").exists()
