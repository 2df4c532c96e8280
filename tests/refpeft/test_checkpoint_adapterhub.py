"""AdapterHub's folders of LoRA, prompts and prefixes: what is in them runs here as it runs there, or is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint.safetensors import Malformed, write
from tests.models import tiny
from tests.refpeft.hub import TOLERANCE, hub_add, hub_load, hub_model, same

IDS = np.random.default_rng(0).integers(2, 29, (2, 5))
LORA = {"architecture": "lora", "r": 2, "alpha": 6, "attn_matrices": ["q", "v"], "composition_mode": "add"}
PROMPT = {"architecture": "prompt_tuning", "prompt_length": 3, "combine": "prefix", "prompt_init": "random_uniform"}
PREFIX = {"architecture": "prefix_tuning", "prefix_length": 2, "bottleneck_size": 5, "flat": False}


def folder_of(path: Path, config: dict[str, Any], tensors: dict[str, Any], **about: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"config": config, "name": "0", **about}))
    write(path / "adapter.safetensors", tensors)
    return path


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def fused(r: int = 2, k: int = 2) -> dict[str, Any]:
    """A LoRA of k of the three matrices of each of GPT-2's two layers."""
    stems = [f"transformer.h.{n}.attn.c_attn.loras.0." for n in range(2)]
    return {s + n: a for s in stems for n, a in (("lora_A", normal(k * r, 16)), ("lora_B", normal(k * 16, r)))}


# ── without the library ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("matrices", [["q", "v"], ["k"], ["v", "k", "q"]])
def test_a_lora_of_parts_of_a_merged_layer_is_one_of_larger_rank(tmp_path: Path, matrices: list[str]) -> None:
    """ΔW = s [B_q A_q; B_k A_k; B_v A_v], zero where a matrix has none."""
    model, k, tensors = tiny("gpt2"), len(matrices), fused(k=len(matrices))
    adapter = refpeft.load_adapter(folder_of(tmp_path / "a", LORA | {"attn_matrices": matrices}, tensors), model)
    name = "transformer.h.0.attn.c_attn"
    A, B = (tensors[f"{name}.loras.0.lora_{x}"] for x in "AB")
    want = np.zeros((48, 16))
    for n, key in enumerate(m for m in "qkv" if m in matrices):
        at = 16 * "qkv".index(key)
        want[at : at + 16] = 3 * B[16 * n : 16 * n + 16] @ A[2 * n : 2 * n + 2]
    merged = refpeft.merge(model, adapter).params[name + ".weight"]
    np.testing.assert_allclose(merged - model.params[name + ".weight"], want.T, rtol=0, atol=1e-14)
    assert adapter.at(name).r == 2 * k
    assert (adapter.at("h.0.mlp.c_fc").r, adapter.at(name).scale) == (2, 3.0)


def test_a_lora_may_leave_layers_out_and_adapt_the_mlp(tmp_path: Path) -> None:
    """In LLaMA, AdapterHub's intermediate layer is down_proj."""
    stem = "model.layers.1.mlp.down_proj.loras.0."
    tensors = {stem + "lora_A": normal(2, 24), stem + "lora_B": normal(16, 2)}
    config = LORA | {"selfattn_lora": False, "intermediate_lora": True, "leave_out": [0]}
    adapter = refpeft.load_adapter(folder_of(tmp_path / "a", config, tensors), tiny("llama"))
    assert sorted(adapter.params) == [f"model.layers.1.mlp.down_proj.lora_{x}.weight" for x in "AB"]


def test_a_prefix_is_the_same_under_all_its_names(tmp_path: Path) -> None:
    names = ["bert.prefix_tuning.", "bert.encoder.layer.1.attention.self.prefix_tuning.pool."]
    flat = PREFIX | {"flat": True}
    tensors = {n + "prefix_tunings.0.self_prefix.control_trans": normal(2 * 2 * 2 * 16) for n in names}
    adapter = refpeft.load_adapter(folder_of(tmp_path / "a", flat, tensors), tiny("bert"))
    np.testing.assert_array_equal(adapter.params["prompt_embeddings"].ravel(), tensors[min(tensors)])
    assert not adapter.config.position_shift
    tensors[min(tensors)] = tensors[min(tensors)] + 1
    with pytest.raises(Malformed, match="must be equal to"):
        refpeft.load_adapter(folder_of(tmp_path / "b", flat, tensors), tiny("bert"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 0}, "config.r must be a positive integer, found 0"),
        ({"r": True}, "config.r must be a positive integer, found"),
        ({"alpha": {}}, "config.alpha must be a number, found"),
        ({"dropout": "x"}, "lora_dropout must be"),
        ({"init_weights": "bert", "architecture": []}, "config.architecture must be null or one of"),
        ({"attn_matrices": ["o"]}, "config.attn_matrices must name q, k or v"),
        ({"composition_mode": "scale"}, "config.composition_mode must be 'add', found 'scale'"),
        ({"use_dora": True}, "'use_dora' is set to"),
        ({"use_gating": True}, "'use_gating' is set to"),
        ({"vera_d": 0.1}, "'vera_d' is set to"),
        ({"leave_out": [0, 1]}, "there is no layer with a LoRA"),
        ({"leave_out": "0"}, "config.leave_out must be a list"),
        ({"output_lora": True}, "is missing"),
        ({"attn_matrices": ["q"]}, "expected shape"),
        ({"leave_out": [1]}, "is not one that this adapter has"),
        (PROMPT, "is missing"),
        (PROMPT | {"combine": "prefix_after_bos"}, "config.combine must be 'prefix'"),
        (PREFIX | {"non_linearity": "relu"}, "config.non_linearity must be 'tanh'"),
        (PREFIX | {"bottleneck_size": None}, "config.bottleneck_size must be a positive integer"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    config = (LORA | change) if "architecture" not in change else change
    with pytest.raises(ValueError, match=says):
        refpeft.load_adapter(folder_of(tmp_path / "a", config, fused()), tiny("gpt2"))


def test_a_pickle_and_a_nameless_adapter_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", LORA, fused(), name=None)
    with pytest.raises(Malformed, match="name must be the name of the adapter"):
        refpeft.load_adapter(folder, tiny("gpt2"))
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(Malformed, match="only safetensors files are read"):
        refpeft.load_adapter(folder, tiny("gpt2"))


def test_read_from_adapterhub_a_lora_is_saved_as_hf_pefts(tmp_path: Path) -> None:
    model = tiny("gpt2")
    adapter = refpeft.load_adapter(folder_of(tmp_path / "a", LORA, fused()), model)
    refpeft.save_adapter(adapter, tmp_path / "b")
    again = refpeft.load_adapter(tmp_path / "b", model)
    np.testing.assert_array_equal(model(IDS, again)[0], model(IDS, adapter)[0])


KEPT = [
    ("t5", "ForConditionalGeneration", {}), ("t5", "Model", {"prefix_projection": True}),
    ("bart", "ForConditionalGeneration", {"leave_out": [2]}), ("bart", "Model", {"prefix_projection": True}),
    ("gpt2", "LMHeadModel", {"leave_out": [1]}), ("bert", "ForSequenceClassification", {}),
]  # fmt: skip


def kept(family: str, architecture: str, options: dict[str, Any]) -> tuple[Any, refpeft.Adapter]:
    """A model and an adapter that HF peft has no format for."""
    model = tiny(family, architecture)
    method = "p_tuning_v2" if architecture.endswith("Classification") else "prefix_tuning"
    fields = {"num_virtual_tokens": 3, "position_shift": False, **options}
    return model, refpeft.init(method, fields, model, seed=1)


@pytest.mark.parametrize(("family", "architecture", "options"), KEPT)
def test_prefixes_that_hf_peft_has_no_format_for_are_saved_as_adapterhubs(
    family: str, architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Without MLP; each stack of an encoder-decoder under its name, every tensor once."""
    model, adapter = kept(family, architecture, options)
    refpeft.save_adapter(adapter, tmp_path / "a")
    back = refpeft.load_adapter(tmp_path / "a", model)
    flat = refpeft.drop_encoder(adapter)
    assert back.method == adapter.method
    assert list(back.config.leave_out) == list(flat.config.leave_out)
    assert {n: a.tobytes() for n, a in back.params.items()} == {n: a.tobytes() for n, a in flat.params.items()}
    stacks = {"self_prefix", "encoder_prefix", "cross_prefix"} if model.config.encoder_decoder else {"self_prefix"}
    prefixes = [n.split(".")[3] for n in refpeft.checkpoint.safetensors.read(tmp_path / "a" / "adapter.safetensors")
                if n.startswith("prefix_tuning.")]  # fmt: skip
    assert sorted(prefixes) == sorted(stacks)


def test_layers_of_a_decoder_are_numbered_on_from_the_encoders() -> None:
    """Of 2 and 3 layers: the encoder's last is 1, the decoder's first 2."""
    model = tiny("bart", "Model")
    fields = {"num_virtual_tokens": 1, "prefix_projection": False}
    sizes = {}
    for out in ([], [1], [2]):
        params = refpeft.init("prefix_tuning", fields | {"leave_out": out}, model).params
        sizes[str(out)] = [params[n].shape[1] // 32 for n in ("encoder.prompt_embeddings", "prompt_embeddings")]
    assert sizes == {"[]": [2, 3], "[1]": [1, 3], "[2]": [2, 2]}


def test_a_prefix_of_the_decoder_alone_is_refused(tmp_path: Path) -> None:
    model, adapter = kept(*KEPT[0])
    refpeft.save_adapter(adapter, tmp_path / "a")
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    raw["config"]["encoder_prefix"] = False
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(Malformed, match=r"config\.encoder_prefix must be true, found False"):
        refpeft.load_adapter(tmp_path / "a", model)


# ── with it ──────────────────────────────────────────────────────────────────────────────────────────────────────────

EVERY = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
SAVED = [
    ("bert", "Model", LORA | EVERY | {"leave_out": [0]}), ("roberta", "ForMaskedLM", LORA | {"output_lora": True}),
    ("gpt2", "LMHeadModel", LORA), ("gpt2", "Model", LORA | EVERY | {"attn_matrices": ["k"]}),
    ("llama", "ForCausalLM", LORA | EVERY), ("qwen2", "ForCausalLM", LORA | EVERY), ("bert", "Model", PROMPT),
    ("roberta", "ForSequenceClassification", PROMPT), ("bert", "ForSequenceClassification", LORA),
    ("bert", "Model", PREFIX), ("bert", "Model", PREFIX | {"flat": True, "leave_out": [1]}),
    ("bart", "Model", LORA | EVERY | {"leave_out": [1, 3]}), ("t5", "ForConditionalGeneration", LORA | EVERY),
    ("bart", "ForConditionalGeneration", PREFIX), ("bart", "Model", PREFIX | {"flat": True, "leave_out": [1, 2]}),
]  # fmt: skip


@pytest.mark.adapterhub
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "architecture", "config"), SAVED)
def test_what_adapterhub_saved_runs_here(
    family: str, architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """With its head, where that was trained."""
    import torch

    model = tiny(family, architecture)
    theirs = hub_model(model, attention="eager")
    hub_add(theirs, "self", config)  # a name that is also that of a module
    theirs.double()
    generator = torch.Generator().manual_seed(0)
    own = ("loras.", "prompt_tunings.", "prefix_tunings.", "classifier.")
    for name, p in theirs.named_parameters():
        if any(part in name for part in own):
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    safetensors = config["architecture"] != "prefix_tuning"
    head = architecture.endswith("Classification")
    theirs.save_adapter(str(tmp_path / "a"), "self", use_safetensors=safetensors, with_head=head)
    if not safetensors:
        tensors = torch.load(tmp_path / "a" / "pytorch_adapter.bin", weights_only=True)
        write(tmp_path / "a" / "adapter.safetensors", {name: p.numpy() for name, p in tensors.items()})
    inputs = {"decoder_input_ids": IDS[:, :4]} if model.config.encoder_decoder else {}
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(IDS), **{n: torch.tensor(a) for n, a in inputs.items()})[0].numpy()
    adapter = refpeft.load_adapter(tmp_path / "a", model)
    same(model(IDS, adapter, **inputs)[0], out, TOLERANCE[family])
    assert (adapter.config.modules_to_save is not None) == head


@pytest.mark.adapterhub
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "architecture", "options"), KEPT)
def test_adapterhub_reads_the_prefixes_that_are_written(
    family: str, architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """All of it. In T5, AdapterHub then moves the tokens' relative positions: docs/findings/adapters-t5-prefix.md."""
    import torch

    model, adapter = kept(family, architecture, options)
    refpeft.save_adapter(adapter, tmp_path / "a")
    theirs = hub_model(model, attention="eager")  # docs/findings/adapters-prefix-attention-mask.md
    hub_load(theirs, tmp_path / "a")
    there = [p.detach().numpy() for n, p in theirs.named_parameters() if "prefix_tunings" in n]
    ours = [p.ravel() for n, p in refpeft.drop_encoder(adapter).params.items() if n.endswith("prompt_embeddings")]
    assert sorted(a.tobytes() for a in there) == sorted(a.tobytes() for a in ours)
    if family != "t5":
        inputs = {"decoder_input_ids": IDS[:, :4]} if model.config.encoder_decoder else {}
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor(IDS), **{n: torch.tensor(a) for n, a in inputs.items()})[0].numpy()
        same(model(IDS, adapter, **inputs)[0], out, TOLERANCE[family])
