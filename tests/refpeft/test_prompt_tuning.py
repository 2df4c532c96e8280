"""Prompt tuning: its claims, how prompts begin, what is done with them, and HF peft in float64."""

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft.checkpoint import prompts as folders
from refpeft.checkpoint.safetensors import read
from refpeft.methods import prompt_tuning
from refpeft.prompts import P, ensemble, own_grads, table
from tests.models import tiny
from tests.refpeft.equal import EXACT, same
from tests.refpeft.soft import HF, both, hf_base, hf_load, hf_run

N = 3
rng = np.random.default_rng(0)
IDS = rng.integers(2, 29, (2, 6))
MODELS = [
    ("gpt2", "LMHeadModel"),
    ("llama", "ForCausalLM"),
    ("bert", "ForSequenceClassification"),
    ("roberta", "ForMaskedLM"),
]
models = pytest.mark.parametrize(("family", "architecture"), MODELS)


def fresh(model: Any, seed: int = 0, **config: Any) -> refpeft.Adapter:
    return refpeft.init("prompt_tuning", {"num_virtual_tokens": N, **config}, model, seed)


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@models
@pytest.mark.parametrize("placement", ["before", "after_embedding"])
def test_gradients_are_exact(family: str, architecture: str, placement: str) -> None:
    """PT1, and of the base under it."""
    model = tiny(family, architecture)
    if family == "llama" and placement != "before":
        with pytest.raises(ValueError, match="needs a model with learned positions, which llama models do not have"):
            fresh(model, placement=placement)
        return
    adapter = fresh(model, placement=placement)
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == {P} | set(model.params)
    assert max(found.values()) <= EXACT


@models
def test_a_prompt_of_words_is_words(family: str, architecture: str) -> None:
    """PT3, PT1: the same output, and the gradient of a row is what the words got; padding on the right included."""
    model = tiny(family, architecture)
    words = [4, 9, 4]
    adapter = fresh(model, prompt_tuning_init="TEXT", init_token_ids=words)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    ids = np.where(mask, IDS, model.config.pad_token_id or 0)
    before = np.tile(words, (2, 1))
    wide, wide_mask = np.concatenate([before, ids], 1), np.concatenate([np.ones_like(before), mask], 1)
    out, vjp = model(ids, adapter, mask)
    want, vjp_words = model(wide, None, wide_mask)
    same(out, want)
    dout = rng.normal(size=out.shape)
    E = model.sites["embed.token"].weight
    dE = vjp_words(dout, base=[E])[1][E]
    grads, base = vjp(dout, base=[E])
    scattered = np.zeros_like(dE)
    np.add.at(scattered, words, grads[P])
    same(base[E] + scattered, dE)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_that_is_masked_changes_nothing(family: str, left: bool) -> None:
    """PT5"""
    model = tiny(family)
    adapter = fresh(model)
    short, _ = model(IDS[:, :4], adapter)
    places = np.arange(4)[None]
    pad = np.zeros((2, 2), int)
    if left:
        ids, mask = np.concatenate([pad, IDS[:, :4]], 1), np.array([[0, 0, 1, 1, 1, 1]] * 2)
        out, _ = model(ids, adapter, mask, None, np.concatenate([[[0, 0]], places], 1))
        same(np.delete(out, [N, N + 1], 1), short)
    else:
        ids, mask = np.concatenate([IDS[:, :4], pad], 1), np.array([[1, 1, 1, 1, 0, 0]] * 2)
        same(model(ids, adapter, mask)[0][:, :-2], short)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_second_half_of_two_submodules_is_idle(family: str) -> None:
    """PT4"""
    model = tiny(family)
    one, two = fresh(model), fresh(model, num_transformer_submodules=2)
    assert two.params[P].shape == (2 * N, 16)
    two = two.replace(params={P: np.concatenate([one.params[P], two.params[P][N:]])})
    (out1, vjp1), (out2, vjp2) = model(IDS, one), model(IDS, two)
    same(out2, out1)
    g = vjp2(np.ones_like(out2))[P]
    same(g[:N], vjp1(np.ones_like(out1))[P])
    assert not g[N:].any()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_inserts_the_prompt_once(family: str) -> None:
    model = tiny(family)
    for placement in ("before", "after_embedding") if family == "gpt2" else ("before",):
        adapter = fresh(model, placement=placement)
        whole, _ = model(IDS, adapter)
        out, cache = model.decode(IDS[:, :3], None, adapter)
        same(out, whole[:, : N + 3])
        for t in range(3, 6):
            out, cache = model.decode(IDS[:, t : t + 1], cache, adapter, np.ones((2, t + 1), int))
            same(out[:, 0], whole[:, N + t])


def test_behind_the_embedding_tokens_keep_their_positions() -> None:
    """And the prompt is neither normed nor given a type: in BERT, rows that are what the embeddings make of words in
    their places change nothing."""
    model = tiny("bert", vocab_size=29)
    E, places = table(model), model.params[model.sites["embed.position"].weight]
    types = model.params[model.sites["embed.type"].weight]
    g, b = (getattr(model.sites["embed.norm"], n) for n in ("weight", "bias"))
    words = [7, 8, 9]
    rows = refpeft.init("prompt_tuning", {"num_virtual_tokens": N}, model).params[P]
    x = E[words] + places[:N] + types[0]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + model.config.norm_eps)
    rows = x * model.params[g] + model.params[b]
    adapter = fresh(model, placement="after_embedding").replace(params={P: rows})
    want, _ = model(
        np.concatenate([np.tile(words, (2, 1)), IDS], 1), None, None, None, np.r_[0:N, 0:6][None].astype(int)
    )
    same(model(IDS, adapter)[0], want)


def test_a_classifier_reads_the_last_token_wherever_the_prompt_stands() -> None:
    model = tiny("gpt2", "ForSequenceClassification")
    ids = np.concatenate([IDS, np.zeros((2, 2), int)], 1)
    for placement in ("before", "after_embedding"):
        adapter = fresh(model, placement=placement)
        same(model(ids, adapter, (ids > 0) + 0)[0], model(IDS, adapter)[0])


# ── ensembles, votes, reading ────────────────────────────────────────────────────────────────────────────────────────


@models
def test_an_ensemble_in_one_pass_is_its_members(family: str, architecture: str) -> None:
    """PT2: outputs and gradients, with padding and positions; members of two halves included."""
    model = tiny(family, architecture)
    members = [fresh(model, seed, num_transformer_submodules=1 + seed // 2) for seed in range(3)]
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    out, vjp = refpeft.ensembled(model, members, IDS, attention_mask=mask, position_ids=None)
    dout = rng.normal(size=out.shape)
    for k, (member, grads) in enumerate(zip(members, vjp(dout), strict=True)):
        one, vjp_one = model(IDS, member, mask)
        same(out[k], one)
        same(grads[P], vjp_one(dout[k])[P])


def test_rows_say_which_prompt_a_row_has() -> None:
    """PT2"""
    model = tiny("gpt2")
    members = [fresh(model, seed) for seed in range(2)]
    joint = ensemble(members).replace(rows=[1, 0])
    out, _ = model(IDS, joint)
    same(out[0], model(IDS, members[1])[0][0])
    same(out[1], model(IDS, members[0])[0][1])
    assert max(refpeft.check_model(model, IDS, joint).values()) <= EXACT
    with pytest.raises(ValueError, match="holds 2 prompts, so `rows` must say which one"):
        model(IDS, joint.replace(rows=None))
    with pytest.raises(ValueError, match=r"rows must name one of 2 prompts \(0 to 1\), found \[0 2\]"):
        model(IDS, joint.replace(rows=[0, 2]))
    with pytest.raises(ValueError, match="a prompt is given for each of 3 rows, but the batch has 2"):
        model(IDS, joint.replace(rows=[0, 1, 1]))
    with pytest.raises(ValueError, match="an ensemble needs prompts of one length"):
        ensemble([members[0], fresh(model, num_virtual_tokens=2)])
    with pytest.raises(ValueError, match="2 adapters bring a prompt"):
        model(IDS, members)


@pytest.mark.parametrize("placement", ["before", "after_embedding"])
def test_positions_that_are_given_are_the_tokens_in_every_step(placement: str) -> None:
    """PT5, with keys and values kept: the tokens stand where the whole sequence has them."""
    model = tiny("gpt2")
    adapter = fresh(model, placement=placement)
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    places = np.maximum(mask.cumsum(1) - 1, 0)
    whole, _ = model(IDS, adapter, mask, position_ids=places)
    _, cache = model.decode(IDS[:, :4], None, adapter, mask[:, :4], places[:, :4])
    last, _ = model.decode(IDS[:, 4:], cache, adapter, mask, places[:, 4:])
    same(last, whole[:, -2:])
    room = model.params["transformer.wpe.weight"].shape[0]
    with pytest.raises(ValueError, match="position_ids holds"):
        model(IDS, adapter, position_ids=places + room - 5 - (placement == "before"))


def test_votes() -> None:
    assert refpeft.vote(np.array([[0, 2, 5], [1, 2, 5], [1, 2, 4]])).tolist() == [1, 2, 5]
    assert refpeft.vote(np.array([[3], [1]])).tolist() == [1]  # of several, the smallest
    assert refpeft.vote(np.array([[[0, 1], [1, 1]]] * 3)).shape == (2, 2)


def test_the_nearest_words() -> None:
    """In float64 as scikit-learn's NearestNeighbors would have it: by the definition."""
    E = np.concatenate([rng.normal(size=(20, 5)), np.zeros((1, 5))])
    rows = np.stack([3 * E[4], -E[7] / 9, E[1] + 1e-3, np.zeros(5)])
    ids, cos = refpeft.nearest(rows, E, 3)
    assert (ids[0, 0], ids[2, 0]) == (4, 1)
    assert 7 not in ids[1]
    assert cos[0, 0] == pytest.approx(1)
    want = [[float(p @ e) / max(np.linalg.norm(p) * np.linalg.norm(e), 1e-300) for e in E] for p in rows]
    same(cos, -np.sort(-np.array(want), axis=1)[:, :3])
    assert (cos[3] == 0).all()
    half, _ = refpeft.nearest(rows.astype(np.float16), E.astype(ml_dtypes.bfloat16), 1)
    assert half[0, 0] == 4


# ── how a prompt begins ──────────────────────────────────────────────────────────────────────────────────────────────


def test_initialisations() -> None:
    model = tiny("gpt2", vocab_size=2000, n_embd=16)
    E = table(model)
    n = 400
    normal = fresh(model, num_virtual_tokens=n).params[P]
    assert normal.shape == (n, 16)
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
    uniform = fresh(model, num_virtual_tokens=n, prompt_tuning_init="UNIFORM").params[P]
    assert np.abs(uniform).max() <= 0.5
    assert abs(uniform.std() - 12**-0.5) < 0.01
    common = fresh(model, num_virtual_tokens=n, prompt_tuning_init="SAMPLE_VOCAB", init_vocab_size=500).params[P]
    found = [np.flatnonzero((p == E).all(1))[0] for p in common]
    assert max(found) < 500
    assert len(set(found)) == n  # each at most once, from the most common
    again = fresh(model, num_virtual_tokens=n, prompt_tuning_init="SAMPLE_VOCAB", init_vocab_size=10).params[P]
    assert {np.flatnonzero((p == E).all(1))[0] for p in again} == set(range(10))
    everywhere = fresh(model, num_virtual_tokens=n, prompt_tuning_init="SAMPLE_VOCAB").params[P]
    assert max(np.flatnonzero((p == E).all(1))[0] for p in everywhere) > 1500


def test_class_labels_come_first_and_the_rest_is_sampled() -> None:
    model = tiny("gpt2")
    E = table(model)
    labels = {"prompt_tuning_init": "CLASS_LABELS", "init_label_ids": [[5], [6, 8, 7]], "init_vocab_size": 4}
    rows = fresh(model, num_virtual_tokens=5, **labels).params[P]
    np.testing.assert_array_equal(rows[0], E[5])
    same(rows[1], (E[6] + E[7] + E[8]) / 3)
    assert all((E[:4] == p).all(1).any() for p in rows[2:])
    assert len(fresh(model, num_virtual_tokens=1, **labels).params[P]) == 1  # those that do not fit are left out


def test_text_is_repeated_or_cut() -> None:
    model = tiny("gpt2")
    E = table(model)
    for n, words in ((2, [7, 8]), (5, [7, 8, 9, 7, 8])):
        text = fresh(model, num_virtual_tokens=n, prompt_tuning_init="TEXT", init_token_ids=(7, 8, 9)).params[P]
        np.testing.assert_array_equal(text, E[words])
    assert fresh(tiny("gpt2", dtype=np.float32)).params[P].dtype == np.float32
    assert fresh(tiny("gpt2", dtype=ml_dtypes.bfloat16)).params[P].dtype == np.float32


def test_a_half_precision_model_keeps_its_dtype() -> None:
    model = tiny("gpt2", dtype=np.float16)
    adapter = fresh(model)
    out, vjp = model(IDS, adapter)
    assert out.dtype == np.float16
    assert vjp(np.ones_like(out))[P].dtype == np.float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, found 0"),
        ({"num_transformer_submodules": -1}, "num_transformer_submodules must be a positive integer, found -1"),
        ({"token_dim": 7}, "token_dim must be the width of the model, 16, found 7"),
        ({"placement": "behind"}, "placement must be one of before, after_embedding, template, found 'behind'"),
        ({"prompt_tuning_init": "ZERO"}, "prompt_tuning_init must be one of RANDOM, UNIFORM"),
        ({"prompt_tuning_init": "SAMPLE_VOCAB", "init_vocab_size": 0}, "init_vocab_size must be a positive integer"),
        ({"prompt_tuning_init": "SAMPLE_VOCAB", "init_vocab_size": 30}, "at most the size of the vocabulary, 29"),
        ({"prompt_tuning_init": "TEXT"}, "init_token_ids must hold the token ids that the prompt starts from"),
        ({"prompt_tuning_init": "TEXT", "init_token_ids": [29]}, "init_token_ids holds 29, and the vocabulary has 29"),
        ({"prompt_tuning_init": "TEXT", "init_token_ids": [-1]}, "init_token_ids holds -1, and the vocabulary has 29"),
        ({"prompt_tuning_init": "CLASS_LABELS"}, "'CLASS_LABELS' needs init_label_ids"),
        ({"prompt_tuning_init": "CLASS_LABELS", "init_label_ids": [[]]}, r"init_label_ids\[0\] must hold the token"),
        ({"modules_to_save": ["nothing"]}, "matches no module"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(tiny("gpt2"), **config)


def test_what_models_refuse() -> None:
    model = tiny("gpt2")
    adapter = fresh(model)
    with pytest.raises(ValueError, match=r"the prompt must have the shape \[3, 16\], found \[4, 16\]"):
        model(IDS, adapter.replace(params={P: np.zeros((4, 16))}))
    with pytest.raises(ValueError, match=r"the prompt must have the shape \[3, 16\], found \[3, 8\]"):
        model(IDS, adapter.replace(params={P: np.zeros((3, 8))}))
    with pytest.raises(ValueError, match="a sequence of 25 positions does not fit the model, which has 24"):
        model(np.zeros((1, 22), int), adapter)
    with pytest.raises(ValueError, match="prompt_tuning has no merge"):
        refpeft.merge(model, adapter)
    assert own_grads(0, {}, {(0, P)}, {P: lambda: None}) == {}
    assert prompt_tuning.plain(adapter.config, adapter.params) is adapter.params


def test_with_lora_on_the_same_embedding() -> None:
    """The rows of the prompt are its own: LoRA changes those of the vocabulary."""
    model = tiny("gpt2")
    lora = refpeft.init("lora", {"target_modules": ["wte", "c_attn"], "init_lora_weights": False}, model)
    adapters = [lora, fresh(model)]
    assert max(refpeft.check_model(model, IDS, adapters).values()) <= EXACT
    same(model(IDS, adapters)[0], refpeft.merge(model, lora)(IDS, adapters[1])[0])


# ── HF peft ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def mask_of(kind: str) -> Any:
    mask = np.ones((2, 6), int)
    if kind == "left":
        mask[1, :2] = 0
    elif kind == "right":
        mask[1, -2:] = 0
    return mask


@pytest.mark.peft
@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_it_is_hf_pefts(name: str, padding: str, tmp_path: Any) -> None:
    """Outputs and gradients, with padding on either side; where the masked places are not compared, nor what HF peft
    reads from them (see "Where implementations differ")."""
    import peft

    m, model, adapter = both(name, peft.PromptTuningConfig(task_type=name.split()[0], num_virtual_tokens=N), tmp_path)
    mask = mask_of(padding)
    if padding != "none" and (name, padding) in {
        ("SEQ_CLS of gpt2", "right"),
        ("FEATURE_EXTRACTION of roberta", "left"),
    }:
        assert not np.allclose(
            model(np.where(mask, IDS, model.config.pad_token_id), adapter, mask)[0], hf_run(m, IDS, mask)
        )
        return
    ids = np.where(mask, IDS, model.config.pad_token_id or 0)
    out, vjp = model(ids, adapter, mask)
    dout = rng.normal(size=out.shape)
    if out.ndim == 3:
        dout *= np.concatenate([np.ones((2, N)), mask], 1)[..., None]
    want, grads = hf_run(m, ids, mask, dout)
    tolerance = 1e-6 if "llama" in name else EXACT  # HF computes rotary positions and norms in float32
    seen = np.ones(out.shape, bool) if out.ndim == 2 else np.concatenate([np.ones((2, N)), mask], 1) > 0
    same(out[seen], want[seen], tolerance)
    ours = vjp(dout)
    same(ours.pop(P), grads.pop("prompt_encoder.default.embedding.weight"), tolerance)
    theirs = {n.removeprefix("base_model.").replace("modules_to_save.default.", ""): g for n, g in grads.items()}
    assert set(ours) == set(theirs)
    for n, g in ours.items():
        same(g, theirs[n], tolerance)


@pytest.mark.peft
@pytest.mark.parametrize(
    ("name", "init"),
    [(name, "RANDOM") for name in HF] + [("CAUSAL_LM of gpt2", init) for init in ("UNIFORM", "TEXT", "CLASS_LABELS")],
)
def test_folders_both_ways(name: str, init: str, tmp_path: Any) -> None:
    """Bit for bit, both ways; and how a prompt began does not keep HF peft from reading it."""
    import peft

    task = name.split()[0]
    _, model, theirs = both(name, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N), tmp_path)
    tensors = read(tmp_path / "theirs/adapter_model.safetensors")
    refpeft.save_adapter(theirs, tmp_path / "again")
    again = read(tmp_path / "again/adapter_model.safetensors")
    assert {n: (a.shape, a.tobytes()) for n, a in tensors.items()} == {
        n: (a.shape, a.tobytes()) for n, a in again.items()
    }
    starts = {"init_token_ids": [3, 4], "init_label_ids": [[3]], "prompt_tuning_init": init}
    heads = {"modules_to_save": ["classifier", "score"]} if task == "SEQ_CLS" else {}
    ours = fresh(model, **starts, **heads)
    assert ours.config.task_type == task
    refpeft.save_adapter(ours, tmp_path / "ours")
    back = refpeft.load_adapter(tmp_path / "ours", model)
    assert back.params.keys() == ours.params.keys()
    assert all(np.array_equal(back.params[n], a) for n, a in ours.params.items())
    loaded = hf_load(hf_base(name), tmp_path / "ours")
    tolerance = 1e-6 if "llama" in name else EXACT
    # HF peft keeps prompts in float32 while it loads
    rounded = ours.replace(params={n: a.astype(np.float32).astype(np.float64) for n, a in ours.params.items()})
    want = model(IDS, rounded)[0]
    same(want, hf_run(loaded, IDS, np.ones_like(IDS)), 1e-6 if heads else tolerance)


@pytest.mark.peft
def test_text_starts_as_in_hf_peft(tmp_path: Any) -> None:
    """The tokenizer's special tokens included."""
    import peft
    import tokenizers
    from tokenizers import models as kinds
    from tokenizers import pre_tokenizers, processors

    words = {w: k for k, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "is", "it", "good"])}
    t = tokenizers.Tokenizer(kinds.WordLevel(words, "[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    t.enable_truncation(2)
    t.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    config = {
        "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is it good", "tokenizer_name_or_path": str(tmp_path),
        "num_virtual_tokens": 7,
    }  # fmt: skip
    started = folders.with_text(config)
    assert started["init_token_ids"] == [2, 4, 5, 6, 3]
    _, model, theirs = both(
        "CAUSAL_LM of gpt2", peft.PromptTuningConfig(task_type="CAUSAL_LM", **config), tmp_path / "folders"
    )
    ours = refpeft.init("prompt_tuning", started, model)
    np.testing.assert_array_equal(ours.params[P].astype(np.float32), theirs.params[P].astype(np.float32))
    refpeft.save_adapter(ours, tmp_path / "text")
    saved = json.loads((tmp_path / "text/adapter_config.json").read_text())
    assert saved["prompt_tuning_init"] == "TEXT"
    assert "init_token_ids" not in saved
    assert peft.PeftConfig.from_pretrained(tmp_path / "text").prompt_tuning_init_text == "is it good"
    assert folders.with_text({"prompt_tuning_init": "RANDOM"}) == {"prompt_tuning_init": "RANDOM"}
    for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
        with pytest.raises(ValueError, match=f"'TEXT' needs {name}, found None"):
            folders.with_text(config | {name: None})
    with pytest.raises(ValueError, match="tokenizer_kwargs are not supported"):
        folders.with_text(config | {"tokenizer_kwargs": {"add_prefix_space": True}})
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
        folders.with_text(config | {"tokenizer_name_or_path": str(tmp_path / "text")})


def test_folders_that_are_refused(tmp_path: Any) -> None:
    model = tiny("bert", "ForSequenceClassification")
    adapter = fresh(model, modules_to_save=["classifier"])
    refpeft.save_adapter(adapter, tmp_path / "good")
    raw = json.loads((tmp_path / "good/adapter_config.json").read_text())
    tensors = read(tmp_path / "good/adapter_model.safetensors")
    refused = [
        (raw, {n: a for n, a in tensors.items() if n != P}, "tensor 'prompt_embeddings' is missing"),
        (raw, {**tensors, P: np.zeros((2, 16))}, r"'prompt_embeddings': expected shape \[3, 16\], found \[2, 16\]"),
        (raw, {**tensors, P: np.zeros((3, 16), int)}, "'prompt_embeddings': expected a float dtype, found int64"),
        (raw, {**tensors, "base_model.bert.x": np.zeros(1)}, "'base_model.bert.x' is not one that this adapter has"),
        (raw | {"num_virtual_tokens": "3"}, tensors, "adapter_config.json: num_virtual_tokens must be"),
        (raw | {"surprise": 1}, tensors, "'surprise' is set to 1, which is not supported"),
        (raw | {"token_dim": 99}, tensors, "token_dim must be the width of the model, 16, found 99"),
        (raw | {"modules_to_save": 7}, tensors, "modules_to_save must be"),
    ]
    for config, found, message in refused:
        with pytest.raises(ValueError, match=message):
            folders.read(config, found, model)
    with pytest.raises(ValueError, match="an adapter of 2 prompts has no HF folder"):
        refpeft.save_adapter(ensemble([fresh(model)] * 2), tmp_path / "joint")
    elsewhere = fresh(model, placement="after_embedding")
    refpeft.save_adapter(elsewhere, tmp_path / "elsewhere")
    assert refpeft.load_adapter(tmp_path / "elsewhere", model).config == elsewhere.config
