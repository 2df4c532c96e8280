"""Bottleneck adapters against AdapterHub's `adapters` 1.3.0: outputs, all gradients, and folders both ways.

These need an environment of their own, since `adapters` pins transformers 4.57: `pip install torch==2.13.0
adapters==1.3.0 pytest hypothesis scipy ml-dtypes onnx typer rich jinja2 packaging`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint.safetensors import read
from tests.models import tiny
from tests.refpeft.hub import TOLERANCE, hub_add, hub_load, hub_model, hub_run, moved, read_json, same, theirs_of

pytestmark = [pytest.mark.adapterhub, pytest.mark.filterwarnings("ignore")]

IDS = np.random.default_rng(0).integers(2, 29, (3, 6))
MODELS = [("bert", "Model"), ("roberta", "ForMaskedLM"), ("gpt2", "LMHeadModel"), ("llama", "ForCausalLM"),
          ("qwen2", "ForCausalLM"), ("bert", "ForSequenceClassification")]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"use_gating": True},
    "learned": {"scaling": "learned", "non_linearity": "gelu"},
    "channel": {"scaling": "channel", "non_linearity": "leakyrelu"},
    "scaled": {"scaling": 2.5, "non_linearity": "tanh"},
    "norms": {"ln_before": True, "ln_after": True, "use_gating": True},
    "norm after the residual": {"ln_after": True, "adapter_residual_before_ln": True},
    "late residual": {"original_ln_before": True, "residual_before_ln": False},
    "early": {"original_ln_before": True, "residual_before_ln": True},
    "post_add": {"original_ln_before": True, "residual_before_ln": "post_add"},
    "not after": {"original_ln_before": True, "residual_before_ln": False, "original_ln_after": False},
    "dropped": {"leave_out": [0], "reduction_factor": {"1": 2.0, "default": 5}, "non_linearity": "swish"},
}
METHODS = ("houlsby", "pfeiffer", "parallel")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "architecture"), MODELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients(family: str, architecture: str, method: str, options: str, tmp_path: Path) -> None:
    """In AdapterHub, from the folder that we write: of every parameter of the adapter and of the model."""
    config = {"reduction_factor": 4, "train_norms": False, **OPTIONS[options]}
    model = tiny(family, architecture)
    adapter = moved(refpeft.init(method, config, model))
    post_add = options == "post_add" and method != "parallel"
    unhooked = family == "qwen2" and options == "not after"
    refpeft.save_adapter(adapter, tmp_path / "a")
    theirs = hub_model(model)
    if unhooked:
        with pytest.raises(ValueError, match="Unsupported configuration for bottleneck layer hooking"):
            hub_load(theirs, tmp_path / "a")
        return
    name = hub_load(theirs, tmp_path / "a")
    out, vjp = model(IDS, adapter)
    dout = np.random.default_rng(2).normal(size=out.shape)
    if post_add and model.config.norm_first:  # its residual is never set there
        with pytest.raises(UnboundLocalError, match="residual"):
            hub_run(theirs, IDS, name, dout)
        return
    want, grads = hub_run(theirs, IDS, name, dout)
    tolerance = TOLERANCE[family]
    same(out, want, tolerance)
    own, base = vjp(dout, base=True)
    found = {theirs_of(n, adapter.config.ln_before): g for n, g in own.items()}
    # the padding's row of an embedding gets no gradient there
    found |= {n: g for n, g in base.items() if n in grads and not n.endswith("word_embeddings.weight")}
    largest = max(np.linalg.norm(grads[n]) for n in found)
    for n, g in found.items():  # some are 0 but for rounding, hence a scale for them too
        scale = max(np.linalg.norm(grads[n]), largest / 100)
        assert np.linalg.norm(g - grads[n]) <= 10 * tolerance * scale, n
    plain, _ = model(IDS)
    assert np.abs(out - plain).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("options", ["plain", "gated", "dropped", "late residual"])
def test_encoder_decoders(family: str, method: str, options: str, tmp_path: Path) -> None:
    """Adapters in both stacks and between them; layers are numbered on from the encoder's to the decoder's."""
    import torch

    model = tiny(family, "ForConditionalGeneration")
    config = {"reduction_factor": 4, "train_norms": False, "cross_adapter": True, **OPTIONS[options]}
    adapter = moved(refpeft.init(method, config, model))
    refpeft.save_adapter(adapter, tmp_path / "a")
    theirs = hub_model(model)
    name = hub_load(theirs, tmp_path / "a")
    told = np.random.default_rng(3).integers(2, 29, (3, 4))
    out, vjp = model(IDS, adapter, decoder_input_ids=told)
    dout = np.random.default_rng(2).normal(size=out.shape)
    for p in theirs.parameters():
        p.requires_grad_(True)
    want = theirs(input_ids=torch.tensor(IDS), decoder_input_ids=torch.tensor(told))[0]
    want.backward(torch.tensor(dout))
    same(out, want.detach().numpy(), TOLERANCE[family])
    there = {n.replace(f".adapters.{name}.", ".adapters."): p.grad for n, p in theirs.named_parameters()}
    grads = {n: (g, there[theirs_of(n, False)].numpy()) for n, g in vjp(dout).items()}
    largest = max(np.linalg.norm(g) for _, g in grads.values())
    for n, (ours, g) in grads.items():
        scale = max(np.linalg.norm(g), largest / 100)
        assert np.linalg.norm(ours - g) <= 10 * TOLERANCE[family] * scale, n


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "architecture"), MODELS)
def test_their_folders(family: str, architecture: str, method: str, tmp_path: Path) -> None:
    """Written by AdapterHub, read here, written here, read there: the same tensors and the same config, to the bit."""
    import adapters
    import torch

    model = tiny(family, architecture, dtype=np.float32)
    theirs = hub_model(model, "float32")
    kind = {"houlsby": "DoubleSeqBnConfig", "pfeiffer": "SeqBnConfig", "parallel": "ParBnConfig"}[method]
    torch.manual_seed(0)
    hub_add(theirs, "mine", getattr(adapters, kind)(reduction_factor=4, scaling="learned", use_gating=True))
    for n, p in theirs.named_parameters():
        if ".adapters." in n:
            p.data += 0.3 * torch.randn_like(p)
    # a masked LM's head has two names for its bias, which AdapterHub cannot write as safetensors
    theirs.save_adapter(str(tmp_path / "theirs"), "mine", use_safetensors=True, with_head=architecture != "ForMaskedLM")
    adapter = refpeft.load_adapter(tmp_path / "theirs", model)
    assert adapter.method == method
    assert adapter.config.modules_to_save is None
    refpeft.save_adapter(adapter, tmp_path / "ours")
    written, found = read(tmp_path / "theirs/adapter.safetensors"), read(tmp_path / "ours/adapter.safetensors")
    assert {n.replace(".mine.", ".default.") for n in written} == set(found)
    for n, a in written.items():
        assert a.tobytes() == found[n.replace(".mine.", ".default.")].tobytes()
    config, ours = (read_json(tmp_path / folder)["config"] for folder in ("theirs", "ours"))
    assert {n: config[n] for n in ours} == ours
    name = hub_load(theirs, tmp_path / "ours", "float32")
    for n, p in theirs.named_parameters():
        if f".adapters.{name}." in n:
            assert torch.equal(p, dict(theirs.named_parameters())[n.replace(f".{name}.", ".mine.")])
    theirs.set_active_adapters("mine")
    out, _ = model(IDS, adapter)
    want = theirs(input_ids=torch.tensor(IDS))[0].detach().numpy()
    same(out, want, 2e-6)


def test_their_trained_heads_are_read(tmp_path: Path) -> None:
    """A head that was trained is in a file of its own; one that is the model's own is no part of the adapter."""
    import adapters
    import torch

    model = tiny("bert", "ForSequenceClassification", dtype=np.float32)
    theirs = hub_model(model, "float32")
    hub_add(theirs, "mine", adapters.SeqBnConfig())
    theirs.save_adapter(str(tmp_path / "same"), "mine", use_safetensors=True)
    assert refpeft.load_adapter(tmp_path / "same", model).config.modules_to_save is None
    theirs.classifier.weight.data += 1
    theirs.save_adapter(str(tmp_path / "other"), "mine", use_safetensors=True)
    adapter = refpeft.load_adapter(tmp_path / "other", model)
    assert adapter.config.modules_to_save == ["classifier"]
    out, _ = model(IDS, adapter)
    same(out, theirs(input_ids=torch.tensor(IDS))[0].detach().numpy(), 2e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_is_trained_whole_is_read_there(family: str, tmp_path: Path) -> None:
    """Norms and heads in adapter.safetensors: AdapterHub loads them into the model."""
    model = tiny(family, "ForSequenceClassification")
    head = "classifier" if family == "bert" else "score"
    adapter = moved(refpeft.init("houlsby", {"modules_to_save": [head], "reduction_factor": 4}, model))
    refpeft.save_adapter(adapter, tmp_path / "a")
    theirs = hub_model(model)
    name = hub_load(theirs, tmp_path / "a")
    out, _ = model(IDS, adapter)
    same(out, hub_run(theirs, IDS, name, np.ones_like(out))[0], 1e-12)


def test_padding_counts_in_the_gate_there_too(tmp_path: Path) -> None:
    model = tiny("bert")
    adapter = moved(refpeft.init("pfeiffer", {"use_gating": True, "reduction_factor": 4}, model))
    refpeft.save_adapter(adapter, tmp_path / "a")
    theirs = hub_model(model)
    name = hub_load(theirs, tmp_path / "a")
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
    ids = np.where(mask, IDS, 0)
    out, _ = model(ids, adapter, mask)
    same(out, hub_run(theirs, ids, name, np.ones_like(out), mask)[0], 1e-12)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_a_stack(method: str, tmp_path: Path) -> None:
    """H4: of sequential adapters."""
    import adapters.composition as ac

    model = tiny("bert")
    pair = [moved(refpeft.init(method, {"reduction_factor": 4, "train_norms": False}, model, s), s) for s in (0, 1)]
    theirs = hub_model(model)
    for k, adapter in enumerate(pair):
        refpeft.save_adapter(adapter, tmp_path / str(k))
        hub_load(theirs, tmp_path / str(k), name="ab"[k])
    theirs.set_active_adapters(ac.Stack("a", "b"))
    out, _ = model(IDS, pair)
    same(out, hub_run(theirs, IDS, "a", np.ones_like(out))[0], 1e-12)


def test_a_stack_of_parallel_adapters_is_its_last_there(tmp_path: Path) -> None:
    """Each starts again from the sublayer's input. If this is mended, the docstring of `parallel` is wrong."""
    import adapters.composition as ac

    model = tiny("bert")
    pair = [moved(refpeft.init("parallel", {"reduction_factor": 4}, model, s), s) for s in (0, 1)]
    theirs = hub_model(model)
    for k, adapter in enumerate(pair):
        refpeft.save_adapter(adapter, tmp_path / str(k))
        hub_load(theirs, tmp_path / str(k), name="ab"[k])
    theirs.set_active_adapters(ac.Stack("a", "b"))
    out, _ = model(IDS, pair[1])
    same(out, hub_run(theirs, IDS, "b", np.ones_like(out))[0], 1e-12)


def test_a_norm_before_cannot_be_saved_there_as_safetensors(tmp_path: Path) -> None:
    """It has two names for one tensor. If this is mended, the docstring of `refpeft.checkpoint.bottleneck` is wrong."""
    import adapters

    theirs = hub_model(tiny("bert", dtype=np.float32), "float32")
    hub_add(theirs, "mine", adapters.SeqBnConfig(ln_before=True))
    with pytest.raises(RuntimeError, match="Some tensors share memory"):
        theirs.save_adapter(str(tmp_path / "a"), "mine", use_safetensors=True)


def test_a_normed_input_is_refused_there(tmp_path: Path) -> None:
    model = tiny("gpt2")
    refpeft.save_adapter(refpeft.init("parallel", {"normed_input": True}, model), tmp_path / "a")
    with pytest.raises(KeyError, match="refpeft_normed_parallel"):
        hub_load(hub_model(model), tmp_path / "a")


def test_an_integer_scale_is_refused_there() -> None:
    import adapters

    theirs = hub_model(tiny("bert"))
    with pytest.raises(ValueError, match="Unknown scaling type: 2"):
        hub_add(theirs, "mine", adapters.SeqBnConfig(scaling=2))
