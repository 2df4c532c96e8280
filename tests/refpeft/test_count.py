"""Counting: what is counted is what `init` makes, what HF peft counts, and what is in the files."""

import math
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft import METHODS, Adapter, Model
from refpeft.checkpoint import outlines
from refpeft.count import Kind, count, outline
from refpeft.hollow import hollow
from tests.models import ARCHITECTURES, CONFIGS, ENCODER_DECODERS, tiny

NEEDED: dict[str, dict[str, Any]] = {  # without which a method has nothing to do, or too little
    "trainable_tokens": {"token_indices": [2, 5, 7]},
    "adalora": {"total_step": 100},
    "did": {"d": 50},
    "said": {"d": 200},
    "houlsby": {"reduction_factor": 4},
    "pfeiffer": {"reduction_factor": 4},
    "parallel": {"reduction_factor": 4},
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"lora_bias": True, "bias": "all", "target_modules": "all-linear"}),
    ("lora", {"bias": "lora_only", "rank_pattern": {"h.1.attn.c_attn": 3, "v_proj": 1, "query": 5}}),
    ("lora", {"modules_to_save": ["score", "classifier", "ln_f", "norm"]}),
    ("lora", {"target_modules": ["wte", "c_attn", "embed_tokens", "word_embeddings", "shared"]}),
    ("lora", {"init_lora_weights": "pissa"}),
    ("dora", {"init_lora_weights": "olora"}),
    ("rslora", {"init_lora_weights": "orthogonal", "r": 6}),
    ("lora", {"init_lora_weights": "orthogonal", "r": 5}),
    ("lora", {"init_lora_weights": "pissa", "r": 40}),
    ("lora", {"init_lora_weights": "pissa", "target_modules": ["wte", "embed_tokens", "word_embeddings"]}),
    ("lora", {"target_modules": ["nothing"]}),
    ("partial", {"layers": 1, "head": True, "tied": True}),
    ("bitfit", {"biases": "query_and_intermediate", "modules_to_save": ["score", "classifier"]}),
    ("ln_tuning", {"exclude_modules": ["ln_f", "norm"]}),
    ("trainable_tokens", {"token_indices": [30]}),
    ("prompt_tuning", {"num_virtual_tokens": 3, "num_transformer_submodules": 2}),
    ("p_tuning", {"encoder_hidden_size": 8}),
    ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2, "encoder_hidden_size": 8}),
    ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 20, "input_size": 12}),
    ("prefix_tuning", {"leave_out": [0], "num_virtual_tokens": 2}),
    ("did", {"d": 3, "target_modules": ["c_attn.bias", "q_proj", "query"]}),
    ("houlsby", {"reduction_factor": 2, "use_gating": True, "scaling": "channel", "ln_before": True}),
    ("pfeiffer", {"reduction_factor": 3.2, "leave_out": [0], "scaling": "learned", "ln_after": True}),
]
MODELS = [(*one, {}) for one in ARCHITECTURES] + list(ENCODER_DECODERS.values())
CASES = [(m, NEEDED.get(m, {})) for m in METHODS] + OPTIONS


def spec(adapter: Adapter) -> list[list[tuple[str, tuple[int, ...], Any]]]:
    return [[(n, a.shape, a.dtype) for n, a in arrays.items()] for arrays in (adapter.params, adapter.frozen)]


def said(f: Callable[..., Any], *args: Any) -> Any:
    """What f returns, or the words in which it refuses."""
    try:
        return f(*args)
    except ValueError as refused:
        return str(refused)


def agree(method: str, config: dict[str, Any], model: Model) -> bool:
    """The outline of a hollow model is what `init` makes of a real one: names in order, shapes, dtypes; or both refuse
    it in the same words. Is it not refused?"""
    bare = outlines.of_config(model.source, next(iter(model.params.values())).dtype.name)
    made, found = said(refpeft.init, method, config, model), said(outline, method, config, bare)
    if isinstance(made, str) or isinstance(found, str):
        assert found == made
        return False
    assert spec(found) == spec(made)
    assert found.config == made.config
    number = count(found, bare)
    assert number.trained == sum(a.size for a in made.params.values()) == sum(k.parameters for k in number.kinds)
    assert number.companions == sum(a.size for a in made.frozen.values())
    assert number.model == sum(a.size for n, a in model.params.items() if n not in model.config.buffers)
    return True


@pytest.mark.parametrize(("family", "architecture", "own"), MODELS)
def test_what_is_counted_is_what_init_makes(family: str, architecture: str, own: dict[str, Any]) -> None:
    model = tiny(family, architecture, dtype=np.float32, **own)
    made = {method for method, config in CASES if agree(method, config, model)}
    unable = {"bitfit"} if family in ("llama", "t5") else set()  # they have no biases
    heads = {"score", "classifier"} & {site.path.split(".")[0] for site in model.sites.values()}
    unable |= set() if heads else {"p_tuning_v2"}
    assert set(METHODS) - made == unable


@pytest.mark.parametrize("family", CONFIGS)
def test_adapters_of_16_bit_models_are_counted_as_they_are_made(family: str) -> None:
    head = "ForConditionalGeneration" if family in ("t5", "bart") else "ForSequenceClassification"
    model = tiny(family, head, dtype=ml_dtypes.bfloat16)
    assert sum(agree(method, config, model) for method, config in CASES) > len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_its_shapes_beside_its_init(method: str) -> None:
    m = METHODS[method]
    assert hasattr(m, "outline_model" if hasattr(m, "init_model") else "shapes")


def test_a_method_that_does_not_say_its_shapes_is_counted_by_what_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    expected = {method: spec(outline(method, {}, model)) for method in ("lora", "prompt_tuning")}
    monkeypatch.delattr(METHODS["lora"], "shapes")
    monkeypatch.delattr(METHODS["prompt_tuning"], "outline_model")
    monkeypatch.setattr(METHODS["lora"], "init", lambda cfg, part, rng: dict(zip("AB", ab(cfg.r, part.W), strict=True)))
    assert {method: spec(outline(method, {}, model)) for method in expected} == expected


def ab(r: int, W: Any) -> list[Any]:
    return [np.zeros((r, W.shape[1])), np.zeros((W.shape[0], r))]


# ── where, and how much of it ────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_are_listed_by_kind_of_module() -> None:
    """Two layers of width 16; the second has another rank in q_proj, and so stands alone."""
    model = tiny("llama", "ForSequenceClassification")
    config = {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "modules_to_save": ["score"]}
    kinds = count(outline("lora", config, model), model).kinds
    at = "model.layers.*.self_attn."
    assert kinds == (
        Kind(at + "q_proj", {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2)}, 1),
        Kind(at + "v_proj", {"lora_A.weight": (2, 16), "lora_B.weight": (8, 2)}, 2),
        Kind(at + "q_proj", {"lora_A.weight": (3, 16), "lora_B.weight": (16, 3)}, 1),
        Kind("score", {"weight": (3, 16)}, 1),
    )
    assert [kind.parameters for kind in kinds] == [64, 2 * 48, 96, 48]


def test_what_belongs_to_no_module_is_listed_so() -> None:
    model = tiny("bert")
    (kind,) = count(outline("p_tuning", {"num_virtual_tokens": 3}, model), model).kinds
    assert (kind.module, kind.modules, kind.tensors["embedding.weight"]) == ("", 1, (3, 16))
    (kind,) = count(outline("prefix_tuning", {"num_virtual_tokens": 3}, model), model).kinds
    assert (kind.module, kind.tensors) == ("", {"prompt_embeddings": (3, 2 * 2 * 16)})


@pytest.mark.parametrize(
    ("method", "config", "added"),
    [
        ("full", {}, 0),
        ("bitfit", {}, 0),
        ("lora", {"r": 2, "bias": "all"}, 2 * (2 * 16 + 48 * 2)),
        ("lora", {"r": 2, "modules_to_save": ["score"]}, 2 * (2 * 16 + 48 * 2) + 3 * 16),
        ("houlsby", {"reduction_factor": 8}, 4 * (2 * 16 * 2 + 2 + 16)),
    ],
)
def test_the_share_is_of_the_model_and_of_both(method: str, config: dict[str, Any], added: int) -> None:
    """What the model has already, and is trained in its place, adds nothing to it."""
    model = tiny("gpt2", "ForSequenceClassification")
    found = count(outline(method, config, model), model)
    size = sum(a.size for a in model.params.values())
    assert (found.model, found.added) == (size, added)
    assert math.isclose(found.share, found.trained / size)
    assert math.isclose(found.share_of_both, found.trained / (size + added))


def test_a_tied_tensor_is_counted_once() -> None:
    tied, apart = (outlines.of_config(tiny("gpt2", tie_word_embeddings=on).source) for on in (True, False))
    assert count(outline("full", {}, apart), apart).model - count(outline("full", {}, tied), tied).model == 29 * 16


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hollow_array_takes_no_memory_and_holds_zeros() -> None:
    a = hollow((3, 4), "float16")
    assert (a.shape, a.dtype, a.strides, a.nbytes) == ((3, 4), np.float16, (0, 0), 24)
    assert not a.any()
    assert not a.flags.writeable


@pytest.mark.parametrize("method", METHODS)
def test_counting_gpt3_takes_a_few_megabytes(method: str) -> None:
    """Its 175 billion parameters and, of DID and SAID, five times as many entries of projections."""
    config: dict[str, Any] = {**NEEDED.get(method, {}), **({"d": 2000} if method in ("did", "said") else {})}
    if method == "p_tuning_v2":
        config["modules_to_save"] = None
    tracemalloc.start()
    try:
        model = outlines.model("gpt3")
        found = count(outline(method, config, model), model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.model == 174_604_259_328
    assert peak < (12e6 if method in ("did", "said") else 4e6)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_size(adapter: Adapter, tmp_path: Path) -> int:
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    return file.stat().st_size


@pytest.mark.parametrize(("method", "config"), CASES)
def test_files_have_the_length_that_is_foretold(method: str, config: dict[str, Any], tmp_path: Path) -> None:
    """To the byte, header included; without the network that made a prompt, and pissa as the LoRA of rank 2r. What no
    file can hold is refused in the same words."""
    model = tiny("gpt2", "ForSequenceClassification", dtype=np.float32)
    bare = outlines.of_config(model.source)
    made = said(lambda: file_size(refpeft.init(method, config, model), tmp_path))
    assert made == said(lambda: outlines.adapter_bytes(outline(method, config, bare), "float32"))
    assert isinstance(made, int) or config not in NEEDED.values()


def test_an_adapter_that_was_loaded_has_the_length_of_its_file(tmp_path: Path) -> None:
    """Of P-tuning, without its encoder; of prefix tuning, without its MLP."""
    model = tiny("gpt2", dtype=np.float32)
    for method, config in (("p_tuning", {}), ("prefix_tuning", {"prefix_projection": True}), ("lora", {})):
        (tmp_path / method).mkdir()
        size = file_size(refpeft.init(method, config, model), tmp_path / method)
        loaded = refpeft.load_adapter(tmp_path / method / "adapter", model)
        assert outlines.adapter_bytes(loaded, "float32") == size


@pytest.mark.parametrize(("family", "architecture", "own"), MODELS)
def test_a_model_file_has_the_length_that_is_foretold(
    family: str, architecture: str, own: dict[str, Any], tmp_path: Path
) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        model = tiny(family, architecture, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, **own)
        refpeft.save(model, tmp_path / dtype)
        size = (tmp_path / dtype / "model.safetensors").stat().st_size
        assert outlines.model_bytes(outlines.of_config(model.source), dtype) == size


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("float64", 8)])
def test_the_numbers_of_a_file_are_of_the_dtype_asked_for(dtype: str, itemsize: int) -> None:
    """All but the integers of DID: signs of 1 byte, places of 4, in projections of a power of two."""
    model = outlines.of_config(tiny("llama").source)
    lora = outline("lora", {"r": 2}, model)
    header = outlines.adapter_bytes(lora, dtype) - itemsize * count(lora, model).trained
    assert 8 < header < 140 * len(lora.params)
    did = outline("did", {"d": 64, "target_modules": ["0.self_attn.q_proj"]}, model)  # one matrix of 256
    length = outlines.adapter_bytes(did, dtype) - 64 * itemsize - 256 * (1 + 4 + itemsize)
    assert 8 < length < 140 * 4


# ── HF peft ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # HF peft's config class, its fields, ours
    "lora": ("LoraConfig", {"r": 3}, {}),
    "lora-all-linear": ("LoraConfig", {"target_modules": "all-linear", "bias": "all"}, {}),
    "lora-only": ("LoraConfig", {"r": 2, "bias": "lora_only"}, {}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}, {"use_dora": True}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}, {}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 6}, {}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}, {}),
    "prefix_tuning-mlp": ("PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True}, {}),
}


def nb(model: Any, config: Any) -> tuple[int, int]:
    """What print_trainable_parameters prints."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about each other
        numbers: tuple[int, int] = peft.get_peft_model(model, config).get_nb_trainable_parameters()
    return numbers


@pytest.mark.peft
@pytest.mark.parametrize("option", PEFT)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_hf_peft_counts_the_same(family: str, option: str) -> None:
    """Trained parameters, and those of model and adapter together."""
    import peft
    import transformers

    name, fields, ours = PEFT[option]
    source = tiny(family).source
    config = getattr(peft, name)(task_type="CAUSAL_LM", **fields)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**source))
    model = outlines.of_config(source)
    found = count(outline(option.partition("-")[0], fields | ours, model), model)
    assert nb(theirs, config) == (found.trained, found.model + found.added)


@pytest.mark.peft
def test_hf_peft_counts_a_head_that_is_trained_whole_twice() -> None:
    import peft
    import transformers

    source = tiny("bert", "ForSequenceClassification").source
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**source))
    model = outlines.of_config(source)
    found = count(outline("lora", {"r": 2, "modules_to_save": ["classifier"]}, model), model)
    assert nb(theirs, peft.LoraConfig(task_type="SEQ_CLS", r=2)) == (found.trained, found.model + found.added)
