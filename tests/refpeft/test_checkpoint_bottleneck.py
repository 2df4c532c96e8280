"""Folders of bottleneck adapters, in AdapterHub's format: there and back, what is refused, and what is written how."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint.safetensors import Malformed, read, write
from tests.models import tiny

IDS = np.random.default_rng(0).integers(2, 29, (2, 5))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"ln_before": True, "ln_after": True, "scaling": "channel", "use_gating": True},
    {"leave_out": [1], "reduction_factor": {"0": 2.5, "default": 16}, "non_linearity": "leaky_relu", "scaling": 3},
    {"train_norms": True, "dropout": 0.1, "original_ln_before": True, "residual_before_ln": "post_add"},
    {"train_norms": False, "normed_input": True, "mh_adapter": True},
]
FOUND = [("bert", "ForSequenceClassification", ["classifier"]), ("gpt2", "LMHeadModel", None),
         ("llama", "ForSequenceClassification", ["score"]), ("roberta", "ForMaskedLM", None)]  # fmt: skip


def made(method: str, model: refpeft.Model, **config: Any) -> refpeft.Adapter:
    adapter = refpeft.init(method, {"reduction_factor": 4, **config}, model)
    r = np.random.default_rng(1)
    return adapter.replace(
        params={n: (p + 0.3 * r.normal(size=p.shape)).astype(p.dtype) for n, p in adapter.params.items()}
    )


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("family", "architecture", "head"), FOUND)
def test_there_and_back(
    tmp_path: Path, method: str, options: dict[str, Any], family: str, architecture: str, head: list[str] | None
) -> None:
    """To the bit, the config too; a method whose config is another's is read as that."""
    model = tiny(family, architecture, dtype=np.float32)
    adapter = made(method, model, modules_to_save=head, **options)
    refpeft.save_adapter(adapter, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert again.params.keys() == adapter.params.keys()
    assert all(np.array_equal(again.params[n], p) for n, p in adapter.params.items())
    ours, theirs = ({**vars(a.config)} for a in (adapter, again))
    assert tuple(ours.pop("leave_out")) == tuple(theirs.pop("leave_out"))
    assert ours == theirs
    assert again.method == ("houlsby" if method == "pfeiffer" and options.get("mh_adapter") else method)


def test_names_and_fields_are_adapterhubs(tmp_path: Path) -> None:
    refpeft.save_adapter(made("pfeiffer", tiny("bert", num_hidden_layers=1), ln_before=True), tmp_path / "a")
    stem = "encoder.layer.0.output.adapters.default."
    names = ("adapter_down.0", "adapter_down.1", "adapter_norm_before", "adapter_up")
    assert set(read(tmp_path / "a/adapter.safetensors")) == {stem + n + s for n in names for s in (".weight", ".bias")}
    raw = json.loads((tmp_path / "a/adapter_config.json").read_text("utf-8"))
    assert raw["name"] == "default"
    assert raw["hidden_size"] == 16
    assert raw["config"]["scaling"] == 1.0
    assert isinstance(raw["config"]["scaling"], float)
    assert not {"train_norms", "modules_to_save", "normed_input", "architecture"} & raw["config"].keys()


@pytest.mark.parametrize("there", ["BertModel", "BertForSequenceClassification"])
def test_with_and_without_a_head(tmp_path: Path, there: str) -> None:
    """An adapter made beside a head is read by the model without, and the other way round."""
    here = {"BertModel": "BertForSequenceClassification"}.get(there, "BertModel")
    adapter = made("houlsby", tiny("bert", there), train_norms=True)
    refpeft.save_adapter(adapter, tmp_path / "a")
    again = refpeft.load_adapter(tmp_path / "a", tiny("bert", here))
    strip = {n.removeprefix("bert."): p for n, p in again.params.items()}
    for n, p in adapter.params.items():
        assert np.array_equal(strip[n.removeprefix("bert.")], p)


def test_layers_left_out_are_kept(tmp_path: Path) -> None:
    from dataclasses import replace

    model = tiny("bert")
    adapter = made("houlsby", model)
    adapter = adapter.replace(config=replace(adapter.config, leave_out=[0]))
    refpeft.save_adapter(adapter, tmp_path / "a")
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert again.params.keys() == adapter.params.keys()
    assert np.array_equal(model(IDS, again)[0], model(IDS, adapter)[0])


def test_on_16_bits_adapters_are_float32(tmp_path: Path) -> None:
    model = tiny("bert", dtype=np.float16)
    refpeft.save_adapter(made("parallel", tiny("bert"), train_norms=True), tmp_path / "a")
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert {p.dtype.name for n, p in again.params.items() if ".adapters." in n} == {"float32"}
    assert {p.dtype.name for n, p in again.params.items() if ".adapters." not in n} == {"float16"}


def test_files_of_adapter_transformers_call_gelu_otherwise(tmp_path: Path) -> None:
    """Those without a version: there, gelu was the tanh form, and gelu_orig the exact one."""
    model = tiny("bert")
    refpeft.save_adapter(made("pfeiffer", model, non_linearity="gelu"), tmp_path / "a")
    change(tmp_path / "a", lambda raw: raw.pop("version"))
    assert refpeft.load_adapter(tmp_path / "a", model).config.non_linearity == "gelu_new"
    change(tmp_path / "a", lambda raw: raw["config"].update(non_linearity="gelu_orig"))
    assert refpeft.load_adapter(tmp_path / "a", model).config.non_linearity == "gelu"


def test_what_a_config_does_not_say_is_as_adapterhub_has_it(tmp_path: Path) -> None:
    model = tiny("bert")
    refpeft.save_adapter(made("houlsby", model, train_norms=False), tmp_path / "a")
    few = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
    change(tmp_path / "a", lambda raw: raw.update(config={n: raw["config"][n] for n in few}))
    cfg = refpeft.load_adapter(tmp_path / "a", model).config
    assert (cfg.original_ln_before, cfg.original_ln_after, cfg.residual_before_ln, cfg.scaling) == (
        False,
        True,
        True,
        1,
    )
    assert (cfg.is_parallel, cfg.train_norms, cfg.init_weights) == (False, False, "bert")


def change(folder: Path, how: Any) -> None:
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text("utf-8"))
    how(raw)
    path.write_text(json.dumps(raw), "utf-8")


def config(**fields: Any) -> Any:
    return lambda raw: raw["config"].update(fields)


BAD_CONFIGS: list[tuple[Any, str]] = [
    (config(phm_layer=True), r"config.'phm_layer' is set to True, which is not supported"),
    (config(inv_adapter="nice"), r"config.'inv_adapter' is set to 'nice', which is not supported"),
    (config(non_linearity=["relu"]), r"non_linearity must be str, found \['relu'\]"),
    (config(non_linearity="elu"), "non_linearity must be one of"),
    (config(mh_adapter=None), "config.mh_adapter is missing"),
    (config(mh_adapter=1), "mh_adapter must be bool, found 1"),
    (config(scaling=[1]), "scaling must be"),
    (config(leave_out=[7]), "leave_out names layer 7, and the model has layers 0 to 1"),
    (config(modules_to_save=3), "modules_to_save must be"),
    (config(normed_input=True), "config.normed_input and config.architecture contradict each other"),
    (config(architecture="reft"), "config.architecture must be null or one of lora, prompt_tuning, prefix_tuning"),
    (lambda raw: raw.update(name=3), "name must be the name of the adapter, found 3"),
    (lambda raw: raw.update(config="pfeiffer"), "peft_type must be 'LORA', found None"),
]


@pytest.mark.parametrize(("how", "says"), BAD_CONFIGS)
def test_bad_configs_are_refused(tmp_path: Path, how: Any, says: str) -> None:
    model = tiny("bert")
    refpeft.save_adapter(made("houlsby", model), tmp_path / "a")
    change(tmp_path / "a", how)
    with pytest.raises(Malformed, match=rf"^adapter_config.json: {says}"):
        refpeft.load_adapter(tmp_path / "a", model)


DOWN = "encoder.layer.0.output.adapters.default.adapter_down.1.weight"
TWICE = "encoder.layer.0.output.adapters.default.adapter_down.0.weight"
BAD_TENSORS: list[tuple[Any, str]] = [
    (lambda t: t.pop(DOWN), "tensor 'encoder.layer.0.output.adapters.adapter_down.1.weight' is missing"),
    (lambda t: t.update({DOWN: t[DOWN].T}), r"expected shape \[4, 16\], found \[16, 4\]"),
    (lambda t: t.update({DOWN: t[DOWN].astype(np.int32)}), "expected a float dtype, found int32"),
    (lambda t: t.update({TWICE: t[TWICE] + 1}), "must be equal to adapter_norm_before.weight, found other values"),
    (lambda t: t.pop(TWICE), "adapter_down.0.weight' is missing"),
    (lambda t: t.update(other=t[DOWN]), "tensor 'other' is not one that this adapter has"),
]


@pytest.mark.parametrize(("how", "says"), BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path: Path, how: Any, says: str) -> None:
    model = tiny("bert")
    refpeft.save_adapter(made("pfeiffer", model, ln_before=True), tmp_path / "a")
    tensors = {n: a.copy() for n, a in read(tmp_path / "a/adapter.safetensors").items()}
    how(tensors)
    (tmp_path / "a/adapter.safetensors").unlink()
    write(tmp_path / "a/adapter.safetensors", tensors)
    with pytest.raises(Malformed, match=rf"^adapter.safetensors: .*{says}"):
        refpeft.load_adapter(tmp_path / "a", model)


def test_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    model = tiny("bert")
    refpeft.save_adapter(made("houlsby", model), tmp_path / "a")
    (tmp_path / "a/adapter.safetensors").rename(tmp_path / "a/pytorch_adapter.bin")
    with pytest.raises(
        Malformed, match=r"pytorch_adapter.bin: only safetensors .* use_safetensors=True\)` of AdapterHub"
    ):
        refpeft.load_adapter(tmp_path / "a", model)


def test_heads_of_their_own_kind_are_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    refpeft.save_adapter(made("houlsby", model), tmp_path / "a")
    (tmp_path / "a/head_config.json").write_text(json.dumps({"config": {"head_type": "classification"}}), "utf-8")
    with pytest.raises(Malformed, match=r"^head_config\.json: heads of AdapterHub's own kinds are not supported"):
        refpeft.load_adapter(tmp_path / "a", model)
    (tmp_path / "a/head_config.json").write_text(json.dumps({"config": None}), "utf-8")
    write(tmp_path / "a/model_head.safetensors", {"classifier.weight": np.zeros((2, 16))})
    with pytest.raises(Malformed, match=r"^model_head\.safetensors: tensor 'classifier\.weight' is not one that"):
        refpeft.load_adapter(tmp_path / "a", model)
