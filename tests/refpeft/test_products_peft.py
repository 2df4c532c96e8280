"""LoHa, LoKr, OFT and BOFT beside HF peft: the same files, outputs and gradients."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint.safetensors import Malformed, read, write
from refpeft.methods import boft
from tests.refpeft.test_checkpoint_peft import IDS, hf_model, hf_out

pytestmark = pytest.mark.peft
LLAMA, BERT = "LlamaForCausalLM, tied", "BertForSequenceClassification"
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loha": ("loha", "LoHaConfig", {"r": 2, "alpha": 5, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"0.*": 7}}),
    "lokr": ("lokr", "LoKrConfig", {"r": 1, "alpha": 5}),
    "lokr-full": ("lokr", "LoKrConfig", {"r": 16, "alpha": 5}),
    "lokr-both": ("lokr", "LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr-factor": ("lokr", "LoKrConfig", {"r": 2, "decompose_factor": 8}),
    "oft": ("oft", "OFTConfig", {"oft_block_size": 4}),
    "oft-blocks": ("oft", "OFTConfig", {"oft_block_size": 0, "r": 3}),
    "oft-terms": ("oft", "OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    "oft-three-terms": ("oft", "OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft-exact": ("oft", "OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft-shared": ("oft", "OFTConfig", {"oft_block_size": 4, "block_share": True, "bias": "oft_only"}),
    "oft-embedding": ("oft", "OFTConfig", {"oft_block_size": 4, "target_modules": ["embed_tokens", "q_proj"]}),
}
OPTIONS |= {
    "boft": ("boft", "BOFTConfig", {"bias": "boft_only"}),
    "boft-blocks": ("boft", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 2}),
}
always = pytest.mark.parametrize("option", OPTIONS)


def theirs(option: str, name: str = LLAMA, **more: Any) -> Any:
    """HF peft's model in float64 with an adapter whose parameters were moved."""
    import peft
    import torch

    _, config, fields = OPTIONS[option]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = peft.get_peft_model(hf_model(name, "float64"), getattr(peft, config)(**{**LINEAR, **fields, **more})).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in m.parameters():
            p += 0.2 * torch.randn_like(p) * p.requires_grad
    return m


def base(m: Any, folder: Path) -> refpeft.Model:
    """Of the model underneath, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_model(m, "float64").save_pretrained(folder)
    return refpeft.load(folder, dtype="float64")


def near(got: Any, want: Any, tolerance: float) -> bool:
    return bool(np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max())


@always
def test_what_peft_saves_is_read(option: str, tmp_path: Path) -> None:
    """Outputs in float64 (LLaMA's norms are float32 there: 1e-6), and every gradient by its name in the file."""
    import torch

    m = theirs(option)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.save_pretrained(tmp_path / "adapter")
    model = base(LLAMA, tmp_path / "base")
    adapter = refpeft.load_adapter(tmp_path / "adapter", model)
    assert adapter.method == OPTIONS[option][0]
    out, vjp = model(IDS, adapter)
    assert near(out, hf_out(m), 1e-6)
    dout = np.random.default_rng(0).normal(size=out.shape)
    m(torch.tensor(IDS)).logits.backward(torch.tensor(dout))
    named = {
        n.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", ""): p.grad
        for n, p in m.named_parameters()
        if p.requires_grad
    }
    sign = -1 if option == "oft-exact" else 1
    grads = vjp(dout)
    assert set(grads) == set(named)
    for name, d in grads.items():
        assert near(sign * d, named[name].numpy(), 1e-5)


@always
def test_what_we_save_peft_reads(option: str, tmp_path: Path) -> None:
    import peft

    model = base(BERT, tmp_path / "base")
    method, _, fields = OPTIONS[option]
    fields = {**fields, "num_cayley_neumann_terms": 4} if option == "oft-three-terms" else fields
    targets = ["word_embeddings", "key"] if option == "oft-embedding" else ["query", "intermediate.dense"]
    adapter = refpeft.init(method, {**fields, "target_modules": targets, "modules_to_save": ["classifier"]}, model)
    rng = np.random.default_rng(3)
    adapter = adapter.replace(params={n: v + 0.2 * rng.normal(size=v.shape) for n, v in adapter.params.items()})
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        m = peft.PeftModel.from_pretrained(hf_model(BERT, "float64"), str(tmp_path / "adapter")).eval()
    assert [w for w in said if "keyword" in str(w.message) or "missing" in str(w.message)] == []
    assert near(model(IDS, adapter)[0], hf_out(m), 1e-10)
    again = refpeft.load_adapter(tmp_path / "adapter", model)
    assert again.params.keys() == adapter.params.keys()
    assert all(np.array_equal(again.params[n], v) for n, v in adapter.params.items())
    np.testing.assert_array_equal(model(IDS, again)[0], model(IDS, adapter)[0])


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_the_places_of_butterflies_are_those_of_peft(factors: int) -> None:
    """B_k = P_k diag(R_k) P_kᵀ with its own permutations, which need no CUDA, as the product of them does."""
    import torch
    from peft.tuners.boft.layer import BOFTLayer
    from scipy.linalg import block_diag

    p, n, own = 4, 4, BOFTLayer.__new__(BOFTLayer)
    A = np.random.default_rng(0).normal(size=(factors, n, p, p))
    R = own.cayley_batch(torch.tensor(A).reshape(-1, p, p)).reshape(factors, n, p, p).numpy()
    M = np.eye(p * n)
    for k in range(factors):
        P = own.perm2mat(own.block_butterfly_perm(p * n, n // 2**k, p // 2, factors - 1)).numpy()
        M = P @ block_diag(*R[k]) @ P.T @ M
    x = np.random.default_rng(1).normal(size=(3, p * n))
    ours, _ = boft.butterfly(x, boft.rotation({"A": A})[0], range(factors)[::-1])
    assert near(ours, x @ M, 1e-14)


def test_an_unscaled_lokr_is_saved_so_that_peft_means_the_same(tmp_path: Path) -> None:
    import peft

    model = base(BERT, tmp_path / "base")
    config = {"r": 3, "alpha": 5, "scale_full": False, "target_modules": ["query", "word_embeddings"]}
    config = {**config, "target_modules": ["query", "intermediate.dense"], "alpha_pattern": {"query": 2.0}}
    adapter = refpeft.init("lokr", config, model)
    rng = np.random.default_rng(3)
    adapter = adapter.replace(params={n: v + 0.2 * rng.normal(size=v.shape) for n, v in adapter.params.items()})
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = peft.PeftModel.from_pretrained(hf_model(BERT, "float64"), str(tmp_path / "adapter")).eval()
    assert near(model(IDS, adapter)[0], hf_out(m), 1e-10)
    assert near(model(IDS, refpeft.load_adapter(tmp_path / "adapter", model))[0], hf_out(m), 1e-10)


def test_what_peft_has_no_name_for_is_kept(tmp_path: Path) -> None:
    """Outputs that are turned: HF peft does so on embeddings only."""
    model = base(BERT, tmp_path / "base")
    adapter = refpeft.init("oft", {"side": "output", "target_modules": ["query"], "init_weights": False}, model)
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    again = refpeft.load_adapter(tmp_path / "adapter", model)
    assert again.config.side == "output"
    np.testing.assert_array_equal(model(IDS, again)[0], model(IDS, adapter)[0])


@pytest.mark.parametrize(
    ("option", "change", "message"),
    [
        ("oft", {"coft": True}, "'coft' is set to True, which is not supported"),
        ("oft", {"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms must be at least 4, found 2"),
        ("loha", {"r": "x"}, "adapter_config.json: r must be int, found 'x'"),
        ("loha", {"r": 4}, r"adapter_model.safetensors: .*hada_w1_a.* shape"),
        ("lokr", {"r": 16}, r"adapter_model.safetensors: .*lokr_w2' is missing"),
        ("lokr", {"use_magic": True}, "'use_magic' is set to True, which is not supported"),
    ],
)
def test_folders_that_are_refused(option: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = theirs(option) if option == "oft" else theirs(option, rank_pattern={})
        m.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Malformed, match=message):
        refpeft.load_adapter(tmp_path / "adapter", base(LLAMA, tmp_path / "base"))


def test_a_tensor_too_many(tmp_path: Path) -> None:
    model = base(LLAMA, tmp_path / "base")
    refpeft.save_adapter(refpeft.init("loha", {"target_modules": ["q_proj"]}, model), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = {name: a.copy() for name, a in read(file).items()}
    write(file, {**tensors, "base_model.model.model.layers.0.self_attn.v_proj.hada_w1_a": np.zeros((2, 2))})
    with pytest.raises(Malformed, match=r"v_proj.hada_w1_a' is not one that this adapter has"):
        refpeft.load_adapter(tmp_path / "adapter", model)
