"""P-tuning v2: its claims, several tasks in one batch, HF peft's classifiers, and folders of the paper's own code."""

from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint.prefix import from_thudm
from refpeft.checkpoint.safetensors import Malformed
from refpeft.methods.prefix_tuning import NAMES, flat
from tests.models import tiny
from tests.refpeft.equal import EXACT, same
from tests.refpeft.soft import both, cache_under_its_old_name, hf_base, hf_load, hf_run

N, P = 3, "prompt_embeddings"
rng = np.random.default_rng(0)
IDS = rng.integers(2, 29, (4, 6))
MODELS = [
    ("bert", "ForSequenceClassification"),
    ("bert", "ForTokenClassification"),
    ("roberta", "ForSequenceClassification"),
    ("gpt2", "ForSequenceClassification"),
    ("llama", "ForSequenceClassification"),
]
models = pytest.mark.parametrize(("family", "architecture"), MODELS)


def fresh(model: Any, seed: int = 0, **config: Any) -> refpeft.Adapter:
    """Its head moved away from the base's, as by training."""
    adapter = refpeft.init("p_tuning_v2", {"num_virtual_tokens": N, **config}, model, seed)
    move = np.random.default_rng(seed + 1)
    return adapter.replace(params={n: a + 0.3 * move.normal(size=a.shape) for n, a in adapter.params.items()})


@models
def test_it_is_prefix_tuning_with_the_head_trained(family: str, architecture: str) -> None:
    """PV1: parameters, outputs and gradients."""
    model = tiny(family, architecture)
    adapter = fresh(model)
    head = "score" if family in ("gpt2", "llama") else "classifier"
    assert {n.split(".")[0] for n in adapter.params} == {P, head}
    assert not adapter.config.prefix_projection
    config = {"num_virtual_tokens": N, "modules_to_save": [head]}
    prefix = refpeft.init("prefix_tuning", config, model).replace(params=adapter.params)
    (out, vjp), (want, vjp_prefix) = model(IDS, adapter), model(IDS, prefix)
    np.testing.assert_array_equal(out, want)
    dout = rng.normal(size=out.shape)
    for n, g in vjp_prefix(dout).items():
        np.testing.assert_array_equal(vjp(dout)[n], g)
    assert max(refpeft.check_model(model, IDS, adapter, base=True).values()) <= EXACT


@models
def test_a_task_for_each_row(family: str, architecture: str) -> None:
    """PV2: what each task gives alone, padding and prompts of different lengths included; gradients too."""
    model = tiny(family, architecture)
    tasks = [fresh(model, 1), fresh(model, 2, num_virtual_tokens=5), fresh(model, 3, prefix_projection=True)]
    which = np.array([2, 0, 1, 0])
    pad = model.config.pad_token_id or 0
    mask = np.ones_like(IDS)
    mask[1, 4:] = mask[2, 3:] = 0
    ids = np.where(mask, IDS, pad)
    out, vjp = model(ids, refpeft.by_row(tasks, which), mask)
    dout = rng.normal(size=out.shape)
    for k, (task, grads) in enumerate(zip(tasks, vjp(dout), strict=True)):
        own = which == k
        alone, vjp_alone = model(ids[own], task, mask[own])
        same(out[own], alone)
        want = vjp_alone(dout[own])
        assert set(grads) == set(want)
        for n, g in grads.items():
            same(g, want[n])


@models
def test_gradients_of_a_mixed_batch_are_exact(family: str, architecture: str) -> None:
    """PV2"""
    model = tiny(family, architecture)
    tasks = [fresh(model, 1), fresh(model, 2, num_virtual_tokens=2, prefix_projection=True)]
    found = refpeft.check_model(model, IDS, refpeft.by_row(tasks, np.array([1, 0, -1, 1])))
    assert max(found.values()) <= EXACT


@models
def test_a_row_without_a_task_is_the_base(family: str, architecture: str) -> None:
    """PV3"""
    model = tiny(family, architecture)
    tasks = [fresh(model, 1), fresh(model, 2)]
    out, vjp = model(IDS, refpeft.by_row(tasks, np.array([0, -1, -1, 1])))
    base = model(IDS)[0]
    same(out[1:3], base[1:3])
    assert np.abs(out[[0, 3]] - base[[0, 3]]).max() > 1e-3
    dout = rng.normal(size=out.shape)
    dout[[0, 3]] = 0
    assert not any(g.any() for grads in vjp(dout) for g in grads.values())


def test_what_rows_may_be() -> None:
    model = tiny("bert", "ForSequenceClassification")
    task = fresh(model)
    with pytest.raises(ValueError, match="rows must be an array of booleans, one for each of the 4 rows of ids"):
        model(IDS, task.replace(rows=np.ones(3, bool)))
    with pytest.raises(ValueError, match="an adapter for some rows of a batch cannot be merged"):
        refpeft.merge(model, task.replace(rows=np.ones(4, bool)))


@pytest.mark.parametrize("architecture", ["LMHeadModel", None])
def test_a_model_without_a_classifier_is_refused(architecture: str | None) -> None:
    with pytest.raises(ValueError, match=r"modules_to_save .* matches no module of the model"):
        fresh(tiny("gpt2", architecture))


# ── HF peft ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peft
@pytest.mark.parametrize("name", ["SEQ_CLS of bert", "TOKEN_CLS of bert"])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_hf_pefts(name: str, padded: bool, tmp_path: Any) -> None:
    """A classifier under PrefixTuningConfig: outputs, gradients of P and of the head, and folders both ways."""
    import peft

    config = peft.PrefixTuningConfig(task_type=name.split()[0], num_virtual_tokens=N)
    m, model, adapter = both(name, config, tmp_path)
    assert adapter.method == "p_tuning_v2"
    mask = np.ones_like(IDS)
    if padded:
        mask[1, 4:] = 0
    ids = np.where(mask, IDS, model.config.pad_token_id or 0)
    out, vjp = model(ids, adapter, mask)
    dout = rng.normal(size=out.shape) * (mask[..., None] if out.ndim == 3 else 1)
    with cache_under_its_old_name():
        want, grads = hf_run(m, ids, mask, dout)
    seen = mask > 0 if out.ndim == 3 else np.ones(len(ids), bool)
    same(out[seen], want[seen])
    ours = vjp(dout)
    same(ours.pop(P), grads.pop("prompt_encoder.default.embedding.weight"))
    theirs = {n.removeprefix("base_model.").replace("modules_to_save.default.", ""): g for n, g in grads.items()}
    assert set(ours) == set(theirs)
    for n, g in ours.items():
        same(g, theirs[n])
    refpeft.save_adapter(fresh(model), tmp_path / "ours")
    loaded = hf_load(hf_base(name), tmp_path / "ours")
    back = refpeft.load_adapter(tmp_path / "ours", model)
    rounded = {**back.params, P: back.params[P].astype(np.float32).astype(np.float64)}  # as HF peft does in loading
    with cache_under_its_old_name():
        same(model(IDS, back.replace(params=rounded))[0], hf_run(loaded, IDS, np.ones_like(IDS)))


# ── the paper's own code ─────────────────────────────────────────────────────────────────────────────────────────────

OWN = {NAMES["E"]: "embedding.weight", NAMES["P"]: "embedding.weight", NAMES["W1"]: "trans.0.weight",
       NAMES["b1"]: "trans.0.bias", NAMES["W2"]: "trans.2.weight", NAMES["b2"]: "trans.2.bias"}  # fmt: skip


@pytest.mark.parametrize("projection", [False, True])
def test_a_checkpoint_of_the_papers_code(projection: bool) -> None:
    """Its names, beside those of the base model, which are left aside; the MLP has the width of the model."""
    model = tiny("bert", "ForSequenceClassification")
    config = {"prefix_projection": projection, "encoder_hidden_size": 5}
    want = fresh(model, **config) if projection else fresh(model)
    tensors = {"prefix_encoder." + OWN[n] if n in OWN else n: a for n, a in want.params.items()}
    tensors["bert.embeddings.word_embeddings.weight"] = np.zeros((2, 2))
    found = from_thudm(tensors, model)
    np.testing.assert_array_equal(model(IDS, found)[0], model(IDS, want)[0])
    same(model(IDS, flat(found))[0], model(IDS, want)[0])
    with pytest.raises(Malformed, match=r"'prefix_encoder\.embedding\.weight' is missing"):
        from_thudm({}, model)
    tensors["classifier.bias"] = np.zeros(7)
    with pytest.raises(Malformed, match=r"'classifier\.bias': expected shape \[3\], found \[7\]"):
        from_thudm(tensors, model)
