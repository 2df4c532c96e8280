"""Methods on encoder-decoders: exact gradients, merging, what each of them takes hold of, and what is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import Adapter, Model, selection
from refpeft.method import DEFAULT_TARGETS
from refpeft.ops import attention
from refpeft.stacks import attentions, task_type
from tests.models import ENCODER_DECODERS, tiny

Array = np.ndarray[Any, Any]
IDS = np.array([[5, 9, 3, 7, 2, 8], [6, 4, 2, 11, 3, 2]])
GIVEN = {"decoder_input_ids": np.array([[0, 12, 5, 21, 7], [0, 8, 9, 3, 20]])}
LORA = {"r": 2, "init_lora_weights": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {**LORA}),
    "lora on all": ("lora", {**LORA, "target_modules": "all-linear", "bias": "all", "lora_alpha": 3}),
    "lora on what is shared": ("lora", {**LORA, "target_modules": ["shared", "relative_attention_bias", "lm_head"]}),
    "rslora": ("rslora", {**LORA}),
    "dora": ("dora", {**LORA, "target_modules": "all-linear"}),
    "did": ("did", {"d": 7}),
    "did on norms": ("did", {"d": 5, "target_modules": r".*norm.*"}),
    "said": ("said", {"d": 130}),
    "ln_tuning": ("ln_tuning", {}),
    "partial": ("partial", {"layers": 1}),
    "partial, tied": ("partial", {"layers": 2, "tied": True}),
    "full": ("full", {}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": [3, 7, 12]}),
    "prompt_tuning": ("prompt_tuning", {"num_virtual_tokens": 2}),
    "p_tuning": ("p_tuning", {"num_virtual_tokens": 2, "encoder_hidden_size": 4}),
    "prefix_tuning": ("prefix_tuning", {"num_virtual_tokens": 2}),
    "prefix_tuning, by an MLP": ("prefix_tuning", {"num_virtual_tokens": 2, "prefix_projection": True}),
    "prefix_tuning, unplaced": ("prefix_tuning", {"num_virtual_tokens": 2, "position_shift": False}),
    "bitfit": ("bitfit", {}),
}  # fmt: skip
NAMES = ["T5", "T5 v1.1", "BART", "BART, scaled"]
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
PAIRS = [(n, c) for n in NAMES for c in CASES if not (c == "bitfit" and n.startswith("T5"))]


def model_of(name: str, **more: Any) -> Model:
    family, architecture, config = ENCODER_DECODERS[name]
    return tiny(family, architecture, **{**config, **more})


def made(name: str, case: str) -> tuple[Model, Adapter]:
    """With all parameters moved from where they start."""
    model, (method, config) = model_of(name), CASES[case]
    fresh = refpeft.init(method, config, model)
    rng = np.random.default_rng(3)
    return model, fresh.replace(params={n: v + 0.1 * rng.normal(size=v.shape) for n, v in fresh.params.items()})


def same(a: Array, b: Array, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1))


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in PAIRS if n in ("T5 v1.1", "BART, scaled")])
def test_gradients_are_exact(name: str, case: str) -> None:
    model, adapter = made(name, case)
    found = refpeft.check_model(model, IDS, adapter, **GIVEN)
    assert found.keys() == adapter.params.keys()
    assert max(found.values()) <= 1e-12
    out, vjp = model(IDS, adapter, **GIVEN)
    assert any(d.any() for d in vjp(np.random.default_rng(0).normal(size=out.shape)).values())


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in PAIRS if CASES[c][0] not in PROMPTS])
def test_merging_changes_nothing(name: str, case: str) -> None:
    """L2, and its like of every method that merges; tensors that both change alike stay one."""
    model, adapter = made(name, case)
    merged = refpeft.merge(model, adapter)
    same(merged(IDS, **GIVEN)[0], model(IDS, adapter, **GIVEN)[0])
    assert merged.params.keys() - model.params.keys() <= {"lm_head.weight"}


def test_default_targets_are_those_of_hf_peft() -> None:
    for family in ("t5", "bart"):
        adapter = refpeft.init("lora", {}, tiny(family, "ForConditionalGeneration"))
        assert adapter.config.target_modules == DEFAULT_TARGETS[family]
        assert len(adapter.params) == 2 * 2 * (2 + 3 + 3)  # A and B of q and v: own of both stacks, and cross


@pytest.mark.peft
def test_default_targets_agree_with_hf_peft() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    assert {f: tuple(THEIRS[f]) for f in ("t5", "bart")} == {f: DEFAULT_TARGETS[f] for f in ("t5", "bart")}


# ── what each method takes hold of ───────────────────────────────────────────────────────────────────────────────────


def test_partial_trains_the_last_layers_of_both_stacks() -> None:
    model, adapter = made("T5", "partial")
    expected = {n for n in model.params if ".block.1." in n and n.startswith("encoder.")}
    expected |= {n for n in model.params if ".block.2." in n}
    assert adapter.params.keys() == expected | {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
    model, tied = made("BART", "partial, tied")
    assert "model.shared.weight" in tied.params
    assert "model.encoder.embed_positions.weight" not in tied.params
    assert not any(n.startswith("model.decoder.layers.0.") for n in tied.params)


def test_bitfit_needs_biases_and_leaves_buffers_alone() -> None:
    with pytest.raises(ValueError, match="a t5 model has no biases for BitFit to train"):
        refpeft.init("bitfit", {}, model_of("T5"))
    model, adapter = made("BART", "bitfit")
    assert adapter.params.keys() == {n for n in model.params if n.endswith(".bias")}
    assert "final_logits_bias" in model.params
    for method, config in (("full", {}), ("did", {"d": 3}), ("lora", {"bias": "all"})):
        fresh = refpeft.init(method, config, model)
        assert not any("final_logits_bias" in n or n == "lm_head.bias" for n in [*fresh.params, *fresh.frozen])


def test_selection_sees_a_shared_table_once() -> None:
    model = model_of("T5")
    assert selection.tensors(model, ["embed.token", "head.out"]) == ["shared.weight"]


def test_a_prompt_goes_into_the_encoder_alone() -> None:
    """PT3: a prompt of words is those words before the encoder's, and the decoder's stay what they are."""
    for name in NAMES:
        model = model_of(name)
        α = model.config.embed_scale
        words = np.array([9, 4, 17])
        P = α * model.params[model.sites["embed.token"].weight][words]
        adapter = refpeft.init("prompt_tuning", {"num_virtual_tokens": 3}, model).replace(
            params={"prompt_embeddings": P}
        )
        longer = np.concatenate([np.tile(words, (2, 1)), IDS], axis=1)
        out, _ = model(IDS, adapter, **GIVEN)
        assert out.shape == (2, 5, 29)
        same(out, model(longer, **GIVEN)[0])
    assert task_type(model) == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_prefixes_of_three_kinds_of_attention(name: str) -> None:
    """Each attention sees its own part of the prefix of its stack, and somebody sees every part."""
    model, adapter = made(name, "prefix_tuning")
    stacks = attentions(model)
    assert {stack: len(ats) for stack, ats in stacks.items()} == {"": 3, "encoder.": 2, "cross.": 3}
    t = model.config.num_kv_heads * model.config.head_dim
    shapes = {stack + "prompt_embeddings": (2, 2 * len(ats) * t) for stack, ats in stacks.items()}
    assert {n: v.shape for n, v in adapter.params.items()} == shapes
    out, vjp = model(IDS, adapter, **GIVEN)
    assert all(np.abs(d).max(0).all() for n, d in vjp(out).items()), "a part of a prefix is seen by nobody"


def test_px1_of_the_attention_to_the_encoder() -> None:
    """Mixed with attention to the prefix, which no bias and no mask touches."""
    rng = np.random.default_rng(0)
    q, k, v, P_K, P_V = (rng.normal(size=(1, n, 2, 4)) for n in (3, 5, 5, 2, 2))
    y, _ = attention(q, np.concatenate([P_K, k], 1), np.concatenate([P_V, v], 1), None, None, scale=1.0)
    Z, Z_P = (np.exp(np.einsum("bshe,bthe->bsht", q, x)).sum(-1)[..., None] for x in (k, P_K))
    λ = Z_P / (Z + Z_P)
    same(y, (1 - λ) * attention(q, k, v, scale=1.0)[0] + λ * attention(q, P_K, P_V, scale=1.0)[0])


def test_rows_of_a_batch_may_have_prefixes_of_their_own() -> None:
    """Relative positions of a prefix are counted from the tokens, whatever other rows have."""
    model, rng = model_of("T5"), np.random.default_rng(1)
    fresh = [refpeft.init("prefix_tuning", {"num_virtual_tokens": n}, model) for n in (2, 3)]
    one, other = (a.replace(params={k: rng.normal(size=v.shape) for k, v in a.params.items()}) for a in fresh)
    rows = [one.replace(rows=np.array([True, False])), other.replace(rows=np.array([False, True]))]
    out, _ = model(IDS, rows, **GIVEN)
    for n, own in enumerate((one, other)):
        same(out[n : n + 1], model(IDS[n : n + 1], own, decoder_input_ids=GIVEN["decoder_input_ids"][n : n + 1])[0])


def test_dropout_masks_are_for_the_tokens_that_a_layer_sees() -> None:
    """Of the encoder's length where it runs over the encoder's tokens: there, and in the keys of cross-attention."""
    model, adapter = made("BART", "lora on all")
    adapter = adapter.replace(config=dataclasses.replace(adapter.config, lora_dropout=0.4))
    with pytest.raises(ValueError, match="an encoder-decoder needs decoder_shape"):
        refpeft.dropout(adapter, model, IDS.shape)
    dropped = refpeft.dropout(adapter, model, IDS.shape, 1, (2, 5))
    lengths = {path: mask.shape[1] for path, mask in dropped.masks.items()}
    assert {n for path, n in lengths.items() if ".encoder." in path} == {6}
    assert {n for path, n in lengths.items() if path.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))} == {6}
    assert {n for path, n in lengths.items() if path.endswith(("encoder_attn.q_proj", "fc1"))} == {5, 6}
    assert lengths["model.decoder.layers.0.encoder_attn.q_proj"] == 5
    assert max(refpeft.check_model(model, IDS, dropped, **GIVEN).values()) <= 1e-12
    classifier = tiny("bart", "ForSequenceClassification")
    fresh = refpeft.init("lora", {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.4}, classifier)
    masks = refpeft.dropout(fresh, classifier, IDS.shape, 1, IDS.shape).masks
    assert masks["classification_head.dense"].shape == masks["classification_head.out_proj"].shape == (2, 16)


def test_a_prefix_has_places_where_positions_are_relative_unless_it_is_told_not_to() -> None:
    """PX5: its n places may be exchanged, but not where they are at different distances from the tokens."""
    for case, ordered in (("prefix_tuning", True), ("prefix_tuning, unplaced", False)):
        model, adapter = made("T5", case)
        turned = adapter.replace(params={n: P[::-1] for n, P in adapter.params.items()})
        out, other = model(IDS, adapter, **GIVEN)[0], model(IDS, turned, **GIVEN)[0]
        assert (np.abs(out - other).max() > 1e-3) == ordered
        if not ordered:
            same(out, other)
        tables = [n for n in model.params if "relative" in n]
        found = refpeft.check_model(model, IDS, adapter, base=tables, **GIVEN)
        assert found.keys() == adapter.params.keys() | set(tables)
        assert max(found.values()) <= 1e-12


def test_barts_positions_begin_in_the_third_row_of_their_table() -> None:
    model = model_of("BART")
    out, vjp = model(IDS, **GIVEN)
    for stack, length in (("encoder", 6), ("decoder", 5)):
        name = f"model.{stack}.embed_positions.weight"
        used = vjp(out, base=[name])[1][name].any(1)
        assert np.flatnonzero(used).tolist() == list(range(2, 2 + length))
