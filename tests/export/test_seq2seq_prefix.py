"""--form prefix of encoder-decoders: what is a past, what is an input of its own, and what a loop has to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.export import adapters as files
from refpeft.export import seq2seq
from refpeft.export.generation import open_writer
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from refpeft.export.runtime import open_folder
from refpeft.export.verification import LIMIT
from tests.export.adapters import moved
from tests.export.graphs import gap
from tests.export.pairs import PROMPTS, base, made, specified, written

Array = np.ndarray[Any, Any]
FILE = "adapter.onnx_adapter"
ENCODER, OWN = "adapter.encoder.prompt_embeddings", "adapter.prompt_embeddings"


@pytest.mark.ort
@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_what_is_a_past_and_what_is_not(name: str, moves: bool, tmp_path: Path) -> None:
    """The decoder counts its past, so what moves no positions is none; the encoder has none. Without any of it, both
    graphs are the base model's."""
    model, adapter = made("prefix_tuning", name, position_shift=moves)
    result = export(model, adapter, tmp_path / "out", "prefix", verify=False)
    layers, e = range(model.config.num_decoder_layers or 0), model.config.head_dim
    sides = ["encoder", "decoder"][: 1 + moves]
    past = {f"past_key_values.{n}.{side}.{kind}" for n in layers for side in sides for kind in ("key", "value")}
    prefix = files.read(tmp_path / "out" / FILE)
    assert list(result.optional_inputs) == [ENCODER, OWN][: 2 - moves]
    assert prefix.keys() == past | result.optional_inputs.keys()
    assert {prefix[n].shape for n in past} == {(1, 4, 3, e)}
    wide = {ENCODER: 2 * model.config.num_layers * 4 * e, OWN: 2 * len(layers) * 4 * e}
    assert all(prefix[n].shape == (3, wide[n]) for n in result.optional_inputs)
    assert written(tmp_path / "out", PROMPTS, bare=True) == specified(model, [None] * 3, PROMPTS)
    assert written(tmp_path / "out", PROMPTS) == specified(model, [adapter] * 3, PROMPTS)


@pytest.mark.ort
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_a_loop_of_ones_own(name: str, tmp_path: Path) -> None:
    """As the page has it: rows and ones before what the encoder answered, whatever the rows hold."""
    model, adapter = made("prefix_tuning", name)
    export(model, adapter, tmp_path / "out", "prefix", verify=False)
    runner, prefix = open_folder(tmp_path / "out"), files.read(tmp_path / "out" / FILE)
    ids, target = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), np.array([[0, 7, 8], [0, 2, 2]])
    encoder = {ENCODER: prefix.pop(ENCODER)}
    assert runner.encoder is not None
    (states,) = runner.encoder.run({"input_ids": ids, "attention_mask": np.ones_like(ids), **encoder}).values()
    past = {n: np.repeat(a, 2, axis=0) for n, a in prefix.items()}
    expected = model.astype(np.float64)(ids, adapter, decoder_input_ids=target)[0]
    for filler in (0, np.nan, 7):
        rows = np.full((2, 3, states.shape[2]), filler, np.float32)
        feeds = {seq2seq.STATES: np.concatenate([rows, states], axis=1), seq2seq.MASK: np.ones((2, 8), np.int64)}
        got = runner.run({"input_ids": target, **feeds, **past})["logits"]
        assert gap(got, expected) < 1e-5


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int4"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    model, adapter = made("prefix_tuning", "BART")
    result = export(model, adapter, tmp_path / "out", "prefix", dtype, last_logits=True)
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    assert len(written(tmp_path / "out", PROMPTS)[0]) == 8


@pytest.mark.ort
def test_beside_other_adapters(tmp_path: Path) -> None:
    """Two prefixes are one longer one; LoRA and a soft prompt stay in the graphs."""
    model, adapter = made("prefix_tuning", "BART")
    lora = moved(refpeft.init("lora", {"r": 2, "modules_to_save": ["lm_head"]}, model))
    prompt = moved(refpeft.init("prompt_tuning", {"num_virtual_tokens": 2}, model))
    short = moved(refpeft.init("prefix_tuning", {"num_virtual_tokens": 2}, model), 3)
    for n, adapters in enumerate(([adapter, lora], [adapter, short], [prompt, adapter])):
        result = export(model, adapters, tmp_path / str(n), "prefix")
        assert max(c["ratio"] for c in result.cases) <= LIMIT
        ids = [[3, 1, 4, 1, 5]]
        assert written(tmp_path / str(n), ids) == specified(model, [adapters], ids)  # type: ignore[list-item]


@pytest.mark.ort
def test_another_one_for_the_same_graphs(tmp_path: Path) -> None:
    """Of another length, made from the folder alone. What a file of AdapterHub's holds moves no positions."""
    model = base("T5")
    one, other = (
        moved(refpeft.init("prefix_tuning", {"num_virtual_tokens": n, "position_shift": False}, model, n), n)
        for n in (2, 5)
    )
    export(model, one, tmp_path / "one", "prefix", verify=False)
    export(model, other, tmp_path / "other", "prefix", verify=False)
    refpeft.save_adapter(other, tmp_path / "adapter")
    adapter_only(tmp_path / "one", [tmp_path / "adapter"], tmp_path / "out.onnx_adapter")
    got, expected = files.read(tmp_path / "out.onnx_adapter"), files.read(tmp_path / "other" / FILE)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], a) for name, a in expected.items())
    found = written(tmp_path / "one", PROMPTS, tmp_path / "out.onnx_adapter")
    assert found == specified(model, [other] * 3, PROMPTS)


@pytest.mark.ort
def test_a_file_that_is_not_this_prefix_is_refused(tmp_path: Path) -> None:
    model, adapter = made("prefix_tuning", "T5")
    export(model, adapter, tmp_path / "out", "prefix", verify=False)
    prefix = files.read(tmp_path / "out" / FILE)
    for change, words in (
        ({n: a for n, a in prefix.items() if n != ENCODER}, f"it must hold .*{ENCODER}, found"),
        ({**prefix, ENCODER: prefix[ENCODER][:, 1:]}, f"{ENCODER} must have the shape"),
        ({n: a for n, a in prefix.items() if ".encoder." not in n}, "past_key_values.0.encoder.key"),
    ):
        files.write(tmp_path / "file", change)
        with pytest.raises(ValueError, match=words):
            open_writer(tmp_path / "out", tmp_path / "file")
        (tmp_path / "file").unlink()


@pytest.mark.ort
def test_layers_may_be_left_out_of_the_encoder_only(tmp_path: Path) -> None:
    """Whose prefix is no past; layers of the decoder are numbered on from it."""
    model, adapter = made("prefix_tuning", "T5", leave_out=[1], prefix_projection=False)
    result = export(model, adapter, tmp_path / "out", "prefix")
    assert max(c["ratio"] for c in result.cases) <= LIMIT
    model, adapter = made("prefix_tuning", "T5", leave_out=[2], prefix_projection=False)
    with pytest.raises(ValueError, match=r"leave_out is .2., and the past has one length in all layers"):
        export(model, adapter, tmp_path / "refused", "prefix")


@pytest.mark.ort
def test_there_must_be_places_for_it(tmp_path: Path) -> None:
    """Of 24 learned positions the prefix takes 3: of the encoder's, and of the decoder's."""
    model, adapter = made("prefix_tuning", "BART")
    export(model, adapter, tmp_path / "out", "prefix", verify=False)
    (long,) = written(tmp_path / "out", [[3] * 21], max_new_tokens=99)
    assert len(long) == 21
    with pytest.raises(ValueError, match="a prompt of 25 positions does not fit the model, which has 24"):
        written(tmp_path / "out", [[3] * 22])
