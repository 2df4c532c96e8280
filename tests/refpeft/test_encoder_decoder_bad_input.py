"""What is wrong with an encoder-decoder's inputs, config.json or files is said in one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint.families import describe
from refpeft.checkpoint.safetensors import Malformed, read, read_json, write, write_json
from refpeft.inputs import ends
from tests.models import config_json, tiny

Array = np.ndarray[Any, Any]
IDS, DECODED = np.array([[5, 9, 3, 2], [6, 4, 2, 11]]), np.array([[0, 12, 5], [0, 8, 9]])
ONES = np.ones_like(IDS)


@pytest.mark.parametrize(
    ("family", "inputs", "words"),
    [
        ("t5", {}, "a t5 model has a decoder, which needs decoder_input_ids"),
        ("t5", {"decoder_input_ids": DECODED[:1]}, "decoder_input_ids have 1 rows, ids 2"),
        ("t5", {"decoder_input_ids": DECODED + 20}, r"decoder_input_ids holds 32, .* 29 entries"),
        ("t5", {"decoder_input_ids": DECODED[0]}, r"decoder_input_ids must be integers .* found int64 \[3\]"),
        ("t5", {"decoder_input_ids": DECODED * 1.0}, "decoder_input_ids must be integers"),
        (
            "bart",
            {"decoder_input_ids": DECODED, "decoder_attention_mask": ONES},
            r"decoder_attention_mask must be integers \[2, 3\], found int64 \[2, 4\]",
        ),
        (
            "t5",
            {"decoder_input_ids": DECODED, "position_ids": ONES},
            "a t5 model has relative positions, but position_ids",
        ),
        ("bart", {"decoder_input_ids": np.zeros((2, 25), int)}, "25 positions does not fit the model, which has 24"),
        ("bart", {"decoder_input_ids": DECODED, "position_ids": ONES + 23}, "position_ids holds 24"),
        ("bart", {"token_type_ids": ONES}, "a bart model has no token types"),
    ],
)
def test_inputs(family: str, inputs: dict[str, Array], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(family, "ForConditionalGeneration")(IDS, **inputs)


@pytest.mark.parametrize(
    ("method", "config"),
    [("lora", {"target_modules": ["relative_attention_bias"]}), ("did", {"d": 5}), ("full", {})],
)
def test_a_table_that_all_rows_share_is_not_adapted_for_some(method: str, config: dict[str, Any]) -> None:
    """T5's biases of relative positions. What leaves them alone gives each row what it gives it alone."""
    model = tiny("t5", "ForConditionalGeneration")
    adapter = refpeft.init(method, config, model)
    with pytest.raises(ValueError, match="relative_attention_bias is one table for all rows of a batch"):
        model(IDS, refpeft.by_row([adapter], np.array([0, -1])), decoder_input_ids=DECODED)
    lora = refpeft.init("lora", {"init_lora_weights": False}, model)
    got, _ = model(IDS, refpeft.by_row([lora], np.array([0, -1])), decoder_input_ids=DECODED)
    for k, own in enumerate(([lora], [])):
        alone, _ = model(IDS[k : k + 1], own, decoder_input_ids=DECODED[k : k + 1])
        assert np.allclose(got[k], alone[0], rtol=0, atol=1e-12)


def test_a_model_of_one_stack_takes_no_input_for_a_decoder() -> None:
    for given in ({"decoder_input_ids": DECODED}, {"decoder_attention_mask": DECODED}):
        with pytest.raises(ValueError, match=f"a gpt2 model has no decoder of its own, but {next(iter(given))}"):
            tiny("gpt2")(IDS, **given)


def test_a_classifier_needs_the_end_of_text_in_every_row() -> None:
    """Of several, the last counts."""
    assert ends(2, np.array([[2, 5, 2, 1], [2, 1, 1, 1]])).tolist() == [2, 0]
    with pytest.raises(ValueError, match="every row of ids must hold eos_token_id 2"):
        tiny("bart", "ForSequenceClassification")(np.array([[5, 2], [5, 5]]))


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("t5", {"feed_forward_proj": "gated-foo"}, r"feed_forward_proj must be one of .*, found 'gated-foo'"),
        ("t5", {"feed_forward_proj": "soft-gelu"}, r"feed_forward_proj must be one of .*, found 'soft-gelu'"),
        ("t5", {"is_decoder": True}, "is_decoder must be False, found True"),
        ("t5", {"relative_attention_num_buckets": 2}, "2 relative_attention_num_buckets do not fit"),
        ("t5", {"relative_attention_max_distance": 4}, "8 relative_attention_num_buckets do not fit"),
        ("t5", {"d_kv": 0}, "d_kv must be a positive integer, found 0"),
        ("t5", {"num_decoder_layers": -1}, "num_decoder_layers must be a positive integer"),
        ("bart", {"decoder_attention_heads": 2}, "decoder_attention_heads must be 4, found 2"),
        ("bart", {"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "attention_heads must divide d_model"),
        ("bart", {"activation_function": "mish"}, "activation_function must be one of"),
        ("bart", {"scale_embedding": 1}, "scale_embedding must be true or false"),
        ("bart", {"normalize_before": True}, "normalize_before must be False"),
        ("t5", {"architectures": ["T5ForTokenClassification"]}, "the architecture must end in one of"),
    ],
)  # fmt: skip
def test_config_json(family: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        describe(config_json(family, "ForConditionalGeneration") | config)


def changed(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None, family: str = "t5") -> Path:
    """The files of a tiny model with other tensors (None: without it)."""
    refpeft.save(tiny(family, "ForConditionalGeneration"), folder)
    found = {n: np.array(a) for n, a in read(folder / "model.safetensors").items()} | tensors  # files are mapped
    write(folder / "model.safetensors", {n: a for n, a in found.items() if a is not None})
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **(config or {})})
    return folder


def test_copies_of_the_shared_table_must_be_copies(tmp_path: Path) -> None:
    E = tiny("t5", "ForConditionalGeneration").params["shared.weight"]
    model = refpeft.load(changed(tmp_path / "a", {"encoder.embed_tokens.weight": E, "lm_head.weight": E}))
    assert "encoder.embed_tokens.weight" not in model.params
    refpeft.load(changed(tmp_path / "b", {"shared.weight": None, "decoder.embed_tokens.weight": E}))
    with pytest.raises(Malformed, match=r"encoder.embed_tokens.weight' differs from 'shared.weight', of which"):
        refpeft.load(changed(tmp_path / "c", {"encoder.embed_tokens.weight": E + 1}))
    with pytest.raises(Malformed, match=r"config.json ties them: set tie_word_embeddings to false"):
        refpeft.load(changed(tmp_path / "d", {"lm_head.weight": E + 1}))


def test_transformers_5_calls_every_t5_tied(tmp_path: Path) -> None:
    """It unties the head if the file has one that differs: what the tie once meant is in scale_decoder_outputs."""
    E = tiny("t5", "ForConditionalGeneration").params["shared.weight"]
    for scale in (False, True):
        config = {"tie_word_embeddings": True, "scale_decoder_outputs": scale}
        untied = refpeft.load(changed(tmp_path / f"untied {scale}", {"lm_head.weight": E + 1}, config))
        tied = refpeft.load(changed(tmp_path / f"tied {scale}", {}, config))
        assert "lm_head.weight" in untied.params
        assert "lm_head.weight" not in tied.params
        assert untied.config.head == tied.config.head == ("scale", "head.out")[0 if scale else 1 :]


def test_the_bias_of_the_logits_is_a_row_in_files_and_may_be_absent(tmp_path: Path) -> None:
    model = tiny("bart", "ForConditionalGeneration")
    refpeft.save(model, tmp_path / "m")
    assert read(tmp_path / "m/model.safetensors")["final_logits_bias"].shape == (1, 29)
    assert refpeft.load(tmp_path / "m").params["final_logits_bias"].shape == (29,)
    without = refpeft.load(changed(tmp_path / "n", {"final_logits_bias": None}, family="bart"))
    out, whole = without(IDS)[0], model(IDS)[0]
    np.testing.assert_allclose(out + model.params["final_logits_bias"], whole, rtol=0, atol=1e-12)
    refpeft.save(without, tmp_path / "again")


def test_files_saved_without_a_head_are_read_with_one(tmp_path: Path) -> None:
    """facebook/bart-base names its tensors like BartModel; a T5 encoder may come from a whole T5."""
    whole = tiny("bart", "ForConditionalGeneration")
    bare = {n.removeprefix("model."): a for n, a in whole.params.items() if n != "final_logits_bias"}
    (tmp_path / "bart").mkdir()
    write(tmp_path / "bart/model.safetensors", bare)
    write_json(tmp_path / "bart/config.json", whole.source)
    assert refpeft.load(tmp_path / "bart").params.keys() == whole.params.keys() - {"final_logits_bias"}
    t5 = changed(tmp_path / "t5", {}, {"architectures": ["T5EncoderModel"]})
    encoder = refpeft.load(t5)
    assert not encoder.config.encoder_decoder
    assert all(n.startswith("encoder.") or n == "shared.weight" for n in encoder.params)


def test_an_encoder_cannot_decode() -> None:
    with pytest.raises(ValueError, match="sees all positions at once"):
        tiny("t5", "EncoderModel").decode(IDS)
