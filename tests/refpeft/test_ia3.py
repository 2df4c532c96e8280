"""(IA)³: the claims of its docstring, its folders both ways, what it refuses."""

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft import Adapter, Model
from refpeft.checkpoint.safetensors import read
from refpeft.method import Phi
from refpeft.methods import ia3
from refpeft.part import BASE, make
from tests.models import ARCHITECTURES, ENCODER_DECODERS, tiny
from tests.refpeft.equal import EXACT, moved, same, wrap_is_merge

IDS = np.random.default_rng(0).integers(0, 29, (2, 6))
SIDES = {  # family → targets, of which these are feed-forward
    "gpt2": (["c_attn", "attn.c_proj", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "up_proj", "down_proj"], ["down_proj", "up_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
}


def fresh(model: Model, family: str, **config: Any) -> Adapter:
    targets, forward = SIDES[family]
    return refpeft.init("ia3", {"target_modules": targets, "feedforward_modules": forward, **config}, model)


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_gradients_are_exact_on_every_model(family: str, architecture: str) -> None:
    """Of l and of the whole base under it."""
    model = tiny(family, architecture)
    adapter = moved(refpeft.init("ia3", {}, model))
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT


@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "BART"])
def test_gradients_are_exact_in_two_stacks(name: str) -> None:
    family, architecture, own = ENCODER_DECODERS[name]
    model = tiny(family, architecture, **own)
    adapter = moved(refpeft.init("ia3", {}, model))
    inputs = {"decoder_input_ids": IDS[:, ::-1][:, :4]}
    assert max(refpeft.check_model(model, IDS, adapter, base=True, **inputs).values()) <= EXACT
    same(refpeft.merge(model, adapter)(IDS, **inputs)[0], model(IDS, adapter, **inputs)[0])


@pytest.mark.parametrize("family", SIDES)
def test_wrap_is_merge(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """IA2: outputs, and the gradients of both forms, of the bias too."""
    model = tiny(family)
    adapter = moved(fresh(model, family))
    wrap_is_merge(model, adapter, IDS, monkeypatch)


@pytest.mark.parametrize("family", SIDES)
def test_a_fresh_adapter_changes_nothing(family: str) -> None:
    """IA1: not a bit, run or merged; drawn at random, it does."""
    model = tiny(family)
    adapter = fresh(model, family)
    np.testing.assert_array_equal(model(IDS, adapter)[0], model(IDS)[0])
    merged = refpeft.merge(model, adapter)
    assert all(np.array_equal(merged.params[n], v) for n, v in model.params.items())
    drawn = fresh(model, family, init_ia3_weights=False)
    assert np.abs(model(IDS, drawn)[0] - model(IDS)[0]).max() > 1e-3


@pytest.mark.parametrize("family", SIDES)
def test_what_is_merged_is_the_formula(family: str) -> None:
    """By hand: rows of W and entries of b where a layer gives, columns of W where it takes; a Conv1D stores Wᵀ."""
    model = tiny(family)
    adapter = moved(fresh(model, family))
    merged = refpeft.merge(model, adapter).params
    _, forward = SIDES[family]
    for name, l in adapter.params.items():  # noqa: E741
        path = name.removesuffix(".ia3_l")
        W, b = model.params[path + ".weight"], model.params.get(path + ".bias")
        takes = path.endswith(tuple(forward))
        n = W.shape[0 if takes == (family == "gpt2") else 1]
        assert l.shape == ((1, n) if takes else (n if family == "gpt2" else W.shape[0], 1))
        along = -1 if takes != (family == "gpt2") else 0
        same(merged[path + ".weight"], W * (l.reshape(1, -1) if along else l.reshape(-1, 1)))
        if b is not None:
            same(merged[path + ".bias"], b if takes else b * l[:, 0])


def test_several_adapters_multiply_in_any_order() -> None:
    """IA3: and beside LoRA and DoRA, which do not commute with them, they run as they merge."""
    model = tiny("gpt2")
    a, b = (moved(fresh(model, "gpt2"), seed) for seed in (1, 2))
    both = a.replace(params={n: v * b.params[n] for n, v in a.params.items()})
    for order in ([a, b], [b, a]):
        same(model(IDS, order)[0], model(IDS, both)[0])
        same(refpeft.merge(model, order)(IDS)[0], model(IDS, both)[0])
    lora, dora = (
        moved(refpeft.init(m, {"r": 2, "target_modules": ["c_attn", "c_proj"]}, model)) for m in ("lora", "dora")
    )
    for order in ([lora, a, dora], [a, dora, lora], [dora, b, lora, a]):
        assert max(refpeft.check_model(model, IDS, order, base=True).values()) <= EXACT
        same(refpeft.merge(model, order)(IDS)[0], model(IDS, order)[0])


@pytest.mark.parametrize("takes", [False, True])
def test_zero_silences(takes: bool) -> None:
    """IA4"""
    rng = np.random.default_rng(0)
    W, b, x = rng.normal(size=(3, 4)), rng.normal(size=3), rng.normal(size=(2, 4))
    part, cfg = make("layer", "linear", W, b, (BASE, "W"), (BASE, "b")), ia3.Place(takes)
    φ = {"l": np.zeros(ia3.shapes(cfg, part)["l"])}
    y, _ = ia3.wrap(cfg, Phi(φ, {}), part).run(x)
    np.testing.assert_array_equal(y, np.broadcast_to(b if takes else 0 * b, y.shape))
    W1, b1, _ = ia3.merge(cfg, W, b, φ)
    assert not W1.any()
    np.testing.assert_array_equal(b1, b if takes else 0 * b)


def test_what_one_layer_gives_is_what_the_next_takes() -> None:
    """IA5: on the values of an attention, and on the output matrix that reads them."""
    model = tiny("llama", num_key_value_heads=4)
    l = 1 + np.random.default_rng(0).normal(size=16) / 3  # noqa: E741
    gives = refpeft.init("ia3", {"target_modules": ["v_proj"], "feedforward_modules": []}, model)
    takes = refpeft.init("ia3", {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]}, model)
    gives = gives.replace(params=dict.fromkeys(gives.params, l[:, None]))
    takes = takes.replace(params=dict.fromkeys(takes.params, l[None]))
    same(model(IDS, gives)[0], model(IDS, takes)[0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_layers_of_16_bits_stay_so(dtype: Any) -> None:
    model = tiny("gpt2", dtype=dtype)
    adapter = moved(fresh(model, "gpt2"))
    assert {v.dtype for v in adapter.params.values()} == {np.dtype(np.float32)}
    out, vjp = model(IDS, adapter)
    assert out.dtype == dtype
    assert all(d.dtype == np.float32 for d in vjp(np.ones_like(out)).values())
    assert {v.dtype for v in refpeft.merge(model, adapter).params.values()} == {np.dtype(dtype)}


# ── configs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pattern_for_feed_forward_modules_is_for_the_whole_path() -> None:
    model = tiny("llama")
    some = {"target_modules": ["down_proj", "v_proj"], "feedforward_modules": r"model\.layers\.1\..*down_proj"}
    shapes = {n: v.shape for n, v in refpeft.init("ia3", some, model).params.items()}
    assert shapes["model.layers.0.mlp.down_proj.ia3_l"] == (16, 1)
    assert shapes["model.layers.1.mlp.down_proj.ia3_l"] == (1, 24)
    assert shapes["model.layers.1.self_attn.v_proj.ia3_l"] == (8, 1)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("gpt2", {"target_modules": ["wte"]}, r"transformer\.wte: \(IA\)³ is defined for linear layers"),
        ("gpt2", {"layers_to_transform": [0]}, r"\(IA\)³ has no layers_to_transform"),
        ("gpt2", {"feedforward_modules": "("}, r"feedforward_modules: '\(' is not a regular expression"),
        ("gpt2", {"target_modules": ["c_attn"], "feedforward_modules": ["c_fc"]}, "no module .* ends in 'c_fc'"),
        ("gpt2", {"r": 3}, "ia3 has no config field 'r'"),
        ("llama", {"feedforward_modules": 3}, "feedforward_modules must be"),
    ],
)
def test_each_mistake_is_one_sentence(family: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refpeft.init("ia3", config, tiny(family))


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = tiny("bert", "ForSequenceClassification")
    adapter = moved(fresh(model, "bert", modules_to_save=["classifier"]))
    refpeft.save_adapter(adapter, tmp_path / "a")
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert again.config == adapter.config
    assert again.params.keys() == adapter.params.keys()
    assert all(np.array_equal(again.params[n], v) for n, v in adapter.params.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feedforward_modules": ["up_proj"]}, r"ia3_l.*expected shape \[16, 1\], found \[1, 24\]"),
        ({"target_modules": ["v_proj", "up_proj", "down_proj"]}, "is not one that this adapter has"),
        ({"init_ia3_weights": "yes"}, "init_ia3_weights must be bool, found 'yes'"),
        ({"bias": "all"}, "'bias' is set to 'all', which is not supported"),
    ],
)
def test_folders_that_do_not_fit_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny("llama")
    refpeft.save_adapter(fresh(model, "llama"), tmp_path / "a")
    where = tmp_path / "a" / "adapter_config.json"
    where.write_text(json.dumps({**json.loads(where.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        refpeft.load_adapter(tmp_path / "a", model)


@pytest.mark.peft
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("given", [True, False])
def test_hf_peft_and_this_read_each_other(family: str, given: bool, tmp_path: Path) -> None:
    """The same tensors, bit for bit, and the same outputs: run, and merged."""
    import peft
    import torch
    import transformers

    head = {"gpt2": "LMHeadModel", "llama": "ForCausalLM", "bert": "Model", "t5": "ForConditionalGeneration"}[family]
    model = tiny(family, head)
    refpeft.save(model, tmp_path / "base")
    name = model.source["architectures"][0]

    def base() -> Any:
        return getattr(transformers, name).from_pretrained(tmp_path / "base", dtype=torch.float64).eval()

    own = {"target_modules": ["wo", "c_proj", "o_proj", "dense"]} if given else {}  # its own, the family's feed-forward
    adapter = moved(refpeft.init("ia3", own, model))
    refpeft.save_adapter(adapter, tmp_path / "ours")
    decoder = {"decoder_input_ids": IDS[:, :3]} if family == "t5" else {}
    inputs = {n: torch.tensor(a) for n, a in {"input_ids": IDS, **decoder}.items()}
    want = model(IDS, adapter, **decoder)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks transformers
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        y = theirs(**inputs)[0].numpy()
    tolerance = 1e-10 if family in ("gpt2", "bert") else 1e-6  # the norms of the others compute in float32 there
    same(y, want, tolerance)
    theirs.save_pretrained(tmp_path / "theirs")
    again = refpeft.load_adapter(tmp_path / "theirs", model)
    assert all(np.array_equal(again.params[n], v) for n, v in adapter.params.items())
    mine, others = (read(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in others.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = theirs.merge_and_unload()
    found = dict(merged.named_parameters())
    for n, v in refpeft.merge(model, adapter).params.items():
        if n in found:
            same(found[n].detach().numpy(), v)


@pytest.mark.peft
def test_default_modules_are_those_of_hf_peft() -> None:
    from peft.utils import constants

    for family, (targets, forward) in ia3.DEFAULTS.items():
        if family != "gpt3":
            assert list(targets) == constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[family]
            assert list(forward) == constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family]
