"""--form training: steps on onnxruntime are those of the specification, and what comes out is an adapter again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import refpeft
from refpeft import optim
from refpeft.checkpoint import safetensors
from refpeft.cli import app
from refpeft.export import training
from refpeft.export.forms import training as form
from refpeft.export.program import export
from refpeft.export.runtime import open_folder
from refpeft.export.verification import LIMIT, MismatchError
from refpeft.methods import adalora
from refpeft.objectives import Objective, class_loss, next_token_loss, token_loss
from refpeft.train import Plan, start, step
from refpeft.train import trained as finished
from tests.export.adapters import SMALL, moved
from tests.models import tiny

Array = np.ndarray[Any, Any]
Named = dict[str, Any]
F32 = np.float32
LORA = {"r": 2, "lora_alpha": 6}
HEAD = {**LORA, "modules_to_save": ["classifier"]}
PLUS = {**LORA, "target_modules": ["q_proj", "embed_tokens"]}
TURNS = {**SMALL["adalora"], "tinit": 2, "tfinal": 3, "deltaT": 2}
CASES: dict[str, tuple[str, str, str, Named]] = {  # family, architecture, method, its config
    "adamw": ("gpt2", "LMHeadModel", "lora", LORA),
    "sgd": ("gpt2", "LMHeadModel", "lora", LORA),
    "adam": ("bert", "ForSequenceClassification", "lora", HEAD),
    "clipped": ("llama", "ForCausalLM", "rslora", SMALL["rslora"]),
    "loraplus": ("qwen2", "ForSequenceClassification", "lora", PLUS),
    "dora": ("roberta", "ForMaskedLM", "dora", {**LORA, "target_modules": ["query"]}),
    "bitfit": ("bert", "ForTokenClassification", "bitfit", {}),
    "vectors": ("gpt2", "LMHeadModel", "ia3", {}),
    "vectors and a projection": ("llama", "ForCausalLM", "vera", SMALL["vera"]),
    "loha": ("bert", "ForSequenceClassification", "loha", {"r": 2, "alpha": 6, "target_modules": ["query"]}),
    "loha with cores": ("bert", "ForSequenceClassification", "loha", {"r": 2, "taps": 4, "target_modules": ["query"]}),
    "lokr": ("bert", "ForSequenceClassification", "lokr", {"r": 1, "alpha": 6, "decompose_both": True}),
    "glora": ("gpt2", "LMHeadModel", "glora", {"r": 2, "alpha": 6, "target_modules": ["c_attn", "wte"]}),
    "dylora": ("bert", "ForSequenceClassification", "dylora", {"r": 4, "rank": 2, "block_size": 2, "frozen": True}),
    "oft": ("gpt2", "LMHeadModel", "oft", {"oft_block_size": 4, "target_modules": ["c_attn", "wte"]}),
    "oft, exact": ("gpt2", "LMHeadModel", "oft", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "boft": ("gpt2", "LMHeadModel", "boft", SMALL["boft"]),
    "boft, three butterflies": ("bert", "ForSequenceClassification", "boft", {"boft_n_butterfly_factor": 3}),
    "a subspace": ("gpt2", "LMHeadModel", "did", {"d": 40, "target_modules": ["c_attn", "ln_1", "wte"]}),
    "a subspace with shares": ("bert", "ForSequenceClassification", "said", {"d": 30, "target_modules": ["query"]}),
    "adalora": ("gpt2", "LMHeadModel", "adalora", SMALL["adalora"]),
    "adalora, by turns": ("llama", "ForCausalLM", "adalora", TURNS),
    "a prompt": ("gpt2", "LMHeadModel", "prompt_tuning", SMALL["prompt_tuning"]),
    "a prompt that a network makes": ("bert", "ForSequenceClassification", "p_tuning", SMALL["p_tuning"]),
    "a prefix": ("llama", "ForCausalLM", "prefix_tuning", SMALL["prefix_tuning"]),
    "houlsby": ("bart", "ForConditionalGeneration", "houlsby", {}),
    "a number": ("roberta", "ForSequenceClassification", "lora", LORA),
}
OPTIONS: dict[str, Named] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    "adam": {"optimizer": "adam", "weight_decay": 0.1},
    "clipped": {"optimizer": "sgd", "dampening": 0.5, "momentum": 0.5, "clip": 0.1},
    "loraplus": {"loraplus_ratio": 16, "betas": [0.8, 0.9]},
}


def made(case: str) -> tuple[Any, Any]:
    family, architecture, method, config = CASES[case]
    model = tiny(family, architecture, dtype=F32, **({"num_labels": 1} if case == "a number" else {}))
    return model, moved(refpeft.init(method, config, model, seed=1))


@pytest.mark.ort
@pytest.mark.parametrize("case", CASES)
def test_ten_steps(case: str, tmp_path: Path) -> None:
    model, adapter = made(case)
    result = export(model, adapter, tmp_path / "out", "training", options=OPTIONS.get(case))
    assert [c["what"] for c in result.cases] == [f"10 steps of {OPTIONS.get(case, {}).get('optimizer', 'adamw')}"]
    assert result.cases[0]["ratio"] <= LIMIT
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert {node.domain for node in proto.graph.node} == {""}, "only standard operators"
    casts = {a.i for node in proto.graph.node if node.op_type == "Cast" for a in node.attribute}
    stored = {t.data_type for t in proto.graph.initializer}
    assert onnx.TensorProto.DOUBLE not in casts | stored, "onnxruntime-web with WebGPU cannot cast to it"
    expected = {f"adapter.{n}" for n in adapter.params}
    assert {n for n in result.inputs if n.startswith("adapter.")} == expected
    assert {n.removeprefix("next.") for n in result.outputs if n.startswith("next.adapter.")} == expected
    assert {n for n in result.inputs if n.startswith("state.")} == {n[5:] for n in result.outputs if "next.state" in n}


@pytest.mark.ort
@pytest.mark.parametrize(
    ("name", "wrong"), [("weight_decay", 0.011), ("eps", 1e-6), ("betas", (0.9, 0.9989)), ("betas", (0.899, 0.999))]
)
def test_another_optimiser_is_not_kept(name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose optimiser is off in one number fails the verification."""
    model, adapter = made("adamw")
    right = training.optimizer
    tampered = replace(right({}), options={**right({}).options, name: wrong})
    make = form.make

    def made_wrong(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(training, "optimizer", lambda options: tampered)
            return make(*args)

    monkeypatch.setattr(form, "make", made_wrong)
    with pytest.raises(MismatchError, match="10 steps of adamw"):
        export(model, adapter, tmp_path / "out", "training")
    assert not any(tmp_path.iterdir())


def batches(model: Any, labels: Any) -> list[dict[str, Array]]:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 29, (6, 2, 7))
    types = ["token_type_ids"] * ("embed.type" in model.sites)
    return [
        {"input_ids": x, "attention_mask": np.ones_like(x), "labels": labels(x, rng), **dict.fromkeys(types, x * 0)}
        for x in ids
    ]


def trained(folder: Path, steps: Sequence[Mapping[str, Array]], lr: float) -> tuple[list[float], dict[str, Array]]:
    """The loop of the documentation."""
    runner, values, losses = open_folder(folder), safetensors.read(folder / "start.safetensors"), []
    for batch in steps:
        out = runner.run({**batch, **values, "learning_rate": np.array(lr, F32)})
        values = {name.removeprefix("next."): a for name, a in out.items() if name.startswith("next.")}
        losses.append(float(out["loss"]))
    return losses, values


@pytest.mark.ort
@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("adamw", next_token_loss),
        ("adam", class_loss),
        ("dora", token_loss),
        ("a prompt", next_token_loss),
        ("adalora", next_token_loss),
        ("boft", next_token_loss),
    ],
)
def test_it_is_what_refpeft_train_does(case: str, loss: Any, tmp_path: Path) -> None:
    """The same losses and adapters as `refpeft train`'s own loop, in float64: to what float32 has."""
    model, adapter = made(case)
    options = {**OPTIONS.get(case, {}), "weight_decay": 0.03}
    export(model, adapter, tmp_path / "out", "training", verify=False, options=options)

    def labels(ids: Array, rng: Any) -> Array:
        return rng.integers(0, 3, 2) if loss is class_loss else np.where(ids % 3 == 0, -100, ids)

    turns = batches(model, labels)
    losses, values = trained(tmp_path / "out", turns, 2.0**-6)
    plan = Plan(len(turns), 1, 2.0**-6, "constant", optimizer=options.get("optimizer", "adamw"), weight_decay=0.03)
    wide = adapter.replace(params={n: a.astype(np.float64) for n, a in adapter.params.items()})
    state, base = start(plan, wide), model.astype(np.float64)
    for batch in turns:
        state = step(plan, base, wide, Objective(lambda rows, rng, b=batch: b, loss), [{}], state)  # type: ignore[misc]
    np.testing.assert_allclose(losses, state.losses, rtol=1e-5)
    for name, a in state.params.items():
        gone = np.linalg.norm(a - adapter.params[name])
        assert np.linalg.norm(values["adapter." + name] - a) < 1e-3 * gone, name


@pytest.mark.ort
def test_what_comes_out_is_an_adapter_folder(tmp_path: Path) -> None:
    """Saved from tensors, from a file of them and from the command line; loaded, it has these numbers."""
    model, adapter = made("adam")
    export(model, adapter, tmp_path / "out", "training", verify=False)
    _, values = trained(tmp_path / "out", batches(model, lambda ids, rng: rng.integers(0, 3, 2)), 0.01)
    safetensors.write(tmp_path / "trained.safetensors", values)
    training.save(tmp_path / "out", values, tmp_path / "one")
    training.save(tmp_path / "out", {f"next.{n}": a for n, a in values.items()}, tmp_path / "two")
    words = ["--adapter-only", "out", "--adapter", "trained.safetensors", "--out", "three"]
    at = [w if w.startswith("--") else str(tmp_path / w) for w in words]
    result = CliRunner().invoke(app, ["export", *at])
    assert result.exit_code == 0, result.output
    for folder in ("one", "two", "three"):
        back = refpeft.load_adapter(tmp_path / folder, model)
        assert json.dumps(asdict(back.config), default=list) == json.dumps(asdict(adapter.config), default=list)
        assert back.params.keys() == adapter.params.keys()
        assert all(np.array_equal(a, values["adapter." + n]) for n, a in back.params.items())
        assert not all(np.array_equal(a, adapter.params[n]) for n, a in back.params.items())


KEPT = {
    "a network that makes a prompt": ("p_tuning", SMALL["p_tuning"]),
    "a network that makes a prefix": ("prefix_tuning", SMALL["prefix_tuning"]),
    "companions that are frozen": ("lora", {"r": 2, "init_lora_weights": "pissa"}),
    "patterns": ("lora", {"r": 2, "rank_pattern": {"c_fc": 3}, "target_modules": ["c_attn", "c_fc", "wte"]}),
    "biases and a tied head": ("lora", {"r": 2, "bias": "all", "modules_to_save": ["lm_head"]}),
    "rows of a table": ("trainable_tokens", SMALL["trainable_tokens"]),
    "what a rotation is made from": ("oft", SMALL["oft"]),
    "a bottleneck": ("pfeiffer", {}),
    "a projection that is frozen": ("vera", SMALL["vera"]),
    "vectors": ("ia3", {"modules_to_save": ["ln_f"]}),
    "blocks of butterflies": ("boft", SMALL["boft"]),
    "triplets that may be cut": ("adalora", SMALL["adalora"]),
}


@pytest.mark.parametrize("case", KEPT)
def test_the_way_back_keeps_everything(case: str, tmp_path: Path) -> None:
    """Without a step the adapter comes back as it was; saved and loaded, it is the same function."""
    method, config = KEPT[case]
    model = tiny("gpt2", dtype=F32)
    adapter = moved(refpeft.init(method, config, model, seed=1))
    export(model, adapter, tmp_path / "out", "training", verify=False)
    back = training.save(tmp_path / "out", tmp_path / "out" / "start.safetensors", tmp_path / "back")
    for ours, theirs in ((adapter.params, back.params), (adapter.frozen, back.frozen)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(a, theirs[n]) for n, a in ours.items())
    assert json.dumps(asdict(back.config), default=list) == json.dumps(asdict(adapter.config), default=list)
    ids = np.arange(8)[None]
    loaded = refpeft.load_adapter(tmp_path / "back", model)
    np.testing.assert_allclose(model(ids, loaded)[0], model(ids, adapter)[0], rtol=0, atol=1e-5)


@pytest.mark.ort
def test_adalora_ends_as_refpeft_train_ends(tmp_path: Path) -> None:
    """The choice of the graph is the specification's, and what is saved is without the triplets that it cut; from the
    parameters alone, without the state, nothing is known of a choice."""
    model, adapter = made("adalora")
    export(model, adapter, tmp_path / "out", "training", verify=False)
    turns = batches(model, lambda ids, rng: ids) * 2
    _, values = trained(tmp_path / "out", turns[:10], 2.0**-6)
    plan = Plan(10, 1, 2.0**-6, "constant", weight_decay=0.01)
    wide = adapter.replace(params={n: a.astype(np.float64) for n, a in adapter.params.items()})
    state, base = start(plan, wide), model.astype(np.float64)
    for batch in turns[:10]:
        state = step(plan, base, wide, Objective(lambda rows, rng, b=batch: b, next_token_loss), [{}], state)  # type: ignore[misc]
    expected = finished(wide, state)
    back = training.save(tmp_path / "out", values, tmp_path / "back")
    assert back.config.rank_pattern == expected.config.rank_pattern
    assert {n: a.shape for n, a in back.params.items()} == {n: a.shape for n, a in expected.params.items()}
    assert sum(a.shape[0] for n, a in back.params.items() if n.endswith("lora_E")) == 2
    for n, a in expected.params.items():
        assert np.linalg.norm(back.params[n] - a) <= 1e-5 * np.linalg.norm(a)
    ids = np.arange(8)[None]
    whole = training.adapter_of(tmp_path / "out", {n: a for n, a in values.items() if n.startswith("adapter.")})
    assert {n: a.shape for n, a in whole.params.items()} == {n: a.shape for n, a in adapter.params.items()}
    np.testing.assert_allclose(model(ids, back)[0], model(ids, whole)[0], rtol=0, atol=1e-5)


@pytest.mark.ort
@pytest.mark.parametrize("wrong", ["budget", "penalty"])
def test_what_adalora_does_besides_is_verified(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that cuts less, or whose P and Q are not kept orthogonal, is not kept."""
    model, adapter = made("adalora")
    make, found = form.make, getattr(adalora, wrong)

    def tampered(cfg: Any, *args: Any) -> Any:
        return found(cfg, *args) + 1 if wrong == "budget" else found(replace(cfg, orth_reg_weight=0.499), *args)

    def made_wrong(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(adalora, wrong, tampered)
            return make(*args)

    monkeypatch.setattr(form, "make", made_wrong)
    with pytest.raises(MismatchError, match="10 steps of adamw"):
        export(model, adapter, tmp_path / "out", "training")


def test_what_does_not_come_out_is_said(tmp_path: Path) -> None:
    model, adapter = made("adamw")
    export(model, adapter, tmp_path / "out", "training", verify=False)
    values = safetensors.read(tmp_path / "out" / "start.safetensors")
    name = "adapter." + next(iter(adapter.params))
    for change, words in (
        ({name: values[name][:1]}, rf"{name} must be float32 of shape \[2, 16\], found float32 of shape \[1, 16\]"),
        ({name: values[name].astype(np.float64)}, "found float64"),
    ):
        with pytest.raises(ValueError, match=words):
            training.save(tmp_path / "out", values | change, tmp_path / "back")
    with pytest.raises(ValueError, match=f"{name} is missing"):
        training.save(tmp_path / "out", {}, tmp_path / "back")
    with pytest.raises(ValueError, match="no such file"):
        training.save(tmp_path / "out", tmp_path / "none.safetensors", tmp_path / "back")
    export(model, adapter, tmp_path / "merged", verify=False)
    with pytest.raises(ValueError, match="its form is merged, expected training"):
        training.save(tmp_path / "merged", values, tmp_path / "back")
    card = json.loads((tmp_path / "out" / "refpeft.json").read_text())
    for wrong in ([], [{"method": "lora"}], [{"method": "none", "config": {}}], ["lora"]):
        (tmp_path / "out" / "refpeft.json").write_text(json.dumps(card | {"adapters": wrong}))
        with pytest.raises(ValueError, match="adapters must be one, with its method and config"):
            training.save(tmp_path / "out", values, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adafactor"}, "optimizer must be one of adamw, adam, sgd, found 'adafactor'"),
        ({"momentum": 0.9}, "adamw has no option 'momentum': there are betas, eps, weight_decay, clip"),
        ({"weight_decay": -1}, "weight_decay must be a number, 0 or more, found -1"),
        ({"weight_decay": "0,1"}, "found '0,1'"),
        ({"betas": [0.9, 1]}, "betas must be two numbers from 0 to below 1"),
        ({"optimizer": "sgd", "nesterov": 1}, "nesterov must be true or false, found 1"),
        ({"optimizer": "sgd", "nesterov": True}, "nesterov needs a momentum above 0"),
    ],
)
def test_wrong_options_are_refused(options: Named, words: str, tmp_path: Path) -> None:
    model, adapter = made("adamw")
    with pytest.raises(ValueError, match=f"^{words}|{words}"):
        export(model, adapter, tmp_path / "out", "training", verify=False, options=options)
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model, adapter = made("adamw")
    other = made("adam")[1]
    bare = tiny("bert", dtype=F32)
    for given, words in (
        ((model, [adapter, adapter], tmp_path / "out", "training"), "one adapter, which is trained, found 2"),
        ((model, [], tmp_path / "out", "training"), "found 0"),
        ((model, adapter, tmp_path / "out", "training", "float16"), "computes in float32, found float16"),
        ((bare, refpeft.init("bitfit", {}, bare), tmp_path / "out", "training"), "BertModel has no head to train with"),
        ((model, other, tmp_path / "out", "training"), "the adapter has parameters for"),
    ):
        with pytest.raises(ValueError, match=words):
            export(*given, verify=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not decode"):
        export(model, adapter, tmp_path / "out", "training", verify=False, decode=True)
    with pytest.raises(ValueError, match="the form merged has no options, found clip"):
        export(model, adapter, tmp_path / "out", "merged", verify=False, options={"clip": 1.0})
    assert not any(tmp_path.iterdir())


@pytest.mark.ort
def test_the_command_line(tmp_path: Path) -> None:
    model, adapter = made("adamw")
    refpeft.save(model, tmp_path / "model")
    refpeft.save_adapter(adapter, tmp_path / "lora")
    words = [
        "export",
        tmp_path / "model",
        "--adapter",
        tmp_path / "lora",
        "--form",
        "training",
        "--out",
        tmp_path / "out",
    ]
    options = ["--optimizer", "sgd", "--set", "momentum=0.5", "--set", "clip=1", "--set", "nesterov=true"]
    result = CliRunner().invoke(app, [*map(str, words), *options])
    assert result.exit_code == 0, result.output
    assert "learning_rate" in result.output
    card = json.loads((tmp_path / "out" / "refpeft.json").read_text())["training"]
    assert card == {
        "optimizer": "sgd", "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True, "clip": 1,
        "loraplus_ratio": 0.0, "loraplus_embedding": 1e-6, "objective": "causal",
    }  # fmt: skip


def test_the_optimiser_of_the_graph_is_the_one_of_the_specification() -> None:
    """No second implementation: what is traced are the functions of refpeft.optim."""
    from refpeft.train import OPTIMIZERS

    assert {n: OPTIMIZERS[n][1] for n in training.TRACED} == {
        "adamw": optim.adamw,
        "adam": optim.adam,
        "sgd": optim.sgd,
    }
