"""Prefix tuning: its claims, its MLP, padding, caches, what is refused, and HF peft in float64."""

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft import ops
from refpeft.checkpoint.safetensors import Malformed, read
from refpeft.methods import prefix_tuning
from refpeft.methods.prefix_tuning import flat, of_cache
from tests.models import tiny
from tests.refpeft.equal import EXACT, same
from tests.refpeft.soft import HF, both, hf, hf_base, hf_load, hf_run

N, P = 3, "prompt_embeddings"
rng = np.random.default_rng(0)
IDS = rng.integers(2, 29, (2, 6))
MODELS = [("gpt2", None), ("llama", None), ("qwen2", None), ("bert", "ForMaskedLM"), ("roberta", "Model")]
models = pytest.mark.parametrize(("family", "architecture"), MODELS)
FORMS = {
    "flat": {},
    "mlp": {"prefix_projection": True},
    "wide mlp": {"prefix_projection": True, "encoder_hidden_size": 5, "input_size": 7},
    "unshifted": {"position_shift": False},
    "one layer left out": {"leave_out": [0], "prefix_projection": True},
}
forms = pytest.mark.parametrize("config", FORMS.values(), ids=list(FORMS))


def fresh(model: Any, seed: int = 0, **config: Any) -> refpeft.Adapter:
    return refpeft.init("prefix_tuning", {"num_virtual_tokens": N, **config}, model, seed)


# ── gradients, and the claims ────────────────────────────────────────────────────────────────────────────────────────


@models
@forms
def test_gradients_are_exact(family: str, architecture: str | None, config: Any) -> None:
    """Of P or of the MLP that makes it, and of the base under it, with padding; keys of GQA included (LLaMA, Qwen2)."""
    model = tiny(family, architecture)
    adapter = fresh(model, **config)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    found = refpeft.check_model(model, IDS, adapter, base=True, attention_mask=mask)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_mixed_with_attention_to_the_prefix(g: int, causal: bool) -> None:
    """PX1, and PX2 with a prefix of zeros: λ from sums of exponentials, head by head."""
    b, s, h, e = 2, 5, 4, 3
    q, k, v = (rng.normal(size=(b, s, n, e)) for n in (h, g, g))
    p_k, p_v = (rng.normal(size=(1, N, g, e)) for _ in range(2))
    mask = np.tri(s, dtype=bool)[None, None] if causal else None
    wide = np.ones((2, 1, 1, 1)) if mask is None else mask

    def exps(keys: Any) -> Any:  # Σ exp(α q k) [b, s, h]
        return np.exp(np.einsum("bshe,bthe->bhst", q, np.repeat(keys, h // g, axis=2)) / np.sqrt(e))

    def together(p_k: Any, p_v: Any) -> Any:
        front = np.ones((*wide.shape[:3], N), bool)
        seen = None if mask is None else np.concatenate([front, mask], -1)
        cat = [np.concatenate([np.repeat(p, b, 0), t], 1) for p, t in ((p_k, k), (p_v, v))]
        return ops.attention(q, *cat, seen)[0]

    Z = (exps(k) * (wide if causal else 1)).sum(-1).transpose(0, 2, 1)[..., None]
    Zp = exps(np.repeat(p_k, b, 0)).sum(-1).transpose(0, 2, 1)[..., None]
    y0, y1 = ops.attention(q, k, v, mask)[0], ops.attention(q, *(np.repeat(p, b, 0) for p in (p_k, p_v)))[0]
    λ = Zp / (Z + Zp)
    same(together(p_k, p_v), (1 - λ) * y0 + λ * y1)
    same(together(0 * p_k, 0 * p_v), y0 * Z / (Z + N))


def test_a_prefix_of_zeros_is_not_the_identity() -> None:
    """PX2: with init_weights='zero', in both forms."""
    model = tiny("bert", "ForMaskedLM")
    one, two = (fresh(model, init_weights="zero", prefix_projection=p, position_shift=False) for p in (False, True))
    same(model(IDS, one)[0], model(IDS, two)[0])
    assert np.abs(model(IDS, one)[0] - model(IDS)[0]).max() > 1e-2
    assert not one.params[P].any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_text_is_a_prefix(family: str) -> None:
    """PX3: also where keys are turned by their places, which those in the cache are already."""
    model = tiny(family)
    text = np.array([[7, 8, 9]])
    _, cache = model.decode(text)
    adapter = fresh(model).replace(params={P: of_cache(cache)})
    read_before = np.concatenate([np.repeat(text, 2, 0), IDS], 1)
    same(model(IDS, adapter)[0], model(read_before)[0][:, N:])


@models
@pytest.mark.parametrize("form", ["mlp", "wide mlp", "one layer left out", "flat"])
def test_the_mlp_can_be_dropped(family: str, architecture: str | None, form: str) -> None:
    """PX4: outputs are the same; and P is tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂."""
    model = tiny(family, architecture)
    adapter = fresh(model, **FORMS[form])
    plain = refpeft.drop_encoder(adapter)
    assert set(plain.params) == {P}
    assert not plain.config.prefix_projection
    same(model(IDS, plain)[0], model(IDS, adapter)[0])
    if form != "flat":
        E, W1, b1, W2, b2 = (adapter.params[prefix_tuning.NAMES[n]] for n in ("E", "W1", "b1", "W2", "b2"))
        same(plain.params[P], np.tanh(E @ W1.T + b1) @ W2.T + b2)


def test_the_chain_rule_through_the_mlp() -> None:
    """The docstring's gradients, from dP of the adapter without MLP."""
    model = tiny("llama")
    adapter = fresh(model, **FORMS["wide mlp"])
    out, vjp = model(IDS, adapter)
    dout = rng.normal(size=out.shape)
    dP = model(IDS, flat(adapter))[1](dout)[P]
    E, W1, b1, W2, _ = (adapter.params[prefix_tuning.NAMES[n]] for n in ("E", "W1", "b1", "W2", "b2"))
    u = np.tanh(E @ W1.T + b1)
    dz = (dP @ W2) * (1 - u**2)
    want = {"W2": dP.T @ u, "b2": dP.sum(0), "W1": dz.T @ E, "b1": dz.sum(0), "E": dz @ W1}
    grads = vjp(dout)
    assert len(grads) == len(want)
    for name, d in want.items():
        same(grads[prefix_tuning.NAMES[name]], d)


@models
def test_a_prefix_has_no_order(family: str, architecture: str | None) -> None:
    """PX5"""
    model = tiny(family, architecture)
    adapter = fresh(model)
    turned = adapter.replace(params={P: adapter.params[P][[2, 0, 1]]})
    same(model(IDS, turned)[0], model(IDS, adapter)[0])


# ── where tokens stand, padding, caches ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_tokens_are_shifted_or_not(family: str) -> None:
    """As HF peft has it (shifted by n) and as AdapterHub (not): the same function of other positions."""
    model = tiny(family, "ForMaskedLM" if family == "bert" else None)
    shifted, still = fresh(model), fresh(model, position_shift=False)
    places = np.arange(6)[None]
    np.testing.assert_array_equal(model(IDS, shifted)[0], model(IDS, still, position_ids=places + N)[0])
    np.testing.assert_array_equal(model(IDS, still)[0], model(IDS, still, position_ids=places)[0])
    apart = np.abs(model(IDS, shifted)[0] - model(IDS, still)[0]).max()
    assert apart > 1e-3


def test_positions_run_out_sooner_where_tokens_are_shifted() -> None:
    model = tiny("gpt2")
    ids = np.zeros((1, 22), int)
    assert model(ids, fresh(model, position_shift=False))[0].shape[1] == 22
    with pytest.raises(ValueError, match="a sequence of 25 positions does not fit the model, which has 24"):
        model(ids, fresh(model))


@models
@pytest.mark.parametrize("left", [True, False])
def test_padding_that_is_masked_changes_nothing(family: str, architecture: str | None, left: bool) -> None:
    model = tiny(family, architecture)
    adapter = fresh(model)
    pad = np.full((2, 2), model.config.pad_token_id or 0)
    sides = ([pad, IDS], [0, 0, *[1] * 6]) if left else ([IDS, pad], [*[1] * 6, 0, 0])
    ids, mask = np.concatenate(sides[0], 1), np.array([sides[1]] * 2)
    first = model.config.pad_token_id + 1 if family == "roberta" else 0  # where a family begins to count
    places = np.where(mask, np.cumsum(mask, 1) - 1 + first, 0)
    same(model(ids, adapter, mask, None, places)[0][:, mask[0] > 0], model(IDS, adapter)[0])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("config", [{}, {"position_shift": False}], ids=["shifted", "not"])
def test_decoding(family: str, config: Any) -> None:
    """The prefix is seen at every step and is not in the cache; with padding on the left too."""
    model = tiny(family)
    adapter = fresh(model, **config)
    mask = np.array([[1] * 6, [0, 0, *[1] * 4]])
    places = np.maximum(np.cumsum(mask, 1) - 1, 0)
    whole, _ = model(IDS, adapter, mask, None, places)
    out, cache = model.decode(IDS[:, :3], None, adapter, mask[:, :3], places[:, :3])
    found = [out]
    for t in range(3, 6):
        out, cache = model.decode(IDS[:, t : t + 1], cache, adapter, mask[:, : t + 1], places[:, t : t + 1])
        found.append(out)
    assert cache[0][0].shape[1] == 6
    same(np.concatenate(found, 1)[mask > 0], whole[mask > 0])


def test_with_lora_and_a_soft_prompt() -> None:
    """Each has its own place; the prompt before the tokens sees the prefix too."""
    model = tiny("gpt2")
    lora = refpeft.init("lora", {"init_lora_weights": False}, model)
    prompt = refpeft.init("prompt_tuning", {"num_virtual_tokens": 2}, model)
    adapters = [lora, prompt, fresh(model), fresh(model, seed=1, num_virtual_tokens=2)]
    assert max(refpeft.check_model(model, IDS, adapters).values()) <= EXACT
    merged = refpeft.merge(model, lora)
    same(model(IDS, adapters)[0], merged(IDS, adapters[1:])[0])
    both_at_once = fresh(model, num_virtual_tokens=5).replace(
        params={P: np.concatenate([a.params[P] for a in adapters[2:]])}
    )
    same(model(IDS, adapters)[0], model(IDS, [lora, prompt, both_at_once])[0])


def test_half_precision() -> None:
    model = tiny("llama", dtype=ml_dtypes.bfloat16)
    for config in (FORMS["flat"], FORMS["mlp"]):
        adapter = fresh(model, **config)
        assert {a.dtype for a in adapter.params.values()} == {np.dtype(np.float32)}
        out, vjp = model(IDS, adapter)
        assert out.dtype == ml_dtypes.bfloat16
        assert {g.dtype for g in vjp(np.ones_like(out)).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, found 0"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size must be a positive integer, found 0"),
        ({"init_weights": "ones"}, "init_weights must be None or 'zero', found 'ones'"),
        ({"token_dim": 16}, "token_dim must be 8, as the keys of this model have it, found 16"),
        ({"num_layers": 3}, "num_layers must be 2, as the keys of this model have it, found 3"),
    ],
)
def test_what_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(tiny("llama"), **config)


def test_it_cannot_be_merged() -> None:
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="prefix_tuning has no merge"):
        refpeft.merge(model, fresh(model))


# ── HF peft ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hf_config(name: str, **config: Any) -> Any:
    import peft

    return peft.PrefixTuningConfig(task_type=name.split()[0], num_virtual_tokens=N, **config)


@pytest.mark.peft
@pytest.mark.parametrize("name", [name for name in HF if "CLS" not in name])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_it_is_hf_pefts(name: str, padding: str, tmp_path: Any) -> None:
    """Outputs and gradients; positions shifted by n."""
    m, model, adapter = both(name, hf_config(name), tmp_path)
    mask = np.ones((2, 6), int)
    mask[1] = {"none": mask[1], "left": [0, 0, 1, 1, 1, 1], "right": [1, 1, 1, 1, 0, 0]}[padding]
    ids = np.where(mask, IDS, model.config.pad_token_id or 0)
    out, vjp = model(ids, adapter, mask)
    dout = rng.normal(size=out.shape) * mask[..., None]
    want, grads = hf_run(m, ids, mask, dout)
    tolerance = 1e-6 if "llama" in name else EXACT  # HF computes rotary positions and norms in float32
    same(out[mask > 0], want[mask > 0], tolerance)
    assert set(grads) == {"prompt_encoder.default.embedding.weight"}
    same(vjp(dout)[P], grads["prompt_encoder.default.embedding.weight"], tolerance)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["CAUSAL_LM of gpt2", "CAUSAL_LM of llama", "FEATURE_EXTRACTION of bert"])
@pytest.mark.parametrize("h", [None, 5])
def test_the_mlp_is_hf_pefts(name: str, h: int | None, tmp_path: Any) -> None:
    m = hf(name, hf_config(name, prefix_projection=True, **({"encoder_hidden_size": h} if h else {})))
    hf_base(name).save_pretrained(tmp_path / "base")
    model = refpeft.load(tmp_path / "base").astype(np.float64)
    ours = fresh(model, prefix_projection=True, encoder_hidden_size=h)
    weights = {n: a.detach().numpy().copy() for n, a in m.prompt_encoder["default"].named_parameters()}
    assert {n.removeprefix("prompt_encoder."): a.shape for n, a in ours.params.items()} == {
        n: a.shape for n, a in weights.items()
    }
    ours = ours.replace(params={n: weights[n.removeprefix("prompt_encoder.")] for n in ours.params})
    out, vjp = model(IDS, ours)
    dout = rng.normal(size=out.shape)
    want, grads = hf_run(m, IDS, np.ones_like(IDS), dout)
    tolerance = 1e-6 if "llama" in name else EXACT
    same(out, want, tolerance)
    for n, g in vjp(dout).items():
        same(g, grads[n.replace("prompt_encoder.", "prompt_encoder.default.")], tolerance)


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # newer transformers say `cache`
@pytest.mark.parametrize("shift", [True, False])
def test_positions_are_those_that_transformers_is_given(shift: bool, tmp_path: Any) -> None:
    """A cache of our P in transformers, and the positions of the tokens said in so many words."""
    import torch
    from transformers import DynamicCache

    base = hf_base("CAUSAL_LM of gpt2")
    base.save_pretrained(tmp_path / "base")
    model = refpeft.load(tmp_path / "base").astype(np.float64)
    adapter = fresh(model, position_shift=shift)
    kv = torch.tensor(adapter.params[P]).reshape(N, 2, 2, 2, 8).permute(1, 2, 3, 0, 4)  # layer, k or v, head, n, e
    cache = DynamicCache([(layer[0][None].repeat(2, 1, 1, 1), layer[1][None].repeat(2, 1, 1, 1)) for layer in kv])
    places = torch.arange(6)[None] + (N if shift else 0)
    with torch.no_grad():
        want = base(torch.tensor(IDS), past_key_values=cache, position_ids=places).logits.numpy()
    same(model(IDS, adapter)[0], want)


@pytest.mark.peft
@pytest.mark.parametrize("name", [name for name in HF if "CLS" not in name])
@pytest.mark.parametrize("config", [FORMS["flat"], FORMS["mlp"]], ids=["flat", "mlp"])
def test_folders_both_ways(name: str, config: Any, tmp_path: Any) -> None:
    """HF peft's folders hold P, whatever made it, and come back bit for bit; it reads ours."""
    m, model, theirs = both(name, hf_config(name, **config), tmp_path)
    tolerance = 1e-6 if "llama" in name else EXACT
    same(model(IDS, theirs)[0], hf_run(m, IDS, np.ones_like(IDS)), tolerance)
    refpeft.save_adapter(theirs, tmp_path / "again")
    files = [read(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(np.array_equal(a, files[1][n]) for n, a in files[0].items())
    ours = fresh(model, seed=1, **config)
    refpeft.save_adapter(ours, tmp_path / "ours")
    back = refpeft.load_adapter(tmp_path / "ours", model)
    assert {n: a.tobytes() for n, a in back.params.items()} == {n: a.tobytes() for n, a in flat(ours).params.items()}
    loaded = hf_load(hf_base(name), tmp_path / "ours")
    rounded = {P: back.params[P].astype(np.float32).astype(np.float64)}  # as HF peft does in loading
    same(model(IDS, back.replace(params=rounded))[0], hf_run(loaded, IDS, np.ones_like(IDS)), tolerance)


def test_folders_that_are_refused(tmp_path: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="AdapterHub cannot represent position_shift=True, and HF peft no prefixes of"):
        refpeft.save_adapter(fresh(model, leave_out=[1]), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    refpeft.save_adapter(fresh(model), tmp_path / "good")
    raw = json.loads((tmp_path / "good/adapter_config.json").read_text())
    for n, (change, message) in enumerate(
        [
            ({"num_transformer_submodules": 2}, "prefixes of encoder-decoders are not read"),
            ({"num_virtual_tokens": 4}, r"'prompt_embeddings': expected shape \[4, 32\], found \[3, 32\]"),
            ({"surprise": 1}, "'surprise' is set to 1, which is not supported"),
            ({"token_dim": 16}, "token_dim must be 8"),
            ({"task_type": "SEQ_CLS"}, "matches no module|is missing"),
        ]
    ):
        where = tmp_path / f"bad{n}"
        where.mkdir()
        (where / "adapter_model.safetensors").write_bytes((tmp_path / "good/adapter_model.safetensors").read_bytes())
        (where / "adapter_config.json").write_text(json.dumps(raw | change))
        with pytest.raises(Malformed, match=message):
            refpeft.load_adapter(where, model)
