"""Vocabulary extension: claims V1 to V7 of `refpeft.vocabulary`, and what transformers and peft make of it."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import refpeft
from refpeft import Model, check_model, extend_vocabulary, train, vocabulary
from refpeft.objectives import Setting, make
from tests.models import tiny

Array = np.ndarray[Any, Any]
V, K = 29, 5
IDS = np.random.default_rng(0).integers(2, V, (3, 7))
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "LMHeadModel", {}),  # tied
    "llama": ("llama", "ForCausalLM", {}),
    "llama-tied": ("llama", "ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", "ForCausalLM", {}),
    "bert": ("bert", "ForMaskedLM", {}),  # tied, with a bias
    "roberta": ("roberta", "ForMaskedLM", {"tie_word_embeddings": False}),
}
HEADLESS = {"llama-model": ("llama", "Model", {}), "bert-classifier": ("bert", "ForTokenClassification", {})}
every_model = pytest.mark.parametrize("name", MODELS)
PIECES = [[3], [4, 5], [4, 5, 6, 6], [28, 2], [7]]


def made(name: str, seed: int = 0) -> Model:
    family, architecture, config = (MODELS | HEADLESS)[name]
    return tiny(family, architecture, seed=seed, **config)


def grown(model: Model, init: str = "mean", **options: Any) -> Model:
    return extend_vocabulary(model, PIECES if init == "subword_mean" else K, init, **options)


def tables(model: Model) -> list[str]:
    """Embedding, head and bias, by the names of their tensors."""
    E, head = model.sites["embed.token"], model.sites.get("head.out")
    names = [E.weight, head.weight, head.bias] if head and head.path != "classifier" else [E.weight]
    return [n for n in dict.fromkeys(names) if n in model.params]


def log_softmax(z: Array) -> Array:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# ── the claims ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("init", vocabulary.INITS)
@pytest.mark.parametrize("name", [*MODELS, *HEADLESS])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_old_rows_stay_to_the_bit(name: str, init: str, dtype: str) -> None:
    """V1: and all tensors that are no table of tokens are the very same."""
    from refpeft.checkpoint.models import float_dtype

    model = made(name).astype(float_dtype(dtype))
    new = grown(model, init, pad_to_multiple_of=4)
    for n, a in new.params.items():
        old = model.params[n]
        assert a.dtype == old.dtype
        if n in tables(model):
            assert a.shape == (36, *old.shape[1:])
            assert a[:V].tobytes() == old.tobytes()
        else:
            assert a is old
    assert new.params.keys() == model.params.keys()
    assert new.source == {**model.source, "vocab_size": 36}
    assert model.source["vocab_size"] == V


@pytest.mark.parametrize("init", vocabulary.INITS)
@every_model
def test_old_logits_stay(name: str, init: str) -> None:
    """V1: to the bit where rounding has no say, since each row of the head has one entry, a power of two; elsewhere
    BLAS may add in another order where there are more rows."""
    model = made(name)
    new = grown(model, init)
    np.testing.assert_allclose(new(IDS)[0][..., :V], model(IDS)[0], rtol=1e-13, atol=1e-13)
    head = model.sites["head.out"].weight
    plain = np.zeros_like(model.params[head])
    plain[np.arange(V), np.arange(V) % 16] = 2.0 ** (np.arange(V) % 5 - 2)
    model = replace(model, params={**model.params, head: plain})
    new = grown(model, init)
    out = new(IDS)[0]
    assert out.shape == (3, 7, V + K)
    assert out[..., :V].tobytes() == model(IDS)[0].tobytes()


@pytest.mark.parametrize("name", HEADLESS)
def test_without_a_head_the_output_stays_to_the_bit(name: str) -> None:
    """V1: a classifier has no row for a token."""
    model = made(name)
    assert grown(model)(IDS)[0].tobytes() == model(IDS)[0].tobytes()


@every_model
def test_new_ids_are_valid(name: str) -> None:
    """V2"""
    model, ids = made(name), np.array([[2, V, V + K - 1, 3]])
    with pytest.raises(ValueError, match=str(V)):
        model(ids)
    new = grown(model)
    assert np.isfinite(new(ids)[0]).all()
    with pytest.raises(ValueError, match=str(V + K)):
        new(ids + 1)


@every_model
def test_subword_mean(name: str) -> None:
    """V3: rows, and logits on any text."""
    model = made(name)
    new = grown(model, "subword_mean")
    for table in tables(model):
        old, rows = model.params[table], new.params[table][V:]
        for row, piece in zip(rows, PIECES, strict=True):
            np.testing.assert_allclose(row, sum(old[i] for i in piece) / len(piece), rtol=1e-14, atol=1e-15)
    logits = new(IDS)[0]
    for n, piece in enumerate(PIECES):
        np.testing.assert_allclose(logits[..., V + n], logits[..., piece].mean(-1), rtol=1e-12, atol=1e-12)


def falls(model: Model, new: Model) -> float:
    """By how much the log-probability of an old token falls at most."""
    before, after = log_softmax(model(IDS)[0]), log_softmax(new(IDS)[0])
    return float((before - after[..., :V]).max())


@pytest.mark.parametrize("padding", [None, 16])
@every_model
def test_mean_takes_little_from_old_tokens(name: str, padding: int | None) -> None:
    """V4: the bound, which is reached where all logits are equal, and which the other starts do not keep."""
    model = made(name)
    new = grown(model, pad_to_multiple_of=padding)
    k = (48 if padding else V + K) - V
    assert 0 < falls(model, new) <= np.log(1 + k / V) + 1e-12
    head = model.sites["head.out"]
    flat = replace(model, params={**model.params, head.weight: np.ones_like(model.params[head.weight])})
    if head.bias not in model.params:
        assert falls(flat, grown(flat, pad_to_multiple_of=padding)) == pytest.approx(np.log(1 + k / V), abs=1e-12)
    else:
        low = replace(model, params={**model.params, head.bias: model.params[head.bias] - 9})
        assert falls(low, grown(low)) <= np.log(1 + K / V) + 1e-12
        assert falls(low, grown(low, "normal")) > 2 * np.log(1 + K / V)


def test_the_other_starts_promise_nothing() -> None:
    """V4: a new token that is made of the likeliest one is as likely."""
    model = made("llama")
    sharp = replace(model, params={**model.params, "lm_head.weight": 9 * model.params["lm_head.weight"]})
    likeliest = [[int(i)] for i in sharp(IDS)[0].argmax(-1).ravel()]
    assert falls(sharp, extend_vocabulary(sharp, likeliest, "subword_mean")) > np.log(1 + len(likeliest) / V)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "bert"])
def test_a_tied_head_stays_tied(name: str, tmp_path: Path) -> None:
    """V5: one tensor, in memory and on disk."""
    model = made(name)
    new = grown(model, "normal")
    assert new.sites == model.sites
    assert new.sites["head.out"].weight == new.sites["embed.token"].weight
    refpeft.save(new, tmp_path / "m")
    again = refpeft.load(tmp_path / "m")
    assert again.sites == model.sites
    assert again(IDS)[0].tobytes() == new(IDS)[0].tobytes()


@pytest.mark.parametrize(
    ("new", "n", "size"), [(5, None, 34), (5, 1, 34), (5, 8, 40), (3, 8, 32), (4, 8, 40), (0, None, 29), (0, 64, 64)]
)
def test_padding(new: int, n: int | None, size: int) -> None:
    """V6"""
    model = extend_vocabulary(made("llama"), new, pad_to_multiple_of=n)
    assert model.params["lm_head.weight"].shape == (size, 16)
    assert model.source["vocab_size"] == size


class Letters:
    """A tokenizer of `count` letters, of which none stands for more than one."""

    def __init__(self, count: int) -> None:
        t = Tokenizer(models.WordLevel({chr(97 + n): n for n in range(count)}, unk_token="a"))
        t.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        self.encode, self.get_vocab = t.encode, t.get_vocab


def test_rows_that_no_token_has_are_taken_first() -> None:
    """V2, V6: 20 tokens, 29 rows: ids go on from 20, the means are over 20 rows, and the rest is padding as it was."""
    model = made("roberta")
    new = extend_vocabulary(model, ["bad", "cab", "dada", "be"], "subword_mean", Letters(20))
    for table in tables(model):
        old, now = model.params[table], new.params[table]
        assert now.shape == old.shape
        assert np.array_equal(np.delete(now, range(20, 24), axis=0), np.delete(old, range(20, 24), axis=0))
        np.testing.assert_allclose(now[20], (old[1] + old[0] + old[3]) / 3, rtol=1e-14, atol=1e-15)
    more = extend_vocabulary(model, [f"{c}a" for c in "abcdefghijkl"], tokenizer=Letters(20), pad_to_multiple_of=6)
    assert more.source["vocab_size"] == 36
    for table in tables(model):
        mean = model.params[table][:20].mean(0)
        np.testing.assert_allclose(more.params[table][20:], np.broadcast_to(mean, more.params[table][20:].shape), 1e-14)


def test_normal_depends_on_the_seed_alone() -> None:
    model = made("bert")
    one, same, other = (grown(model, "normal", seed=s) for s in (3, 3, 4))
    assert all(np.array_equal(one.params[n], same.params[n]) for n in one.params)
    E = model.sites["embed.token"].weight
    assert not np.array_equal(one.params[E], other.params[E])
    assert not np.array_equal(one.params[E][V:-1], one.params[E][V + 1 :])
    assert not one.params[model.sites["head.out"].bias][V:].any()


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "1": ("partial", {"layers": 0, "head": False, "modules_to_save": ["embed_tokens"]}),
    "1, new rows": ("trainable_tokens", {"token_indices": [V, V + 1, V + 2, V + 3, V + 4]}),
    "2": (
        "lora",
        {
            "r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
    ),
    "3": ("lora", {"r": 2, "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}),
}  # fmt: skip
NEW = np.array([[2, V, V + 1, V + 1, 3, V + 4]])


def moved(adapter: refpeft.Adapter, seed: int = 2) -> refpeft.Adapter:
    rng = np.random.default_rng(seed)
    return adapter.replace(params={n: a + 0.1 * rng.normal(size=a.shape) for n, a in adapter.params.items()})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_gradients_of_every_stage(name: str, stage: str) -> None:
    """T2 of partial: by the complex step, on texts of old and new tokens; and merged it is the same model."""
    method, config = STAGES[stage]
    model = grown(made(name), "subword_mean")
    adapter = moved(refpeft.init(method, config, model))
    assert max(check_model(model, NEW, adapter).values()) < 1e-12
    merged = refpeft.merge(model, adapter)
    np.testing.assert_allclose(merged(NEW)[0], model(NEW, adapter)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "modules", "tensors"),
    [
        ("llama", ["embed_tokens"], {"model.embed_tokens.weight"}),
        ("llama", ["embed_tokens", "lm_head"], {"model.embed_tokens.weight", "lm_head.weight"}),
        ("llama-tied", ["lm_head"], {"model.embed_tokens.weight"}),
        ("gpt2", ["wte"], {"transformer.wte.weight"}),
        ("roberta", ["lm_head"], {"lm_head.dense.weight", "lm_head.dense.bias", "lm_head.layer_norm.weight",
                                  "lm_head.layer_norm.bias", "lm_head.decoder.weight", "lm_head.decoder.bias"}),
        ("llama", ["layers.1.mlp"], {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}),
    ],
)  # fmt: skip
def test_modules_are_trained_by_name(name: str, modules: list[str], tensors: set[str], tmp_path: Path) -> None:
    """T2 of partial, tied tensors once; saved and loaded again."""
    model = made(name)
    adapter = refpeft.init("partial", {"layers": 0, "head": False, "modules_to_save": modules}, model)
    assert set(adapter.params) == tensors
    adapter = moved(adapter)
    refpeft.save_adapter(adapter, tmp_path / "a")
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert model(IDS, again)[0].tobytes() == model(IDS, adapter)[0].tobytes()
    more = refpeft.init("partial", {"layers": 1, "modules_to_save": modules}, model)
    assert set(more.params) == tensors | set(refpeft.init("partial", {"layers": 1}, model).params)


def test_stage_one_moves_the_rows_of_its_text_and_no_other() -> None:
    """V7: to the bit; and with a tied head it moves them all."""
    rows = [{"input_ids": [2, V, 3, V + 1, V + 4, 2]}, {"input_ids": [V + 1, 3, V + 2, 2]}]
    seen, unseen = [2, 3, V, V + 1, V + 2, V + 4], [*range(2), *range(4, V), V + 3]
    plan, goal = train.Plan(steps=4, batch=2, lr=0.1), make("causal", Setting())
    for name in ("llama", "llama-tied"):
        model = grown(made(name))
        method, config = STAGES["1"]
        adapter = refpeft.init(method, config, model)
        state = train.start(plan, adapter)
        for _ in range(plan.steps):
            state = train.step(plan, model, adapter, goal, rows, state)
        (E,) = state.params.values()
        old = model.params["model.embed_tokens.weight"]
        still = (old == E).all(1)
        assert not still[seen].any()
        assert still[unseen].all() if name == "llama" else not still[unseen].any()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, "median"), "init must be one of mean, subword_mean, normal, found 'median'"),
        ((-1,), "must lie between 0 and"),
        ((True,), "new must be a number, a list of tokens"),
        (("word",), "new must be a number, a list of tokens"),
        ((3, "subword_mean"), "needs the tokens, or the old ids"),
        ((["ab", "ab"],), "'ab' is named twice"),
        ((["b"], "mean", Letters(20)), "'b' has a place in the vocabulary already"),
        ((["ab"], "subword_mean"), "needs the old tokenizer to cut 'ab'"),
        (([[3], []], "subword_mean"), re.escape("must be made of old tokens, ids 0 to 28, found []")),
        (([[3, 29]], "subword_mean"), re.escape("ids 0 to 28, found [3, 29]")),
        ((["ab"], "mean", Letters(30)), "ids up to 29, but the model has 29 rows"),
        ((3, "mean", None, 0), "pad_to_multiple_of must be a positive integer, found 0"),
        ((3, "mean", None, True), "pad_to_multiple_of must be a positive integer, found True"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        extend_vocabulary(made("llama"), *arguments)


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="modules_to_save names 'wte', a module that the model does not have"):
        refpeft.init("partial", {"layers": 0, "modules_to_save": ["wte"]}, made("llama"))


def test_every_claim_is_cited_here() -> None:
    cited = " ".join(f.__doc__ or "" for n, f in globals().items() if n.startswith("test_"))
    labels = re.findall(r"^    ([A-Z]+\d+) ", vocabulary.__doc__ or "", re.M)
    assert labels == [f"V{n}" for n in range(1, 8)]
    assert [label for label in labels if not re.search(rf"\b{label}\b", cited)] == []


# ── transformers and peft ────────────────────────────────────────────────────────────────────────────────────────────


def theirs(folder: Path, model: Model) -> Any:
    import torch
    import transformers

    kind = getattr(transformers, model.source["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float64).eval()


def said(model: Any, ids: Array) -> Array:
    import torch

    with torch.no_grad():
        out: Array = model(torch.tensor(ids)).logits.numpy()
    return out


def near(got: Array, want: Array, family: str) -> bool:
    """LLaMA's norms and positions are float32 in transformers, whatever the dtype."""
    return float(np.abs(got - want).max()) < (1e-6 if family in ("llama", "qwen2") else 1e-10) * np.abs(want).max()


@pytest.mark.peft
@pytest.mark.parametrize("name", [*MODELS])
def test_transformers_loads_it(name: str, tmp_path: Path) -> None:
    model = grown(made(name), "subword_mean", pad_to_multiple_of=4)
    refpeft.save(model, tmp_path / "m")
    ids = np.array([[2, V, V + 1, 35, 3]])
    assert near(said(theirs(tmp_path / "m", model), ids), model(ids)[0], MODELS[name][0])


@pytest.mark.peft
@pytest.mark.parametrize("mean", [False, True])
@every_model
def test_transformers_resizes_alike(name: str, mean: bool, tmp_path: Path) -> None:
    """Shapes, old rows, and how the new ones are distributed: N(0, σ²), or N(μ, 10⁻⁹ Σ) around our μ, to 6 standard
    deviations. Only a tied masked LM's bias is 0 there in both, not the mean."""
    import torch

    size, model = 4096, made(name)
    refpeft.save(model, tmp_path / "m")
    hf = theirs(tmp_path / "m", model)
    torch.manual_seed(0)
    hf.resize_token_embeddings(size - 3, mean_resizing=mean, pad_to_multiple_of=64)
    ours = extend_vocabulary(model, size - 3 - V, "mean" if mean else "normal", pad_to_multiple_of=64)
    assert hf.config.vocab_size == ours.source["vocab_size"] == size
    found = hf.state_dict()
    for table in tables(model):
        a, b = ours.params[table], found[table].numpy()
        assert a.shape == b.shape
        assert np.array_equal(a[:V], b[:V])
        new_a, new_b, k = a[V:], b[V:], size - V
        if a.ndim == 1:
            tied = model.sites["head.out"].weight == model.sites["embed.token"].weight
            bias = model.params[table].mean() if mean else 0
            np.testing.assert_allclose(new_a, bias, rtol=1e-12, atol=0)
            np.testing.assert_allclose(new_b, 0 if tied else bias, rtol=0, atol=1e-6)
        elif mean:
            σ = np.sqrt(1e-9) * model.params[table].std(0)
            assert (np.abs(new_a - new_b) < 6 * σ + 1e-7).all()  # they compute in float32
            assert new_b.std(0) == pytest.approx(σ, rel=0.06)
        else:
            for rows in (new_a, new_b):
                assert rows.std() == pytest.approx(0.02, rel=4 / np.sqrt(2 * k * 16))
                assert abs(rows.mean()) < 4 * 0.02 / np.sqrt(k * 16)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_peft_loads_stage_two(name: str, tmp_path: Path) -> None:
    """LoRA, and embedding and head whole: on the extended model of a first stage that was merged."""
    from peft import PeftModel

    model = grown(made(name), "subword_mean", pad_to_multiple_of=4)
    base = refpeft.merge(model, moved(refpeft.init(*STAGES["1"], model)))
    adapter = moved(refpeft.init(*STAGES["2"], base))
    refpeft.save(base, tmp_path / "base")
    refpeft.save_adapter(adapter, tmp_path / "stage2")
    hf = theirs(tmp_path / "base", base)
    before = said(hf, NEW)
    assert near(before, base(NEW)[0], "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about each other
        tuned = PeftModel.from_pretrained(hf, str(tmp_path / "stage2"))
    after = said(tuned, NEW)
    assert near(after, base(NEW, adapter)[0], "llama")
    assert np.abs(after - before).max() > 0.1
