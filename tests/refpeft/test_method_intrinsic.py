"""DID and SAID: the claims of their docstrings, their folders, and the search for d90."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy.linalg import hadamard

import refpeft
from refpeft import Adapter, Model
from refpeft.checkpoint.safetensors import Malformed, read, write
from tests.models import ARCHITECTURES, tiny
from tests.refpeft.equal import EXACT, Array, moved

METHODS = ("did", "said")
IDS = np.random.default_rng(0).integers(0, 29, (2, 6))
SIZES = {"did": 37, "said": 80}  # two layers have some 28 tensors, and SAID needs more dimensions than that
both = pytest.mark.parametrize("method", METHODS)


def fresh(model: Model, method: str, seed: int = 0, **config: Any) -> Adapter:
    return refpeft.init(method, {"d": SIZES[method], **config}, model, seed)


def dense(adapter: Adapter, path: str, leaf: str, D: int) -> Array:
    """P [D, d] of one tensor, from its factors as matrices."""
    method = adapter.method
    B, Π, G = (adapter.frozen[f"{path}.{method}_{leaf}_{key}"] for key in ("signs", "permutation", "gaussian"))
    H, L, d = hadamard(len(B)).astype(float), len(B), len(adapter.params[f"{method}.theta"])
    P: Array = (H @ np.diag(G) @ np.eye(L)[Π] @ H @ np.diag(B))[:D, :d]
    return P


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_gradients_are_exact_and_wrap_is_merge(method: str, family: str, architecture: str) -> None:
    """ID2, ID5, SA2, SA5: all parameters of every model, norms and tied heads among them; ID6: which stay tied."""
    model = tiny(family, architecture)
    adapter = moved(fresh(model, method))
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT
    merged = refpeft.merge(model, adapter)
    np.testing.assert_allclose(merged(IDS)[0], model(IDS, adapter)[0], rtol=0, atol=EXACT)
    assert merged.sites == model.sites
    assert all(np.abs(merged.params[n] - v).max() > 0 for n, v in model.params.items())


@both
def test_a_fresh_adapter_changes_nothing(method: str) -> None:
    """ID1, SA1: not a bit, and the gradient of λ is zero there."""
    model = tiny("gpt2")
    adapter = fresh(model, method)
    out, vjp = model(IDS, adapter)
    np.testing.assert_array_equal(out, model(IDS)[0])
    merged = refpeft.merge(model, adapter)
    assert all(np.array_equal(merged.params[n], v) for n, v in model.params.items())
    grads = vjp(np.random.default_rng(0).normal(size=out.shape))
    assert np.abs(grads[f"{method}.theta"]).max() > 0
    assert not grads.get("said.lambda", np.zeros(1)).any()


@both
def test_what_is_added_is_the_projection(method: str) -> None:
    """The formula with dense factors: P θ row by row, the longer side down; a Conv1D stores its matrix turned."""
    model = tiny("gpt2")
    adapter = moved(fresh(model, method))
    merged = refpeft.merge(model, adapter)
    θ = adapter.params[f"{method}.theta"]
    for path, leaf in (("transformer.h.1.attn.c_attn", "weight"), ("transformer.h.0.mlp.c_proj", "weight"),
                       ("transformer.h.0.attn.c_attn", "bias"), ("transformer.ln_f", "weight")):  # fmt: skip
        was = model.params[f"{path}.{leaf}"]
        long = was.T if was.ndim == 2 and was.shape[0] < was.shape[1] else was
        Δ = (dense(adapter, path, leaf, was.size) @ θ).reshape(long.shape)
        if method == "said":
            Δ = adapter.params["said.lambda"][adapter.frozen[f"{path}.said_{leaf}_index"]] * Δ
        Δ = Δ.T if long.shape != was.shape else Δ
        np.testing.assert_allclose(merged.params[f"{path}.{leaf}"] - was, Δ, rtol=0, atol=EXACT)


def test_several_adapters_add_up_and_it_is_linear() -> None:
    """ID3"""
    model = tiny("llama")
    a, b = (moved(fresh(model, "did", seed), seed=seed) for seed in (1, 2))
    together, turned = refpeft.merge(model, [a, b]), refpeft.merge(model, [b, a])
    one, other = refpeft.merge(model, a), refpeft.merge(model, b)
    twice = refpeft.merge(model, a.replace(params={n: 2 * v for n, v in a.params.items()}))
    for name, v in model.params.items():
        np.testing.assert_allclose(together.params[name], turned.params[name], rtol=0, atol=EXACT)
        np.testing.assert_allclose(
            together.params[name] - v, one.params[name] + other.params[name] - 2 * v, atol=EXACT, rtol=0
        )
        np.testing.assert_allclose(twice.params[name] - v, 2 * (one.params[name] - v), rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_they_run_after_other_adapters_as_they_merge(family: str) -> None:
    """ID3, also with SAID and LoRA, on norms, embeddings and heads."""
    model = tiny(family)
    adapters = [moved(fresh(model, method, n), seed=n) for n, method in enumerate(("did", "said", "did"))]
    adapters.insert(1, moved(refpeft.init("lora", {"r": 2, "target_modules": "all-linear"}, model)))
    assert max(refpeft.check_model(model, IDS, adapters, base=True).values()) <= EXACT
    out = refpeft.merge(model, adapters)(IDS)[0]
    np.testing.assert_allclose(model(IDS, adapters)[0], out, rtol=0, atol=EXACT * np.abs(out).max())


@pytest.mark.parametrize("columns", ["model", "tensor"])
def test_columns_have_length_1(columns: str) -> None:
    """ID4: of the whole of P, or of every block; tensors whose size is a power of two have it exactly."""
    model = tiny("bert")
    adapter = fresh(model, "did", columns=columns)
    squares, total = {}, sum(v.size for v in model.params.values())
    for k in range(3):
        θ = np.zeros(37)
        θ[k] = 1
        merged = refpeft.merge(model, adapter.replace(params={"did.theta": θ}))
        squares[k] = {n: ((merged.params[n] - v) ** 2).sum() for n, v in model.params.items()}
        for n, v in model.params.items():
            if v.size.bit_count() == 1 and v.size >= 37:
                assert abs(squares[k][n] - (v.size / total if columns == "model" else 1)) < EXACT
    lengths = [sum(s.values()) if columns == "model" else np.mean([*s.values()]) for s in squares.values()]
    assert np.abs(np.array(lengths) - 1).max() < 0.15


@pytest.mark.parametrize("kind", ["matrix", "norm"])
def test_the_gradient_is_the_transpose(kind: str) -> None:
    """ID5: dθ = Pᵀ g with P as a matrix, g from the plain model."""
    model = tiny("gpt2")
    name = "transformer.h.1.attn.c_attn.weight" if kind == "matrix" else "transformer.h.1.ln_1.bias"
    adapter = fresh(model, "did", target_modules=[name])
    out, vjp = model(IDS, adapter)
    dout = np.random.default_rng(0).normal(size=out.shape)
    (_, base) = model(IDS)[1](dout, base=[name])
    path, _, leaf = name.rpartition(".")
    g = base[name].T if kind == "matrix" else base[name]  # Conv1D stores [16, 48], and 48 is the longer side
    expected = dense(adapter, path, leaf, g.size).T @ g.reshape(-1)
    np.testing.assert_allclose(vjp(dout)["did.theta"], expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_said_with_lambda_1_is_did() -> None:
    """SA3: with the same projection; and λᵢ = 0 leaves tensor i alone."""
    model = tiny("gpt2")
    said = fresh(model, "said")
    m, θ = len(said.params["said.lambda"]), np.random.default_rng(0).normal(size=len(said.params["said.theta"]))
    did = Adapter(
        "did",
        refpeft.METHODS["did"].Config(d=80 - m),
        {"did.theta": θ},
        {n.replace(".said_", ".did_"): v for n, v in said.frozen.items() if not n.endswith("_index")},
    )
    same = said.replace(params={"said.theta": θ, "said.lambda": np.ones(m)})
    np.testing.assert_allclose(model(IDS, same)[0], model(IDS, did)[0], rtol=0, atol=EXACT)
    λ = np.ones(m)
    λ[int(said.frozen["transformer.wte.said_weight_index"])] = 0
    merged = refpeft.merge(model, said.replace(params={"said.theta": θ, "said.lambda": λ}))
    changed = {n for n, v in model.params.items() if not np.array_equal(merged.params[n], v)}
    assert changed == model.params.keys() - {"transformer.wte.weight"}


@both
def test_d_counts_all_that_is_trained(method: str) -> None:
    """SA4"""
    adapter = fresh(tiny("llama"), method)
    assert sum(v.size for v in adapter.params.values()) == SIZES[method]
    if method == "said":
        assert adapter.params["said.lambda"].size == len(tiny("llama").params)


@both
def test_storage_does_not_matter(method: str) -> None:
    """ID6: the same layer as Conv1D and as linear gets the same ΔW."""
    cfg = refpeft.METHODS[method].Config(d=9)
    rng = np.random.default_rng(0)
    L = 32
    φ = {"θ": rng.normal(size=8), "B": rng.choice([-1, 1], L), "Π": rng.permutation(L), "G": rng.normal(size=L)}
    φ |= {"λ": np.array([2.0]), "i": np.array(0)}
    W = rng.normal(size=(4, 7))
    wide, tall = (refpeft.METHODS[method].merge(cfg, X, None, φ)[0] for X in (W, W.T))
    np.testing.assert_array_equal(wide, tall.T)


# ── what is adapted ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["ln_f"], {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        (["c_attn.bias"], {f"transformer.h.{n}.attn.c_attn.bias" for n in (0, 1)}),
        (r".*\.0\..*c_fc\.weight", {"transformer.h.0.mlp.c_fc.weight"}),
        (["lm_head"], {"transformer.wte.weight"}),  # tied: one tensor, moved in both its layers
    ],
)
def test_targets_are_modules_or_tensors(target: Any, expected: set[str]) -> None:
    model = tiny("gpt2")
    merged = refpeft.merge(model, moved(fresh(model, "did", target_modules=target)))
    assert {n for n, v in model.params.items() if not np.array_equal(merged.params[n], v)} == expected
    assert merged.sites == model.sites


def test_what_is_trained_whole_is_not_projected() -> None:
    model = tiny("bert", "ForSequenceClassification")
    adapter = moved(fresh(model, "said", modules_to_save=["classifier"], exclude_modules=["LayerNorm"]))
    assert {n for n in adapter.params if "classifier" in n} == {"classifier.weight", "classifier.bias"}
    assert not any("classifier" in n or "LayerNorm" in n for n in adapter.frozen)
    assert max(refpeft.check_model(model, IDS, adapter).values()) <= EXACT
    merged = refpeft.merge(model, adapter)
    np.testing.assert_allclose(merged(IDS)[0], model(IDS, adapter)[0], rtol=0, atol=EXACT)


@both
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtypes(method: str, dtype: Any) -> None:
    """16-bit models stay so, θ and λ are float32."""
    model = tiny("llama", dtype=dtype)
    adapter = moved(fresh(model, method), by=0.05)
    assert {v.dtype for v in adapter.params.values()} == {np.dtype(np.float32)}
    out, vjp = model(IDS, adapter)
    assert out.dtype == dtype
    assert {v.dtype for v in vjp(out).values()} == {np.dtype(np.float32)}
    assert {v.dtype for v in refpeft.merge(model, adapter).params.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("did", {"d": 0}, r"d must be a positive integer below 2\*\*31, found 0"),
        ("did", {"columns": "rows"}, "columns must be 'model' or 'tensor', found 'rows'"),
        ("did", {"target_modules": ["q_proj"]}, "matches no module and no tensor"),
        ("did", {"target_modules": "("}, "target_modules: '\\(' is not a regular expression"),
        ("did", {"rank": 3}, "did has no config field 'rank'"),
        ("said", {"d": 28}, "d must be more than 28, the number of adapted tensors"),
    ],
)
def test_a_wrong_config_is_refused(method: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refpeft.init(method, config, tiny("gpt2"))


@both
def test_initialisation_depends_on_the_seed_alone(method: str) -> None:
    a, b, c = (fresh(tiny("gpt2"), method, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(v, b.frozen[n]) for n, v in a.frozen.items())
    name = f"transformer.ln_f.{method}_weight_gaussian"
    assert not np.array_equal(a.frozen[name], c.frozen[name])


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPT2ForSequenceClassification"])
def test_save_and_load(method: str, architecture: str, tmp_path: Path) -> None:
    model = tiny("gpt2", architecture)
    whole = {"modules_to_save": ["score"]} if "Sequence" in architecture else {}
    adapter = moved(fresh(model, method, **whole))
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    again = refpeft.load_adapter(tmp_path / "adapter", model)
    assert (again.method, again.config.d, again.params.keys()) == (method, SIZES[method], adapter.params.keys())
    assert again.frozen.keys() == adapter.frozen.keys()
    for name, v in (dict(adapter.params) | dict(adapter.frozen)).items():
        np.testing.assert_array_equal(again.value(name), v)
        assert again.value(name).dtype == v.dtype
    np.testing.assert_array_equal(model(IDS, again)[0], model(IDS, adapter)[0])
    written = read(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("_signs" in n for n in written) == len(model.params) - len(whole)  # a tied tensor's once


def broken(what: str) -> Any:
    def change(tensors: dict[str, Array]) -> None:
        name = f"base_model.model.transformer.ln_f.did_weight_{what}"
        v = tensors[name].copy()
        if what == "permutation":
            v[0] = v[1]
        else:
            v[0] = 0
        tensors[name] = v

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.did.theta"), "tensor 'base_model.model.did.theta' is missing"),
        (lambda t: t.update({"base_model.model.did.theta": np.zeros(3)}), "expected shape \\[37\\], found \\[3\\]"),
        (lambda t: t.update({"base_model.model.did.theta": np.zeros(37, int)}), "expected floats, found int64"),
        (lambda t: t.update({"more": np.zeros(3)}), "tensor 'more' is not one that this adapter has"),
        (broken("permutation"), "ln_f.did_weight_permutation': expected a permutation of 0 to 63"),
        (broken("signs"), "ln_f.did_weight_signs': expected signs, 1 or -1"),
    ],
)
def test_a_wrong_folder_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    model = tiny("gpt2")
    refpeft.save_adapter(fresh(model, "did"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n: v.copy() for n, v in read(file).items()}
    change(tensors)
    write(file, tensors)
    with pytest.raises(Malformed, match=message):
        refpeft.load_adapter(tmp_path / "adapter", model)


# ── d90 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("needed", "expected"), [(1, 1), (2, 2), (30, 32), (64, 64), (65, None)])
def test_the_search_finds_the_smallest_dimension_that_suffices(needed: int, expected: int | None) -> None:
    tried = []

    def train(d: int) -> float:
        tried.append(d)
        return 0.9 if d >= needed else 0.89

    grid = [1, 2, 4, 8, 16, 32, 64]
    found = refpeft.intrinsic_dimension(train, full=1.0, dimensions=grid)
    assert (found.dimension, found.threshold) == (expected, 0.9)
    assert len(tried) == len(found.scores) == 3
    assert [*found.scores] == sorted(tried)


def test_the_search_trains_adapters_of_a_model() -> None:
    """A gain of 1 has to become the target: the distance that is left falls to nothing when d reaches the size, 16."""
    model = tiny("llama")
    name = "model.norm.weight"
    target = model.params[name] + np.random.default_rng(0).normal(size=16)
    distance = np.linalg.norm(target - model.params[name])

    def train(adapter: Adapter) -> float:
        P = dense(adapter, "model.norm", "weight", 16)
        θ = np.linalg.lstsq(P, target - model.params[name], rcond=None)[0]
        merged = refpeft.merge(model, adapter.replace(params={"did.theta": θ}))
        return float(1 - np.linalg.norm(merged.params[name] - target) / distance)

    config = {"target_modules": [name]}
    found = refpeft.intrinsic_dimension(train, 1.0, range(1, 21), model, "did", config, share=0.999)
    assert found.dimension == 16
    loose = refpeft.intrinsic_dimension(train, 1.0, range(1, 21), model, "did", config, share=0.3)
    assert loose.dimension is not None
    assert loose.dimension < 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": []}, "dimensions must be positive and increase, found \\[\\]"),
        ({"dimensions": [4, 4]}, "found \\[4, 4\\]"),
        ({"dimensions": [0, 4]}, "found \\[0, 4\\]"),
        ({"full": 0.0}, "full must be positive"),
        ({"share": 1.5}, "share in \\(0, 1\\], found 1.0 and 1.5"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"train": float, "full": 1.0, "dimensions": [1, 2], **change}
    with pytest.raises(ValueError, match=message):
        refpeft.intrinsic_dimension(**arguments)
