"""The methods that train tensors of the model itself: claims S1 to S4, B1, T1, W1, W2, and files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import Adapter, Model, check_model
from refpeft.adapter import each
from refpeft.checkpoint.safetensors import Malformed
from refpeft.model import collect
from tests.models import tiny

IDS = np.random.default_rng(0).integers(0, 29, (2, 6))
CASES: dict[str, tuple[str, str | None, str, dict[str, Any]]] = {
    "full": ("gpt2", None, "full", {}),
    "full-llama": ("llama", None, "full", {}),
    "partial": ("gpt2", None, "partial", {"layers": 1}),
    "partial-tied": ("gpt2", None, "partial", {"layers": 1, "tied": True}),
    "head": ("bert", "ForSequenceClassification", "partial", {"layers": 0}),
    "bitfit": ("bert", "ForSequenceClassification", "bitfit", {"modules_to_save": ["classifier"]}),
    "bitfit-query": ("roberta", None, "bitfit", {"biases": "query_and_intermediate"}),
    "bitfit-fused": ("gpt2", None, "bitfit", {}),
    "norms": ("llama", None, "ln_tuning", {}),
    "some-norms": ("gpt2", None, "ln_tuning", {"target_modules": ["ln_1"]}),
    "tokens": ("llama", None, "trainable_tokens", {"token_indices": [3, 5]}),
    "tokens-tied": ("gpt2", None, "trainable_tokens", {"token_indices": [int(IDS[0, 0]), 7]}),
}


def made(case: str) -> tuple[Model, Adapter]:
    """A model, and the adapter moved away from where it starts."""
    family, architecture, method, config = CASES[case]
    model = tiny(family, architecture)
    adapter = refpeft.init(method, config, model, seed=1)
    rng = np.random.default_rng(2)
    params = {n: v + 0.1 * rng.normal(size=v.shape) for n, v in adapter.params.items()}
    return model, adapter.replace(params=params)


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_at_init(case: str) -> None:
    """S1, W2"""
    family, architecture, method, config = CASES[case]
    model = tiny(family, architecture)
    assert np.array_equal(model(IDS, refpeft.init(method, config, model))[0], model(IDS)[0])


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    """S4: those that are trained, and no others; B1 among them."""
    model, adapter = made(case)
    assert max(check_model(model, IDS, adapter).values()) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_merged_is_adapted(case: str) -> None:
    """S3: outputs as the merged model's, the base restored by what it had; S2: a tied layer stays tied."""
    model, adapter = made(case)
    merged = refpeft.merge(model, adapter)
    assert np.allclose(merged(IDS)[0], model(IDS, adapter)[0], rtol=1e-12, atol=1e-12)
    assert merged.params.keys() == model.params.keys()
    assert merged.sites == model.sites
    assert not np.allclose(merged(IDS)[0], model(IDS)[0], rtol=1e-3)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("tokens")])
def test_gradients_are_the_base_models(case: str) -> None:
    """F1: what is trained in the adapter has the gradient that the same tensor has in the merged model."""
    model, adapter = made(case)
    merged = refpeft.merge(model, adapter)
    out, vjp = model(IDS, adapter)
    dout = np.random.default_rng(3).normal(size=out.shape)
    _, base = merged(IDS)[1](dout, base=True)
    for name, d in vjp(dout).items():
        assert np.allclose(d, base[name], rtol=1e-12, atol=1e-12), name


def test_nothing_below_is_walked() -> None:
    """T1: the stages whose cotangents are computed are those above the trained ones."""
    model, adapter = made("partial")
    out, ((name, backs),), _ = model.run(each([adapter], model), IDS)
    asked: list[int] = []
    watched = [
        lambda dy, want, n=n, back=back: (lambda d, g: ((lambda: asked.append(n) or d()), g))(*back(dy, want))
        for n, back in enumerate(backs)
    ]
    collect([(name, watched)], np.ones_like(out), {(0, name) for name in adapter.params})
    assert min(asked) == 4  # 0 to 2 are embeddings and layer 0; nothing asks for what goes into 3


def test_rows_of_other_tokens_are_not_touched() -> None:
    """W1, W2"""
    model, adapter = made("tokens-tied")
    ids = np.array([[i for i in range(20) if i not in adapter.config.token_indices]])
    base, got = model(ids)[0], model(ids, adapter)[0]
    new = list(adapter.config.token_indices)
    others = [i for i in range(29) if i not in new]
    assert np.array_equal(base[..., others], got[..., others])
    assert not np.allclose(base[..., new], got[..., new])


@pytest.mark.parametrize("case", CASES)
def test_files_round_trip(case: str, tmp_path: Path) -> None:
    model, adapter = made(case)
    refpeft.save_adapter(adapter, tmp_path / "a")
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert again.method == adapter.method
    assert again.params.keys() == adapter.params.keys()
    assert all(np.array_equal(again.params[n], a) for n, a in adapter.params.items())


@pytest.mark.parametrize(
    ("family", "method", "config", "words"),
    [
        ("llama", "bitfit", {}, "no biases"),
        ("gpt2", "partial", {"layers": 9}, "at most 2"),
        ("gpt2", "partial", {"layers": -1}, "0 or more"),
        ("gpt2", "ln_tuning", {"target_modules": ["c_attn"]}, "no norm"),
        ("gpt2", "trainable_tokens", {"token_indices": [99]}, "29 rows"),
        ("gpt2", "trainable_tokens", {}, "at least one"),
        ("gpt2", "bitfit", {"biases": "some"}, "found 'some'"),
    ],
)
def test_what_cannot_be_is_refused(family: str, method: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refpeft.init(method, config, tiny(family))


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    model, adapter = made("norms")
    refpeft.save_adapter(adapter, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["input_layernorm"]}))
    with pytest.raises(Malformed, match="not one that this adapter has"):
        refpeft.load_adapter(tmp_path / "a", model)


def test_rows_of_a_batch_have_tensors_of_their_own() -> None:
    """Two methods that replace the same tensor, each in its own rows: every row as if it were alone."""
    model = tiny("bert")
    adapters = []
    for seed, method in enumerate(("bitfit", "ln_tuning")):
        adapter = refpeft.init(method, {}, model)
        rng = np.random.default_rng(seed)
        adapters.append(adapter.replace(params={n: a + rng.normal(size=a.shape) for n, a in adapter.params.items()}))
    ids = np.array([[3, 1, 4], [1, 5, 9], [2, 6, 5]])
    rows, which = refpeft.by_row(adapters, np.array([1, -1, 0])), (adapters[1], None, adapters[0])
    alone = [model(ids[k : k + 1], a)[0] for k, a in enumerate(which)]
    assert np.allclose(model(ids, rows)[0], np.concatenate(alone), atol=1e-12)
