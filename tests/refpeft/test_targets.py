"""Which modules a config adapts, with which rank and α: the same as HF peft, over drawn configs; and dropout masks."""

import functools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refpeft
from refpeft import tune
from refpeft.checkpoint.families import plan
from refpeft.methods import METHODS

BERT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 6,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
}
LLAMA = {k: v for k, v in BERT.items() if k != "type_vocab_size"} | {"num_key_value_heads": 1}
GPT2 = {"vocab_size": 11, "n_embd": 8, "n_head": 2, "n_layer": 3, "n_positions": 12}
MODELS = {
    "GPT2Model": ("gpt2", GPT2),
    "GPT2LMHeadModel": ("gpt2", GPT2),
    "GPT2ForSequenceClassification": ("gpt2", GPT2),
    "LlamaModel": ("llama", LLAMA),
    "LlamaForCausalLM": ("llama", LLAMA),
    "Qwen2ForCausalLM": ("qwen2", LLAMA),
    "BertModel": ("bert", BERT),
    "BertForMaskedLM": ("bert", BERT),
    "BertForSequenceClassification": ("bert", BERT),
    "RobertaModel": ("roberta", BERT),
    "RobertaForMaskedLM": ("roberta", BERT),
    "RobertaForSequenceClassification": ("roberta", BERT),
}


@functools.cache
def ours(name):
    kind, fields = MODELS[name]
    source = {"model_type": kind, "architectures": [name], "tie_word_embeddings": False, **fields}
    p = plan(source)
    rng = np.random.default_rng(0)
    return refpeft.Model(
        p.config, p.sites, {n: rng.normal(size=s).astype(np.float32) for n, s in p.shapes.items()}, source
    )


def theirs(name, fields):
    """Module → (r, α) as HF peft adapts it, and the names of what it trains whole; None if it refuses."""
    import peft
    import torch
    import transformers

    kind, sizes = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {
            "gpt2": "GPT2Config",
            "llama": "LlamaConfig",
            "qwen2": "Qwen2Config",
            "bert": "BertConfig",
            "roberta": "RobertaConfig",
        }
        extra = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
        with torch.device("meta"):
            m = getattr(transformers, name)(getattr(transformers, config[kind])(**sizes, **extra))
        try:
            m = peft.get_peft_model(m, peft.LoraConfig(init_lora_weights=False, **fields))
        except (ValueError, TypeError):
            return None
    adapted = {
        path.removeprefix("base_model.model."): (layer.r["default"], layer.lora_alpha["default"])
        for path, layer in m.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    whole = {
        path.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for path, p in m.named_parameters()
        if "modules_to_save.default" in path
    }
    return adapted, whole - {"lm_head.bias", "cls.predictions.bias"}  # second names of the decoder's bias


def mine(name, fields):
    model = ours(name)
    try:
        cfg = tune.configured(METHODS["lora"], "lora", fields, model)
        chosen = tune.targets(cfg, model)
        whole = set(tune.saved_whole(cfg, model))
    except ValueError:
        return None
    paths = [model.sites[role].path for role in chosen]
    return {path: (cfg.at(path).r, cfg.at(path).lora_alpha) for path in paths}, whole


NAMES = [
    "query",
    "key",
    "value",
    "dense",
    "output.dense",
    "attention.output.dense",
    "c_attn",
    "attn.c_proj",
    "c_proj",
    "c_fc",
    "q_proj",
    "self_attn.v_proj",
    "proj",
    "up_proj",
    "down_proj",
    "wte",
    "wpe",
    "embed_tokens",
    "word_embeddings",
    "lm_head",
    "score",
    "classifier",
    "decoder",
    "h.1.attn.c_attn",
    "transformer.h.1.attn.c_attn",
    "model.layers.0.mlp.up_proj",
    "layers.0.mlp.up_proj",
    "attn",
    "mlp",
    "LayerNorm",
    "ln_1",
    "norm",
    "pooler",
    "pooler.dense",
    "out_proj",
    "gone",
]
REGEXES = [
    r".*\.(q_proj|v_proj|query|c_attn)",
    r".*\.1\..*(query|c_attn|up_proj)",
    r"h\.0\..*c_fc",
    r".*dense",
    r".*",
    "all-linear",
    "ALL-LINEAR",
    r".*(wte|embed_tokens|word_embeddings)",
    r"(?!.*layer).*dense",
    "c_attn",
    "",
]
PATTERNS = st.dictionaries(
    st.sampled_from([*NAMES[:20], ".*", r"layers\.0\..*", r"h\.1\..*", "0.*", r".*\.0\..*", r"(q|k)_proj", "d.*"]),
    st.integers(1, 9),
    max_size=3,
)
FIELDS = st.fixed_dictionaries(
    {"target_modules": st.lists(st.sampled_from(NAMES), min_size=1, max_size=4) | st.sampled_from(REGEXES)},
    optional={
        "exclude_modules": st.lists(st.sampled_from(NAMES), max_size=2) | st.sampled_from(REGEXES),
        "layers_to_transform": st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
        "layers_pattern": st.sampled_from(["h", "layers", "layer", "", "gone"])
        | st.lists(st.sampled_from(["h", "layer", "layers"]), max_size=2),
        "modules_to_save": st.lists(
            st.sampled_from(["classifier", "score", "pooler", "lm_head", "wte", "layers.0"]), max_size=2
        ),
        "rank_pattern": PATTERNS,
        "alpha_pattern": PATTERNS,
    },
)


@pytest.mark.peft
@settings(max_examples=100)
@given(name=st.sampled_from([*MODELS]), fields=FIELDS)
def test_targets_are_those_of_peft(name, fields):
    got, want = mine(name, fields), theirs(name, fields)
    if want and fields.get("modules_to_save") and not want[1]:
        want = None  # where HF peft says nothing, we say that modules_to_save matches nothing
    assert got == want


@pytest.mark.peft
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_and_defaults_are_those_of_peft(name):
    for fields in (
        {"target_modules": "all-linear"},
        {},
        {"target_modules": "all-linear", "exclude_modules": ["dense"]},
    ):
        assert mine(name, fields) == theirs(name, fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 3},
        {"r": 2.0},
        {"r": "2"},
        {"r": True},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"target_modules": 3},
        {"target_modules": [3]},
        {"target_modules": "("},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"c": "2"}},
        {"bias": None},
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        {"layers_pattern": "h"},
        {"modules_to_save": "wte"},
        {"modules_to_save": ["gone"]},
        {"target_modules": ["ln_1"]},
        {"target_modules": ["mlp"]},
        {"target_modules": []},
        {3: 4},
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(fields):
    with pytest.raises(ValueError, match=r"\S") as e:
        refpeft.init("lora", {"target_modules": ["c_attn"]} | fields, ours("GPT2LMHeadModel"))
    assert "\n" not in str(e.value)


def test_sets_are_lists_and_methods_are_known():
    model = ours("GPT2LMHeadModel")
    as_set = refpeft.init("lora", {"target_modules": {"c_fc", "c_attn"}}, model)
    as_list = refpeft.init("lora", {"target_modules": ["c_fc", "c_attn"]}, model)
    assert as_set.params.keys() == as_list.params.keys()
    with pytest.raises(ValueError, match="unknown method 'lore'"):
        refpeft.init("lore", {}, model)


def test_dropout_masks():
    model = ours("GPT2ForSequenceClassification")
    fields = {
        "target_modules": ["c_attn", "wte", "score", "mlp.c_proj"],
        "lora_dropout": 0.25,
        "init_lora_weights": False,
    }
    adapter = refpeft.init("lora", fields, model)
    ids = np.arange(10).reshape(2, 5)
    dropped = refpeft.dropout(adapter, model, (2, 5), seed=3)
    assert dropped.masks.keys() == {
        k.removesuffix(".lora_A.weight") for k in adapter.params if k.endswith("lora_A.weight")
    }
    assert {v for m in dropped.masks.values() for v in np.unique(m)} == {np.float32(0), np.float32(4 / 3)}
    assert 0.1 < np.mean([m.mean() == 0 or (m == 0).mean() for m in dropped.masks.values()]) < 0.5
    out, vjp = model(ids, dropped)
    assert out.shape == model(ids, adapter)[0].shape
    assert not np.allclose(out, model(ids, adapter)[0])
    assert vjp(out).keys() == adapter.params.keys()
    again = refpeft.dropout(adapter, model, (2, 5), seed=3)
    assert all(np.array_equal(again.masks[k], m) for k, m in dropped.masks.items())
    none = refpeft.init("lora", fields | {"lora_dropout": 0.0}, model)
    assert refpeft.dropout(none, model, (2, 5)).masks == {}
