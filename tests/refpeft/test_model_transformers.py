"""The transformer against HF transformers, and LLaMA against a float64 oracle of our own.

transformers computes GPT-2, BERT and RoBERTa in float64 if their weights are: there, equal means 1e-10 relative. Its
LLaMA and Qwen2 normalise and rotate in float32 whatever the weights are, so that they themselves are only right to
about 1e-7 in outputs and 1e-6 in gradients, where roundings add up; we compare at 1e-6 and 5e-6 and, in float64 to
1e-12, with `llama_oracle` below, written from the papers in loops
and einsum, without `refpeft.ops`.
"""

from typing import Any

import numpy as np
import pytest

from refpeft import Model
from refpeft.checkpoint.families import describe
from tests.models import ARCHITECTURES, config_json, tiny

Array = np.ndarray[Any, Any]
EXACT = 1e-12
OURS_AND_THEIRS = {"gpt2": 1e-10, "bert": 1e-10, "roberta": 1e-10, "llama": 1e-6, "qwen2": 1e-6}
every_architecture = pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)


def tokens(*shape: int) -> Array:
    return np.random.default_rng(0).integers(2, 29, shape)


def padding(side: str, ids: Array, pad: int) -> tuple[Array, Array, Array]:
    """ids with padding in two rows, the mask, and positions counted from the first token."""
    mask = np.ones_like(ids)
    if side == "left":
        mask[0, :3] = mask[1, :1] = 0
    if side == "right":
        mask[0, 4:] = mask[1, 6:] = 0
    return np.where(mask, ids, pad), mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def in_transformers(model: Model, dtype: str = "float64") -> Any:
    """The same model as transformers has it, with our weights."""
    import torch
    import transformers

    fields = {k: v for k, v in model.source.items() if k not in ("model_type", "architectures")}
    # sdpa: the eager attention of LLaMA has a float32 softmax, whose −∞ is nan for a query that sees nothing
    config = transformers.AutoConfig.for_model(model.source["model_type"], **fields, attn_implementation="sdpa")
    theirs = getattr(transformers, model.source["architectures"][0])(config).eval().to(getattr(torch, dtype))
    found = theirs.load_state_dict({n: torch.tensor(v) for n, v in model.params.items()}, strict=False)
    tied = {"lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    tied |= {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= tied
    theirs.tie_weights()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # a habit of training: the padding's row would get no gradient
    return theirs


def same(ours: Array, theirs: Array, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def agree(model: Model, ids: Array, inputs: dict[str, Array], kept: Array, tolerance: float) -> None:
    """Outputs where `kept`, and the gradients of every parameter for a random cotangent there."""
    import torch

    theirs = in_transformers(model)
    out = theirs(input_ids=torch.tensor(ids), **{k: torch.tensor(v) for k, v in inputs.items()})[0]
    y, vjp = model(ids, **inputs)
    assert y.shape == tuple(out.shape)
    kept = kept if y.ndim == 3 else np.ones(len(ids), bool)
    same(y[kept], out.detach().numpy()[kept], tolerance)
    dy = np.random.default_rng(1).normal(size=y.shape) * kept[..., None]
    out.backward(torch.tensor(dy))
    _, base = vjp(dy, base=True)
    compared = {}
    for name, p in theirs.named_parameters():
        compared[name] = np.zeros(p.shape) if p.grad is None else p.grad.numpy()
    assert set(compared) == set(base)
    largest = max(np.linalg.norm(d) for d in compared.values())
    for name, d in base.items():  # the bias of the keys has gradient 0 but for rounding, hence a scale for it too
        scale = max(np.linalg.norm(compared[name]), largest / 100)
        assert np.linalg.norm(d - compared[name]) <= 5 * tolerance * scale, name


@pytest.mark.peft
@pytest.mark.parametrize("side", ["none", "left", "right"])
@every_architecture
def test_outputs_and_all_gradients_are_those_of_transformers(family: str, architecture: str, side: str) -> None:
    model = tiny(family, architecture)
    pad = model.source.get("pad_token_id", 0)
    ids, mask, places = padding(side, tokens(3, 7), pad)
    inputs = {} if side == "none" else {"attention_mask": mask}
    if side == "left" and family != "roberta":
        inputs["position_ids"] = places
    agree(model, ids, inputs, mask.astype(bool), OURS_AND_THEIRS[family])


VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "LMHeadModel", {"tie_word_embeddings": False}),
    ("gpt2", "LMHeadModel", {"n_inner": 40, "layer_norm_epsilon": 1e-3}),
    ("gpt2", "LMHeadModel", {"activation_function": "relu"}),
    ("llama", "ForCausalLM", {"tie_word_embeddings": True}),
    ("llama", "ForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "ForCausalLM", {"num_key_value_heads": 1, "head_dim": 6}),
    ("llama", "ForCausalLM", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    ("qwen2", "ForCausalLM", {"tie_word_embeddings": True}),
    ("bert", "ForMaskedLM", {"hidden_act": "gelu_new"}),
    ("bert", "ForSequenceClassification", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
]


@pytest.mark.peft
@pytest.mark.parametrize(("family", "architecture", "config"), VARIANTS, ids=[f"{f}-{c}" for f, _, c in VARIANTS])
def test_config_fields_mean_what_they_mean_to_transformers(
    family: str, architecture: str, config: dict[str, Any]
) -> None:
    ids = tokens(2, 6)
    agree(tiny(family, architecture, **config), ids, {}, np.ones_like(ids, bool), OURS_AND_THEIRS[family])


@pytest.mark.peft
def test_token_types() -> None:
    ids = tokens(2, 6)
    agree(tiny("bert"), ids, {"token_type_ids": ids % 2}, np.ones_like(ids, bool), 1e-10)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]  # fmt: skip


@pytest.mark.peft
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    """To float32, in which transformers keeps them; in both spellings of config.json."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    θ = rope["rope_theta"]
    c = config_json("llama", hidden_size=128, max_position_embeddings=512)
    old = {"rope_theta": θ, "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    shared = {k: v for k, v in c.items() if k not in ("model_type", "architectures")}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**shared, **old)).inv_freq.numpy()
    for spelling in (old, {"rope_parameters": rope}):
        ours, _, _ = describe(c | spelling)
        np.testing.assert_allclose(ours.inv_freq, theirs, rtol=1e-6)


@pytest.mark.peft
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotated_models_are_those_of_transformers(rope: dict[str, Any]) -> None:
    ids = tokens(2, 8)
    scaling = {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    agree(tiny("llama", **scaling), ids, {}, np.ones_like(ids, bool), OURS_AND_THEIRS["llama"])


# ── LLaMA in float64, from the papers ────────────────────────────────────────────────────────────────────────────────


def llama_oracle(model: Model, ids: Array, mask: Array, θ: float = 10000.0) -> Array:
    """Logits [s, v] of one row: a token at a time, a head at a time."""
    c, p = model.source, model.params
    h, g, d = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    e = c.get("head_dim") or d // h
    place = np.maximum(np.cumsum(mask) - 1, 0)

    def norm(x: Array, name: str) -> Array:
        return p[name] * x / np.sqrt(np.einsum("sd,sd->s", x, x) / d + c.get("rms_norm_eps", 1e-6))[:, None]

    def times(x: Array, name: str) -> Array:
        return np.einsum("si,oi->so", x, p[name + ".weight"]) + p.get(name + ".bias", 0.0)

    def turned(x: Array, at: int) -> Array:
        y = x.copy()
        for k in range(e // 2):
            φ = place[at] * θ ** (-2 * k / e)
            y[k] = x[k] * np.cos(φ) - x[k + e // 2] * np.sin(φ)
            y[k + e // 2] = x[k + e // 2] * np.cos(φ) + x[k] * np.sin(φ)
        return y

    x = p["model.embed_tokens.weight"][ids]
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (times(y, f"{at}self_attn.{name}_proj").reshape(len(ids), -1, e) for name in "qkv")
        a = np.zeros_like(q)
        for s, head in np.ndindex(len(ids), h):
            seen = [t for t in range(s + 1) if mask[t]]
            score = [turned(q[s, head], s) @ turned(k[t, head * g // h], t) / np.sqrt(e) for t in seen]
            w = np.exp(np.array(score) - max(score, default=0))
            a[s, head] = sum((wt * v[t, head * g // h] for wt, t in zip(w / w.sum(), seen, strict=True)), np.zeros(e))
        x = x + times(a.reshape(len(ids), h * e), at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = times(y, at + "mlp.gate_proj")
        x = x + times(gate / (1 + np.exp(-gate)) * times(y, at + "mlp.up_proj"), at + "mlp.down_proj")
    x = norm(x, "model.norm.weight")
    return np.einsum("sd,vd->sv", x, p.get("lm_head.weight", p["model.embed_tokens.weight"]))


ORACLES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 6, "rope_theta": 100.0, "rms_norm_eps": 1e-2}),
]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("family", "config"), ORACLES, ids=[f"{f}-{c}" for f, c in ORACLES])
def test_llama_equals_its_float64_oracle(family: str, config: dict[str, Any], side: str) -> None:
    model = tiny(family, **config)
    ids, mask, places = padding(side, tokens(3, 7), 0)
    out, _ = model(ids, attention_mask=mask, position_ids=places)
    for n in range(3):
        kept = mask[n].astype(bool)
        oracle = llama_oracle(model, ids[n], mask[n], config.get("rope_theta", 10000.0))
        same(out[n][kept], oracle[kept], EXACT)
