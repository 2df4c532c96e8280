"""VeRA: the claims of its docstring, A∗ and B∗ as torch draws them, its folders both ways, what it refuses."""

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft import Adapter, Model, mersenne
from refpeft.checkpoint.safetensors import read, write
from tests.models import ARCHITECTURES, tiny
from tests.refpeft.equal import EXACT, moved, same, wrap_is_merge

IDS = np.random.default_rng(0).integers(0, 29, (2, 6))
SMALL = {"r": 5, "target_modules": "all-linear"}


def fresh(model: Model, **config: Any) -> Adapter:
    return refpeft.init("vera", {**SMALL, **config}, model)


def read_at(name: str) -> bool:
    """Does the output depend on this module? Nothing here reads the pooler."""
    return "pooler" not in name


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_gradients_are_exact_on_every_model(family: str, architecture: str) -> None:
    """Of λb, λd and of the whole base under them; dropout is an argument."""
    model = tiny(family, architecture)
    adapter = moved(fresh(model, vera_dropout=0.4))
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT
    dropped = refpeft.dropout(adapter, model, IDS.shape, seed=3)
    assert dropped.masks
    assert max(refpeft.check_model(model, IDS, dropped, base=True).values()) <= EXACT


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_wrap_is_merge(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """VE2: outputs, and the gradients of both forms."""
    model = tiny(family)
    adapter = moved(fresh(model))
    wrap_is_merge(model, adapter, IDS, monkeypatch)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_fresh_adapter_changes_nothing(family: str) -> None:
    """VE1: not a bit, run or merged, and λd has no gradient; drawn at random, it does."""
    model = tiny(family)
    adapter = fresh(model, d_initial=0.25)
    out, vjp = model(IDS, adapter)
    np.testing.assert_array_equal(out, model(IDS)[0])
    merged = refpeft.merge(model, adapter)
    assert all(np.array_equal(merged.params[n], v) for n, v in model.params.items())
    grads = vjp(np.random.default_rng(0).normal(size=out.shape))
    assert all(np.abs(d).max() > 0 for n, d in grads.items() if n.endswith("_b") and read_at(n))
    assert not any(d.any() for n, d in grads.items() if n.endswith("_d"))
    assert {float(v[0]) for n, v in adapter.params.items() if n.endswith("_d")} == {0.25}
    assert np.abs(model(IDS, fresh(model, init_weights=False))[0] - out).max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_it_is_a_lora_with_the_vectors_in_its_factors(family: str) -> None:
    """VE4: each layer takes the corner of A∗ and B∗, and the largest layers all of them."""
    model = tiny(family)
    adapter = moved(fresh(model))
    lora = refpeft.init("lora", {"r": 5, "lora_alpha": 5, "target_modules": "all-linear"}, model)
    A, B = adapter.frozen["vera_A"], adapter.frozen["vera_B"]
    factors = {}
    for path in lora.by_module:
        λb, λd = (adapter.params[f"{path}.vera_lambda_{x}"] for x in "bd")
        i = lora.params[f"{path}.lora_A.weight"].shape[1]
        factors[f"{path}.lora_A.weight"] = λd[:, None] * A[:, :i]
        factors[f"{path}.lora_B.weight"] = λb[:, None] * B[: len(λb)]
    assert A.shape[1] == max(a.shape[1] for n, a in factors.items() if "lora_A" in n)
    assert B.shape[0] == max(len(a) for n, a in factors.items() if "lora_B" in n)
    same(model(IDS, adapter)[0], model(IDS, lora.replace(params=factors))[0])


def test_several_adapters_add_up() -> None:
    """VE3: also of other ranks and keys, and with LoRA between them."""
    model = tiny("gpt2")
    a, b = moved(fresh(model)), moved(fresh(model, r=3, projection_prng_key=9, target_modules=["c_attn"]), 2)
    lora = moved(refpeft.init("lora", {"r": 2}, model))
    for order in ([a, lora, b], [b, a, lora]):
        assert max(refpeft.check_model(model, IDS, order, base=True).values()) <= EXACT
        same(refpeft.merge(model, order)(IDS)[0], model(IDS, order)[0])
    one, other, both = (refpeft.merge(model, x).params for x in (a, b, [b, a]))
    for n, v in model.params.items():
        same(both[n] - v, one[n] + other[n] - 2 * v)


def test_the_projection_is_a_function_of_its_key() -> None:
    """VE5: of nothing else, whatever the seed is; in float32, whatever the model is, and within its bounds."""
    model = tiny("llama", dtype=np.float32)
    one, other = (refpeft.init("vera", SMALL, model, seed) for seed in (0, 1))
    wide = fresh(tiny("llama"))
    for n, v in one.frozen.items():
        assert v.dtype == np.float32
        np.testing.assert_array_equal(v, other.frozen[n])
        np.testing.assert_array_equal(v, wide.frozen[n])
        assert 0.8 < np.abs(v).max() / np.sqrt(6 / v.shape[1]) <= 1
        assert not np.array_equal(v, fresh(model, projection_prng_key=1).frozen[n])


@pytest.mark.peft
@pytest.mark.parametrize("key", [0, 7, 2**32 - 1])
def test_numbers_are_those_of_torch(key: int) -> None:
    """VE5: to the bit, one call after the other."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(key)
    words = mersenne.stream(key)
    for shape, bound in (((3, 5), 1.0), ((256, 768), float(np.sqrt(6 / 768))), ((1, 1), 0.37), ((17,), 2.5)):
        theirs = torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy()
        np.testing.assert_array_equal(mersenne.uniform(words, bound, shape), theirs)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_layers_of_16_bits_stay_so(dtype: Any) -> None:
    model = tiny("gpt2", dtype=dtype)
    adapter = moved(fresh(model))
    assert {v.dtype for v in (adapter.params | adapter.frozen).values()} == {np.dtype(np.float32)}
    out, vjp = model(IDS, adapter)
    assert out.dtype == dtype
    assert all(d.dtype == np.float32 for d in vjp(np.ones_like(out)).values())
    assert {v.dtype for v in refpeft.merge(model, adapter).params.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["wte"]}, r"transformer\.wte: VeRA is defined for linear layers"),
        ({"r": 0}, "r must be a positive integer, found 0"),
        ({"projection_prng_key": -1}, "projection_prng_key must be from 0 to 2³² − 1, found -1"),
        ({"bias": "lora_only"}, "bias must be 'none', 'all' or 'vera_only'"),
        ({"vera_dropout": 1.0}, r"vera_dropout must be in \[0, 1\)"),
        ({"lora_alpha": 3}, "vera has no config field 'lora_alpha'"),
    ],
)
def test_each_mistake_is_one_sentence(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fresh(tiny("gpt2"), **config)


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("saved", [True, False])
def test_saved_and_loaded_it_is_the_same(saved: bool, tmp_path: Path) -> None:
    model = tiny("bert", "ForSequenceClassification")
    adapter = moved(fresh(model, save_projection=saved, projection_prng_key=3, modules_to_save=["classifier"]))
    refpeft.save_adapter(adapter, tmp_path / "a")
    assert ("base_model.vera_A" in read(tmp_path / "a" / "adapter_model.safetensors")) == saved
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert again.config == adapter.config
    for mine, found in ((adapter.params, again.params), (adapter.frozen, again.frozen)):
        assert mine.keys() == found.keys()
        assert all(np.array_equal(found[n], v) for n, v in mine.items())


def test_what_is_saved_counts_and_not_the_key(tmp_path: Path) -> None:
    model = tiny("gpt2")
    adapter = moved(fresh(model))
    own = adapter.replace(frozen={n: v + 1 for n, v in adapter.frozen.items()})
    refpeft.save_adapter(own, tmp_path / "a")
    same(model(IDS, refpeft.load_adapter(tmp_path / "a", model))[0], model(IDS, own)[0], 0)


@pytest.mark.parametrize(
    ("change", "lost", "words"),
    [
        ({"r": 4}, "", r"vera_A'.*expected shape \[4, 64\], found \[5, 64\]"),
        ({"target_modules": ["c_attn"]}, "", r"vera_A'.*expected shape \[5, 16\], found \[5, 64\]"),
        ({"save_projection": False}, "", "names must begin with 'base_model.model.', found 'base_model.vera_A'"),
        ({}, "base_model.vera_B", "tensor 'base_model.vera_B' is missing"),
        ({}, "base_model.model.transformer.h.0.mlp.c_fc.vera_lambda_d", "c_fc.vera_lambda_d' is missing"),
        ({"r": 2.5}, "", "r must be int, found 2.5"),
    ],
)
def test_folders_that_do_not_fit_are_refused(change: dict[str, Any], lost: str, words: str, tmp_path: Path) -> None:
    model = tiny("gpt2")
    refpeft.save_adapter(fresh(model), tmp_path / "a")
    where, file = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    where.write_text(json.dumps({**json.loads(where.read_text()), **change}))
    tensors = {n: v for n, v in read(file).items() if n != lost}
    file.unlink()
    write(file, tensors)
    with pytest.raises(ValueError, match=words):
        refpeft.load_adapter(tmp_path / "a", model)


@pytest.mark.peft
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("gpt2", {}),
        ("llama", {"save_projection": False, "projection_prng_key": 11}),
        ("bert", {"bias": "vera_only"}),
        ("t5", {"target_modules": ["q", "wo"]}),
    ],
)
def test_hf_peft_and_this_read_each_other(family: str, own: dict[str, Any], tmp_path: Path) -> None:
    """The same tensors, bit for bit, and the same outputs: run, and merged."""
    import peft
    import torch
    import transformers

    head = {"gpt2": "LMHeadModel", "llama": "ForCausalLM", "bert": "Model", "t5": "ForConditionalGeneration"}[family]
    model = tiny(family, head, dtype=np.float32)
    refpeft.save(model, tmp_path / "base")
    name = model.source["architectures"][0]
    adapter = moved(fresh(model, **own))
    refpeft.save_adapter(adapter, tmp_path / "ours")
    decoder = {"decoder_input_ids": IDS[:, :3]} if family == "t5" else {}
    inputs = {n: torch.tensor(a) for n, a in {"input_ids": IDS, **decoder}.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks transformers, and that it draws A and B again
        base = getattr(transformers, name).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
        theirs.save_pretrained(tmp_path / "theirs")
    again = refpeft.load_adapter(tmp_path / "theirs", model)
    assert again.params.keys() == adapter.params.keys()
    assert all(np.array_equal(again.params[n], v) for n, v in adapter.params.items())
    assert all(np.array_equal(again.frozen[n], v) for n, v in adapter.frozen.items())
    mine, others = (read(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in others.items()}
    theirs = theirs.double()
    for n in "AB":  # which are no parameters, and no buffers of the model
        shared = getattr(theirs.base_model, f"vera_{n}")
        shared["default"] = shared["default"].double()
    wide = model.astype(np.float64)
    want = wide(IDS, refpeft.check.real(adapter), **decoder)[0]
    with torch.no_grad():
        same(theirs(**inputs)[0].numpy(), want, 1e-10 if family in ("gpt2", "bert") else 1e-6)
        found = dict(theirs.merge_and_unload().named_parameters())
    for n, v in refpeft.merge(wide, refpeft.check.real(adapter)).params.items():
        if n in found:
            same(found[n].detach().numpy(), v)
