"""Adapters of T5 and BART against HF peft, in float64; T5's norms without their rounding to float32."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import Model
from refpeft.checkpoint.safetensors import Malformed, read
from refpeft.hooks import Hooks, Memory
from tests.models import ENCODER_DECODERS, tiny
from tests.refpeft.test_encoder_decoder_transformers import exact_norms, in_transformers  # noqa: F401

Array = np.ndarray[Any, Any]
NAMES = ["T5", "T5 v1.1", "BART", "BART, scaled"]
IDS = np.array([[5, 9, 3, 7, 2, 8], [6, 4, 7, 11, 3, 2]])
INPUTS = {
    "attention_mask": np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    "decoder_input_ids": np.array([[0, 12, 5, 21, 7], [0, 8, 9, 3, 20]]),
    "decoder_attention_mask": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
}
LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # class of HF peft, fields
    "lora": ("LoraConfig", LORA),
    "lora on all": ("LoraConfig", {**LORA, "target_modules": "all-linear", "bias": "all"}),
    "lora on a table": ("LoraConfig", {**LORA, "target_modules": ["relative_attention_bias", "wo", "fc2"]}),
    "lora and a head": ("LoraConfig", {**LORA, "target_modules": ["k", "k_proj"], "modules_to_save": ["lm_head"]}),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "ln_tuning": ("LNTuningConfig", {}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
}  # fmt: skip
pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("exact_norms")]


def made(name: str, **more: Any) -> Model:
    family, architecture, config = ENCODER_DECODERS[name]
    return tiny(family, architecture, **config, **more)


def tensors(given: dict[str, Array]) -> Any:
    import torch

    return {name: torch.tensor(a) for name, a in given.items()}


def hf_peft(model: Model, folder: Path, kind: str) -> Any:
    """The same model in HF peft, with an adapter whose parameters have all been moved."""
    import peft
    import torch

    cls, fields = CONFIGS[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers that are targeted
        config = getattr(peft, cls)(task_type="SEQ_2_SEQ_LM", **fields)
        m = peft.get_peft_model(in_transformers(model, folder), config).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.1 * torch.randn_like(p) if p.requires_grad else 0
    return m


def pair(model: Model, kind: str, tmp_path: Path) -> tuple[Any, refpeft.Adapter]:
    """HF peft's model, and ours read from what it saved."""
    m = hf_peft(model, tmp_path / "base", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of base models that have no card
        m.save_pretrained(tmp_path / "theirs")
    return m, refpeft.load_adapter(tmp_path / "theirs", model)


def gradients(m: Any) -> dict[str, Array]:
    """In the place of the parameters that a file would hold."""
    import peft

    for p in m.parameters():
        p.data = p.data * 0 if p.grad is None else p.grad
    return {n: p.numpy() for n, p in peft.get_peft_model_state_dict(m).items()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_hf_peft(name: str, kind: str, tmp_path: Path) -> None:
    import torch

    model = made(name)
    m, adapter = pair(model, kind, tmp_path)
    expected = m(input_ids=torch.tensor(IDS), **tensors(INPUTS))[0]
    out, vjp = model(IDS, adapter, **INPUTS)
    size = np.abs(out).max()
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=0, atol=1e-10 * size)
    dout = np.random.default_rng(2).normal(size=out.shape)
    expected.backward(torch.tensor(dout))
    if kind == "p_tuning":
        return  # HF peft trains the encoder that makes the prompt; its file holds the prompt
    theirs = gradients(m)
    ours = refpeft.checkpoint.adapters.contents(adapter.replace(params=vjp(dout)))[1]
    assert ours.keys() <= theirs.keys()
    largest = max(np.linalg.norm(d) for d in theirs.values())
    assert largest > 0
    for n, d in ours.items():
        assert np.linalg.norm(d - theirs[n]) <= 1e-10 * max(np.linalg.norm(theirs[n]), largest / 100), n


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["T5 v1.1", "BART"])
def test_files_go_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    """The same tensors, bit for bit; and HF peft reads ours as what it was."""
    import peft

    model = made(name)
    m, adapter = pair(model, kind, tmp_path)
    refpeft.save_adapter(adapter, tmp_path / "ours")
    theirs, ours = (read(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    for n, a in theirs.items():
        assert ours[n].tobytes() == a.tobytes(), n
    assert ours.keys() == theirs.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = in_transformers(model, tmp_path / "base")
        back = peft.PeftModel.from_pretrained(base, tmp_path / "ours", autocast_adapter_dtype=False)
    want, got = (peft.get_peft_model_state_dict(x) for x in (m, back))
    assert want.keys() == got.keys()
    for n in want:  # prompts become float32 there
        np.testing.assert_array_equal(want[n].detach().to(got[n].dtype), got[n].detach())


@pytest.mark.parametrize("kind", ["lora on all", "lora on a table", "dora", "ln_tuning"])
@pytest.mark.parametrize("name", NAMES)
def test_merged_models_are_read_by_transformers(name: str, kind: str, tmp_path: Path) -> None:
    import torch

    model = made(name)
    _, adapter = pair(model, kind, tmp_path)
    theirs = in_transformers(refpeft.merge(model, adapter), tmp_path / "merged")
    expected = theirs(input_ids=torch.tensor(IDS), **tensors(INPUTS))[0].detach().numpy()
    np.testing.assert_allclose(model(IDS, adapter, **INPUTS)[0], expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_token_rows_are_trained_wherever_the_table_is_used(tmp_path: Path) -> None:
    """W1: HF peft saves them under all names of the table, four times."""
    import peft
    import torch

    for name in ("T5", "BART", "BART, scaled"):
        folder, model = tmp_path / name, made(name)
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            m = peft.get_peft_model(
                in_transformers(model, folder / "m"), peft.TrainableTokensConfig(token_indices=[3, 9])
            ).double()
            with torch.no_grad():
                for p in m.parameters():
                    p += 0.1 * torch.randn_like(p) if p.requires_grad else 0
            m.save_pretrained(folder / "a")
        assert len(read(folder / "a/adapter_model.safetensors")) == 4
        adapter = refpeft.load_adapter(folder / "a", model)
        expected = m.eval()(input_ids=torch.tensor(IDS), **tensors(INPUTS))[0].detach().numpy()
        out, _ = model(IDS, adapter, **INPUTS)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10 * np.abs(out).max())


def test_hf_peft_gives_an_untied_t5_head_the_rows_of_its_embeddings(tmp_path: Path) -> None:
    """T5 v1.1's head is its own, which transformers 5 denies in its config, and HF peft believes it: with nothing
    trained, outputs change. Such an adapter is not one of this model, and is refused."""
    import peft
    import torch

    model = made("T5 v1.1")
    base = in_transformers(model, tmp_path / "m")
    before = base(input_ids=torch.tensor(IDS), **tensors(INPUTS))[0].detach().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=[3, 9])).eval()
        m.save_pretrained(tmp_path / "a")
    after = m(input_ids=torch.tensor(IDS), **tensors(INPUTS))[0].detach().numpy()
    changed = np.abs(after - before).max((0, 1))
    assert (np.flatnonzero(changed > 1e-6) == [3, 9]).all()
    fresh = refpeft.init("trainable_tokens", {"token_indices": [3, 9]}, model)
    np.testing.assert_array_equal(model(IDS, fresh, **INPUTS)[0], model(IDS, **INPUTS)[0])
    with pytest.raises(Malformed, match=r"'base_model.model.lm_head.trainable_tokens_delta' is not one that this"):
        refpeft.load_adapter(tmp_path / "a", model)


def test_hf_peft_does_not_train_the_head_of_a_bart_classifier_of_its_own_accord(tmp_path: Path) -> None:
    """It looks for 'classifier' and 'score' where the task is to classify, and BART's is 'classification_head'."""
    import peft
    import torch

    model = tiny("bart", "ForSequenceClassification")
    for saved in (None, ["classification_head"]):
        folder = tmp_path / str(saved)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=saved, **LORA)
            m = peft.get_peft_model(in_transformers(model, tmp_path / "m"), config).double().eval()
            m.save_pretrained(folder)
        adapter = refpeft.load_adapter(folder, model)
        assert [n for n in adapter.params if "classification_head" in n] == [
            n for n in model.params if "classification_head" in n and saved
        ]
        expected = m(input_ids=torch.tensor(IDS))[0].detach().numpy()
        np.testing.assert_allclose(model(IDS, adapter)[0], expected, rtol=0, atol=1e-10 * np.abs(expected).max())


# ── prefix tuning, which HF peft does otherwise ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "layers"), [("T5", 1), ("T5", 2), ("T5", 3), ("BART", 1), ("BART", 2)])
def test_what_hf_peft_makes_of_the_prefix_of_an_encoder_decoder(name: str, layers: int, tmp_path: Path) -> None:
    """The decoder's own attention alone gets one: in layer l, blocks 4 l and 4 l + 1 of P, modulo 2 L. Put there, it is
    what we compute: keys that are not rotated, at the places before the tokens."""
    import peft
    import torch

    depth = {"num_layers": layers, "num_decoder_layers": layers}
    model = made(name, **depth) if name == "T5" else made(name, encoder_layers=layers, decoder_layers=layers)
    n, c = 3, model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=n, token_dim=4 * c.head_dim)
        m = peft.get_peft_model(in_transformers(model, tmp_path / "m"), config).double().eval()
    given = {k: v for k, v in INPUTS.items() if k != "decoder_attention_mask"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers calls its caches otherwise by now
        expected = m(input_ids=torch.tensor(IDS), **tensors(given))[0].detach().numpy()
    P = m.prompt_encoder["default"].embedding.weight.detach().numpy().reshape(n, 2 * layers, 4, c.head_dim)

    def memory(at: str) -> list[Memory]:
        if not at.startswith("decoder.") or not at.endswith("attn."):
            return []
        k = 4 * int(at.split(".")[2]) % (2 * layers)
        return [Memory(P[None, :, k], P[None, :, (k + 1) % (2 * layers)], lambda dk, dv, want: {}, placed=True)]

    if name == "BART":  # whose decoder alone has its tokens moved, there
        table = "model.encoder.embed_positions.weight"
        model = Model(c, model.sites, {**model.params, table: np.roll(model.params[table], n, axis=0)})
    out, _, _ = model.run(Hooks(memory=memory, shift=n), IDS, **given)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10 * np.abs(out).max())
    shutil.rmtree(tmp_path / "m")


def test_hf_pefts_prefixes_of_encoder_decoders_are_neither_read_nor_written(tmp_path: Path) -> None:
    import peft

    model = made("T5")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
        peft.get_peft_model(in_transformers(model, tmp_path / "m"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(Malformed, match="num_transformer_submodules must be 1"):
        refpeft.load_adapter(tmp_path / "a", model)
    with pytest.raises(ValueError, match="HF peft no prefixes of an encoder-decoder"):
        refpeft.save_adapter(refpeft.init("prefix_tuning", {}, model), tmp_path / "b")
    assert not (tmp_path / "b").exists()
