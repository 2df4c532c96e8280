"""HF's libraries and ours read what the other writes: the same tensors, bit for bit, and the same outputs."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint.safetensors import read

pytestmark = pytest.mark.peft

SMALL = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = SMALL | {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 20}
LLAMA = SMALL | {
    "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip
BERT = {
    "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24,
    "max_position_embeddings": 20, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "GPT2Model": ("GPT2Config", GPT2),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "LlamaForCausalLM, tied": ("LlamaConfig", LLAMA | {"tie_word_embeddings": True, "attention_bias": True}),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA),
    "BertModel": ("BertConfig", BERT),
    "BertForMaskedLM": ("BertConfig", BERT),
    "BertForSequenceClassification": ("BertConfig", BERT | {"num_labels": 3}),
    "BertForTokenClassification": ("BertConfig", BERT | {"num_labels": 5}),
    "RobertaForTokenClassification": ("RobertaConfig", BERT | {"pad_token_id": 1, "num_labels": 5}),
    "RobertaForMaskedLM": ("RobertaConfig", BERT | {"pad_token_id": 1}),
    "RobertaForSequenceClassification": ("RobertaConfig", BERT | {"pad_token_id": 1}),
}
IDS = np.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def hf_model(name, dtype="float32", seed=0):
    import torch
    import transformers

    config, fields = MODELS[name]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = getattr(transformers, name.split(",")[0])(getattr(transformers, config)(**fields)).eval()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.1 * torch.randn_like(p)
    return m.to(getattr(torch, dtype))


def hf_out(m, ids=IDS):
    import torch

    with torch.no_grad():
        out = m(torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)))
    return (out.logits if "logits" in out else out.last_hidden_state).double().numpy()


def hf_load(name, folder, dtype="float32"):
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, name.split(",")[0]).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def near(got, want, tolerance):
    return np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_models_both_ways(name, dtype, tmp_path):
    m = hf_model(name, dtype)
    m.save_pretrained(tmp_path / "theirs")
    model = refpeft.load(tmp_path / "theirs")
    assert {a.dtype.name for a in model.params.values()} == {dtype}
    if dtype != "bfloat16":
        assert near(model(IDS)[0], hf_out(m), 1e-5)
    refpeft.save(model, tmp_path / "ours")
    theirs, ours = read(tmp_path / "theirs/model.safetensors"), read(tmp_path / "ours/model.safetensors")
    assert all(ours[k].tobytes() == v.tobytes() for k, v in theirs.items() if k in ours)
    assert len(ours) + ("BertModel" in name) >= len(theirs) - 2
    back = hf_load(name, tmp_path / "ours", dtype)
    assert all(bool((v == back.state_dict()[k]).all()) for k, v in m.state_dict().items())
    assert near(hf_out(back), hf_out(m), 1e-14 if dtype == "float64" else 1e-6)


def test_sharded_models_are_read(tmp_path):
    m = hf_model("LlamaForCausalLM")
    m.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert near(refpeft.load(tmp_path)(IDS)[0], hf_out(m), 1e-5)


ADAPTERS = {
    "plain": ("LlamaForCausalLM", {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5}),
    "conv1d": ("GPT2LMHeadModel", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fan_in_fan_out forgotten": ("GPT2LMHeadModel", {"target_modules": ["c_attn"]}),
    "regex": ("LlamaForCausalLM", {"target_modules": r".*\.(q|k)_proj"}),
    "all-linear": ("LlamaForCausalLM", {"target_modules": "all-linear"}),
    "all-linear of bert": ("BertForSequenceClassification", {"target_modules": "all-linear"}),
    "all-linear, SEQ_CLS": (
        "BertForSequenceClassification",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "SEQ_CLS of roberta": (
        "RobertaForSequenceClassification",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "TOKEN_CLS": ("BertForTokenClassification", {"task_type": "TOKEN_CLS"}),
    "TOKEN_CLS of roberta": (
        "RobertaForTokenClassification",
        {"target_modules": ["query", "key", "output.dense"], "task_type": "TOKEN_CLS"},
    ),
    "modules_to_save": (
        "BertForSequenceClassification",
        {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]},
    ),
    "embedding": ("GPT2LMHeadModel", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "embedding and head, tied": ("LlamaForCausalLM, tied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding saved": ("LlamaForCausalLM", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "rank_pattern": (
        "LlamaForCausalLM",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.0.*": 3, "proj": 9, "q_proj": 2},
            "alpha_pattern": {"k_proj": 2, "layers.1.self_attn.k_proj": 7},
        },
    ),
    "dora": ("LlamaForCausalLM", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora, rslora": (
        "GPT2LMHeadModel",
        {"target_modules": ["c_attn", "wte"], "use_dora": True, "use_rslora": True, "fan_in_fan_out": True},
    ),
    "rslora": ("Qwen2ForCausalLM", {"target_modules": ["q_proj"], "use_rslora": True, "r": 4}),
    "lora_bias": ("Qwen2ForCausalLM", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias all": (
        "BertForSequenceClassification",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "bias all, masked lm": ("BertForMaskedLM", {"target_modules": ["query", "value"], "bias": "all"}),
    "head saved": ("RobertaForMaskedLM", {"target_modules": ["query"], "modules_to_save": ["lm_head"]}),
    "bias lora_only": ("GPT2LMHeadModel", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "exclude_modules": (
        "LlamaForCausalLM",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "layers": (
        "LlamaForCausalLM",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "one layer": ("BertModel", {"target_modules": ["query"], "layers_to_transform": 0, "r": 2}),
}


@pytest.fixture(params=ADAPTERS)
def pair(request, tmp_path):
    """An HF peft model with all of its parameters moved, its folders, and its base in ours."""
    import peft
    import torch

    name, fields = ADAPTERS[request.param]
    base = hf_model(name)
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = peft.get_peft_model(base, peft.LoraConfig(**fields)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in m.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn_like(p)
        m.save_pretrained(tmp_path / "theirs")
    return name, m, refpeft.load(tmp_path / "base"), tmp_path


def peft_load(name, folder, adapter, dtype="float32"):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(hf_load(name, folder, dtype), adapter).eval()


def test_adapters_both_ways(pair):
    name, m, model, tmp = pair
    adapter = refpeft.load_adapter(tmp / "theirs", model)
    assert near(model(IDS, adapter)[0], hf_out(m), 1e-5)
    refpeft.save_adapter(adapter, tmp / "ours")
    theirs, ours = (read(tmp / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    repeated = {k for k in theirs if re.search(r"modules_to_save.bias|original_module|base_layer.weight", k)}
    assert ours.keys() == theirs.keys() - repeated
    assert all(ours[k].tobytes() == theirs[k].tobytes() and ours[k].shape == theirs[k].shape for k in ours)
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-6)):
        back = peft_load(name, tmp / "base", tmp / "ours", dtype)
        wide = refpeft.load(tmp / "base", dtype=dtype)
        assert near(wide(IDS, refpeft.load_adapter(tmp / "ours", wide))[0], hf_out(back), tolerance)
    assert np.array_equal(
        hf_out(peft_load(name, tmp / "base", tmp / "ours")), hf_out(peft_load(name, tmp / "base", tmp / "theirs"))
    )


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_pissa_and_olora_become_plain_adapters(method, how, tmp_path):
    hf_model("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    model = refpeft.load(tmp_path / "base")
    fields = {"init_lora_weights": how, "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
    fields |= {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    adapter = refpeft.init(method, fields, model)
    rng = np.random.default_rng(0)
    moved = {k: v + (0.1 * rng.normal(size=v.shape)).astype(v.dtype) for k, v in adapter.params.items()}
    adapter = adapter.replace(params=moved)
    refpeft.save_adapter(adapter, tmp_path / "ours")
    want = np.asarray(model(IDS, adapter)[0], np.float64)
    assert near(model(IDS, refpeft.load_adapter(tmp_path / "ours", model))[0], want, 1e-5)
    assert near(hf_out(peft_load("LlamaForCausalLM", tmp_path / "base", tmp_path / "ours")), want, 1e-5)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_pissa_and_olora_folders_of_peft_mean_what_peft_does_with_them(how, tmp_path):
    """HF peft's loading takes the factors off the base again, so outputs after a reload are those before it."""
    import peft

    base = hf_model("LlamaForCausalLM")
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=how, r=2, target_modules=["q_proj"])).eval()
        m.save_pretrained(tmp_path / "theirs")
    model = refpeft.load(tmp_path / "base")
    adapter = refpeft.load_adapter(tmp_path / "theirs", model)
    want = hf_out(peft_load("LlamaForCausalLM", tmp_path / "base", tmp_path / "theirs"))
    assert near(model(IDS, adapter)[0], want, 1e-5)


def test_the_order_of_patterns_is_kept(tmp_path):
    """The first key that matches wins. HF peft sorts them when it saves, and then cannot read its own file."""
    name = "LlamaForCausalLM"
    hf_model(name).save_pretrained(tmp_path / "base")
    model = refpeft.load(tmp_path / "base")
    fields = {"target_modules": ["q_proj"], "init_lora_weights": False}
    patterns = {"rank_pattern": {"q_proj": 2, "layers.0.*": 3}, "alpha_pattern": {"q_proj": 5, "layers.0.*": 7}}
    adapter = refpeft.init("lora", fields | patterns, model)
    refpeft.save_adapter(adapter, tmp_path / "ours")
    want = np.asarray(model(IDS, adapter)[0], float)
    assert near(model(IDS, refpeft.load_adapter(tmp_path / "ours", model))[0], want, 1e-7)
    assert near(hf_out(peft_load(name, tmp_path / "base", tmp_path / "ours")), want, 1e-5)


def test_merged_and_untied_models_load_in_transformers(tmp_path):
    for n, name in enumerate(("LlamaForCausalLM, tied", "BertForMaskedLM", "GPT2LMHeadModel")):
        hf_model(name).save_pretrained(tmp_path / f"base{n}")
        model = refpeft.load(tmp_path / f"base{n}")
        target = {"llama": ["embed_tokens"], "bert": ["decoder"], "gpt2": ["wte"]}[model.config.family]
        adapter = refpeft.init("lora", {"target_modules": target, "init_lora_weights": False}, model)
        merged = refpeft.merge(model, adapter)
        refpeft.save(merged, tmp_path / f"merged{n}")
        assert json.loads(Path(tmp_path / f"merged{n}/config.json").read_text())["tie_word_embeddings"] is False
        assert near(hf_out(hf_load(name, tmp_path / f"merged{n}")), np.asarray(model(IDS, adapter)[0], float), 1e-5)
        assert near(refpeft.load(tmp_path / f"merged{n}")(IDS)[0], np.asarray(merged(IDS)[0], float), 1e-6)
