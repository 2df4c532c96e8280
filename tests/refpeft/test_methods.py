"""Every method, on every kind of layer, with every option: what all share first, then the claims of each docstring."""

import ast
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft import METHODS, Adapter, Model
from refpeft.method import Phi
from refpeft.methods import dora, lora
from refpeft.part import BASE, Part, make
from tests.models import tiny
from tests.refpeft.equal import EXACT, Array, moved, same, wrap_is_merge

rng = np.random.default_rng(0)
START = rng.bit_generator.state
IDS = rng.integers(0, 29, (2, 6))


@pytest.fixture(autouse=True)
def the_same_numbers_whatever_ran_before() -> None:
    rng.bit_generator.state = START


LORA = ("lora", "rslora", "dora")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora-bias": ("lora", {"lora_bias": True}),
    "lora-by-flag": ("lora", {"use_rslora": True}),
    "lora-random": ("lora", {"init_lora_weights": False}),
    "gaussian": ("lora", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("lora", {"init_lora_weights": "orthogonal"}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "olora": ("lora", {"init_lora_weights": "olora"}),
    "patterns": (
        "lora",
        {"rank_pattern": {"h.1.*c_attn": 3, "v_proj": 1}, "alpha_pattern": {"c_attn": 7, "q_proj": 2}},
    ),
    "rslora": ("rslora", {}),
    "rslora-bias": ("rslora", {"lora_bias": True}),
    "rslora-pissa": ("rslora", {"init_lora_weights": "pissa"}),
    "dora": ("dora", {}),
    "dora-norm-differentiated": ("dora", {"detach_norm": False}),
    "dora-rank-stabilised": ("dora", {"use_rslora": True}),
    "dora-pissa": ("dora", {"init_lora_weights": "pissa"}),
    "dora-olora-norm-differentiated": ("dora", {"init_lora_weights": "olora", "detach_norm": False}),
}
LAYERS: dict[str, tuple[str, str | None, dict[str, Any]]] = {  # family, architecture, targets and what is trained whole
    "linear": ("llama", None, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "linear-with-bias": ("bert", "ForSequenceClassification", {"target_modules": "all-linear", "bias": "all"}),
    "conv1d": ("gpt2", None, {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "embedding": ("gpt2", None, {"target_modules": ["wte", "wpe", "c_attn"], "modules_to_save": ["ln_f"]}),
    "tied-head": ("gpt2", None, {"target_modules": ["lm_head", "c_fc"], "bias": "lora_only"}),
}


def defined(option: str, layer: str) -> bool:
    """lora_bias, pissa and olora are refused on embeddings (tested below)."""
    return layer != "embedding" or not any(word in option for word in ("bias", "pissa", "olora"))


COMBINATIONS = [(o, layer) for o in OPTIONS for layer in LAYERS if defined(o, layer)]
everywhere = pytest.mark.parametrize(("option", "layer"), COMBINATIONS, ids=[f"{o}-on-{at}" for o, at in COMBINATIONS])


def model_of(layer: str, **options: Any) -> Model:
    family, architecture, _ = LAYERS[layer]
    return tiny(family, architecture, **options)


def fresh(model: Model, option: str, layer: str, seed: int = 0, **config: Any) -> Adapter:
    method, options = OPTIONS[option]
    return refpeft.init(method, {"r": 2, "lora_alpha": 5, **LAYERS[layer][2], **options, **config}, model, seed)


def trained(adapter: Adapter, seed: int = 0) -> Adapter:
    return moved(adapter, seed + 100)


# ── what holds for every method ──────────────────────────────────────────────────────────────────────────────────────


@everywhere
def test_gradients_are_exact(option: str, layer: str) -> None:
    """Of the adapter and of the whole base under it."""
    model = model_of(layer)
    adapter = trained(fresh(model, option, layer))
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT


@everywhere
def test_wrap_is_merge(option: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """L2, D2: outputs of the run-time form and of the merged model, and gradients of both forms, are the same."""
    model = model_of(layer)
    adapter = trained(fresh(model, option, layer))
    wrap_is_merge(model, adapter, IDS, monkeypatch)


@everywhere
def test_a_fresh_adapter_changes_nothing(option: str, layer: str) -> None:
    """L1, D1: not even a bit where B = 0 or where A₀, B₀ are subtracted; B A of orthogonal vanishes up to rounding."""
    model = model_of(layer)
    adapter = fresh(model, option, layer)
    out, merged = model(IDS)[0], refpeft.merge(model, adapter)
    if option == "lora-random":
        assert np.abs(model(IDS, adapter)[0] - out).max() > 1e-3
        return
    same(model(IDS, adapter)[0], out)
    for name, tensor in model.params.items():
        if option == "orthogonal":
            same(merged.params[name], tensor, 1e-15)
        else:
            np.testing.assert_array_equal(merged.params[name], tensor)


@everywhere
def test_initialisation_depends_on_the_seed_alone(option: str, layer: str) -> None:
    model = model_of(layer)
    a, b, other = (fresh(model, option, layer, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.params[n], b.params[n]) for n in a.params)
    drawn = [n for n in a.params if n.endswith(("lora_A.weight", "embedding_B"))]
    assert drawn
    differ = [not np.array_equal(a.params[n], other.params[n]) for n in drawn]
    assert all(differ) or option.split("-")[-1] in ("pissa", "olora") or "olora" in option  # these depend on W


@everywhere
def test_several_adapters(option: str, layer: str) -> None:
    """L4: LoRA's add up, W′ = W + Σ (W′ₖ − W), in any order. D5: DoRA's order matters. Running ≡ merged for all."""
    model = model_of(layer)
    adapters = [trained(fresh(model, option, layer, seed, bias="none", modules_to_save=None), seed) for seed in (1, 2)]
    out, _ = model(IDS, adapters)
    merged = refpeft.merge(model, adapters)
    same(merged(IDS)[0], out)
    if "dora" in option:
        assert np.abs(model(IDS, adapters[::-1])[0] - out).max() > 1e-3
        return
    same(model(IDS, adapters[::-1])[0], out)
    one, two = (refpeft.merge(model, a).params for a in adapters)
    for name, tensor in merged.params.items():
        # an untied head starts from the embedding, and a bias that was not there from zero
        base = model.params.get(name, 0 if name.endswith("bias") else model.params.get("transformer.wte.weight"))
        same(tensor, one[name] + two[name] - base)


def test_a_second_dora_rescales_what_the_first_one_made_by_the_norm_it_has_over_the_base() -> None:
    """D5: W″ = diag(g₂) (W′ + s₂ B₂ A₂), g₂ = m₂/‖W + s₂ B₂ A₂‖, computed row by row."""
    W, m = rng.normal(size=(5, 4)), [rng.uniform(1, 2, 5) for _ in range(2)]
    A, B = ([rng.normal(size=shape) for _ in range(2)] for shape in ((3, 4), (5, 3)))
    cfg = dora.Config(r=3, lora_alpha=6)
    first, _, _ = dora.merge(cfg, W, None, {"A": A[0], "B": B[0], "m": m[0]})
    second, _, _ = dora.merge(cfg, first, None, {"A": A[1], "B": B[1], "m": m[1]}, (W, None))
    for o in range(5):
        V1, V2 = (W[o] + 2 * (B[k] @ A[k])[o] for k in range(2))
        W1 = m[0][o] / np.linalg.norm(V1) * V1
        same(second[o], m[1][o] / np.linalg.norm(V2) * (W1 + 2 * (B[1] @ A[1])[o]))


MIXES = [
    ("lora", "dora"),
    ("dora", "lora-bias"),
    ("dora", "dora-norm-differentiated", "rslora"),
    ("pissa", "dora-pissa"),
]


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
@pytest.mark.parametrize("layer", ["linear", "conv1d", "tied-head"])
def test_adapters_of_different_methods_mix(mix: tuple[str, ...], layer: str) -> None:
    model = model_of(layer)
    adapters = [trained(fresh(model, option, layer, k, bias="none"), k) for k, option in enumerate(mix)]
    assert max(refpeft.check_model(model, IDS, adapters, base=True).values()) <= EXACT
    out, vjp = model(IDS, adapters)
    same(refpeft.merge(model, adapters)(IDS)[0], out)
    assert [set(g) for g in vjp(out)] == [set(a.params) for a in adapters]


@pytest.mark.parametrize("option", ["lora", "lora-bias", "pissa", "rslora", "dora", "dora-norm-differentiated"])
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_dropout_with_its_mask_as_an_argument(option: str, layer: str) -> None:
    """Gradients are exact under masks; a mask of ones is no mask; a mask changes the adapter's branch only."""
    model = model_of(layer)
    adapter = trained(fresh(model, option, layer))
    site = next(s for s in model.sites.values() if s.path + ".lora_A.weight" in adapter.params)
    ones = np.ones((*IDS.shape, adapter.params[site.path + ".lora_A.weight"].shape[1]))
    drawn = rng.integers(0, 2, ones.shape) * 2.0
    dropped = adapter.replace(masks={site.path: drawn})
    assert max(refpeft.check_model(model, IDS, dropped, base=True).values()) <= EXACT
    same(model(IDS, adapter.replace(masks={site.path: ones}))[0], model(IDS, adapter)[0])
    assert np.abs(model(IDS, dropped)[0] - model(IDS, adapter)[0]).max() > 1e-3


@everywhere
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_a_16_bit_base_keeps_its_dtype_under_a_float32_adapter(option: str, layer: str, half: Any) -> None:
    model = model_of(layer, dtype=half)
    adapter = fresh(model, option, layer, bias="none", modules_to_save=None)
    assert {v.dtype for v in [*adapter.params.values(), *adapter.frozen.values()]} == {np.dtype(np.float32)}
    out, vjp = model(IDS, trained(adapter))
    grads = vjp(np.ones_like(out))
    assert out.dtype == half
    assert {v.dtype for v in refpeft.merge(model, trained(adapter)).params.values()} == {np.dtype(half)}
    assert {d.dtype for d in grads.values()} == {np.dtype(np.float32)}


@everywhere
def test_float32_stays_float32(option: str, layer: str) -> None:
    model = model_of(layer, dtype=np.float32)
    adapter = trained(fresh(model, option, layer))
    out, vjp = model(IDS, adapter)
    grads, base = vjp(out, base=True)
    merged = refpeft.merge(model, adapter).params
    found = {v.dtype for v in [out, *adapter.params.values(), *grads.values(), *base.values(), *merged.values()]}
    assert found == {np.dtype(np.float32)}


# ── one layer, written out ───────────────────────────────────────────────────────────────────────────────────────────

o, i, r = 5, 4, 2
W, b, x = rng.normal(size=(o, i)), rng.normal(size=o), rng.normal(size=(2, 3, i))
φ0 = {"A": rng.normal(size=(r, i)), "B": rng.normal(size=(o, r))}


def part(kind: str = "linear", W: Array = W, b: Array | None = b) -> Part:
    return make("layer", kind, W, b, (BASE, "W"), (BASE, "b"))


def run(method: str, φ: dict[str, Array], where: Part, x: Array, mask: Array | None = None, **config: Any) -> Any:
    """y and every gradient of one wrapped layer, by name, with dy = y."""
    cfg = METHODS[method].Config(**{"r": r, "lora_alpha": 3, **config})
    keys = {name: (0, name) for name in φ}
    y, back = METHODS[method].wrap(cfg, Phi(φ, keys), where, mask).run(x)
    want = {*keys.values(), where.W_key, where.b_key}
    dx, grads = back(lambda: y, want)
    return y, {name: d() for (_, name), d in grads.items()}, dx


def merged(method: str, φ: dict[str, Array], **config: Any) -> tuple[Array, Array]:
    cfg = METHODS[method].Config(**{"r": r, "lora_alpha": 3, **config})
    W1, b1, _ = METHODS[method].merge(cfg, W, b, φ)
    return W1, b1


def rows_norm(V: Array) -> Array:
    return np.linalg.norm(V, axis=1)


def test_lora_with_dropout_is_what_the_docstring_says() -> None:
    mask = rng.integers(0, 2, x.shape) * 2.0
    β = rng.normal(size=o)
    y, _, _ = run("lora", φ0 | {"β": β}, part(), x, mask, lora_bias=True)
    same(y, x @ W.T + b + 3 / r * ((x * mask) @ φ0["A"].T @ φ0["B"].T + β))


def test_dora_with_dropout_is_what_the_docstring_says() -> None:
    """D2 says what holds without dropout; with it the base's own term keeps the undropped input."""
    mask = rng.integers(0, 2, x.shape) * 2.0
    m, s = 1 + rng.random(o), 3 / r
    y, _, _ = run("dora", φ0 | {"m": m}, part(), x, mask)
    g = m / rows_norm(W + s * φ0["B"] @ φ0["A"])
    x̃ = x * mask
    same(y, x @ W.T + b + (g - 1) * (x̃ @ W.T) + g * (s * x̃ @ φ0["A"].T @ φ0["B"].T))


def test_lora_is_linear_in_alpha_and_only_s_enters() -> None:
    """L3"""
    base, _ = merged("lora", φ0)
    for c in (-2.0, 0.0, 0.5, 4.0):
        same(merged("lora", φ0, lora_alpha=3 * c)[0] - W, c * (base - W))
    zeros = {"A": np.vstack([φ0["A"], np.ones((r, i))]), "B": np.hstack([φ0["B"], np.zeros((o, r))])}
    same(merged("lora", zeros, r=2 * r, lora_alpha=6)[0], base)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "patterns"])
def test_conv1d_is_linear_stored_the_other_way_round(option: str) -> None:
    """L5: outputs and gradients are the same; A and B keep their shapes."""
    method, options = OPTIONS[option]
    cfg = METHODS[method].Config(r=r, **options)
    φ = METHODS[method].init(cfg, part(), np.random.default_rng(1))
    φ_conv = METHODS[method].init(cfg, part("conv1d"), np.random.default_rng(1))
    assert {n: v.shape for n, v in φ.items()} == {n: v.shape for n, v in φ_conv.items()}
    φ = {name: v + 0.1 for name, v in φ.items()}
    y, grads, dx = run(method, φ, part(), x, **options)
    y2, grads2, dx2 = run(method, φ, part("conv1d"), x, **options)
    np.testing.assert_array_equal(y2, y)
    np.testing.assert_array_equal(dx2(), dx())
    np.testing.assert_array_equal(grads2.pop("W"), grads.pop("W").T)
    assert all(np.array_equal(grads2[name], grads[name]) for name in grads)


@pytest.mark.parametrize("method", LORA)
def test_an_embedding_is_linear_on_one_hot_rows(method: str) -> None:
    """L5, D6: A is [r, v], B is [d, r], ΔE = s (B A)ᵀ; DoRA has one magnitude per column of E."""
    ids = np.array([[0, 3, 3], [2, 1, 0]])
    φ = φ0 | {"m": 1 + rng.random(o)} if method == "dora" else φ0
    y, grads, _ = run(method, φ, part("embedding", b=None), ids)
    y2, grads2, _ = run(method, φ, part(b=None), np.eye(i)[ids])
    same(y, y2)
    same(grads.pop("W"), grads2.pop("W").T)
    for name in grads:
        same(grads[name], grads2[name])


def test_dora_on_an_embedding_takes_the_norm_over_the_vocabulary() -> None:
    """D6"""
    model = tiny("gpt2")
    adapter = refpeft.init("dora", {"r": 2, "target_modules": ["wte"]}, model)
    m = adapter.params["transformer.wte.lora_magnitude_vector"]
    same(m, np.linalg.norm(model.params["transformer.wte.weight"], axis=0))


def test_rslora_is_lora_with_another_alpha() -> None:
    """R1: α √r for α, in outputs, gradients and merge."""
    α = 3 * np.sqrt(r)
    y, grads, dx = run("rslora", φ0, part(), x)
    y2, grads2, dx2 = run("lora", φ0, part(), x, lora_alpha=α)
    same(y, y2)
    same(dx(), dx2())
    assert all(np.allclose(grads[n], grads2[n], rtol=EXACT) for n in grads2)
    same(merged("rslora", φ0)[0], merged("lora", φ0, lora_alpha=α)[0])
    a, c = (
        METHODS[name].init(METHODS[name].Config(r=r), part(), np.random.default_rng(1)) for name in ("rslora", "lora")
    )
    assert all(np.array_equal(a[n], c[n]) for n in c)


def test_rslora_at_rank_1_is_lora() -> None:
    """R2"""
    φ = {"A": φ0["A"][:1], "B": φ0["B"][:, :1]}
    np.testing.assert_array_equal(run("rslora", φ, part(), x, r=1)[0], run("lora", φ, part(), x, r=1)[0])


def test_rslora_keeps_the_size_of_the_update_as_the_rank_grows() -> None:
    """The paper's reason for √r: with A and B of unit entries, ‖ΔW‖ does not depend on r, while LoRA's shrinks."""
    draw = np.random.default_rng(5)
    sizes: dict[str, list[float]] = {"rslora": [], "lora": []}
    for rank in (4, 256):
        φ = {"A": draw.normal(size=(rank, i)), "B": draw.normal(size=(o, rank))}
        for method, found in sizes.items():
            found.append(float(np.linalg.norm(merged(method, φ, r=rank)[0] - W)))
    assert 0.5 < sizes["rslora"][1] / sizes["rslora"][0] < 2
    assert sizes["lora"][1] / sizes["lora"][0] < 0.25


def test_dora_at_init() -> None:
    """D1: m = ‖V‖ row by row, W′ = W to the bit."""
    φ = dora.init(dora.Config(r=r), part(), np.random.default_rng(1))
    same(φ["m"], rows_norm(W))
    np.testing.assert_array_equal(merged("dora", φ)[0], W)


@pytest.mark.parametrize("detach", [True, False])
def test_a_row_of_zeros_stays_one_under_dora(detach: bool) -> None:
    """D1: it has no direction; its outputs are its bias, and all gradients are finite."""
    W0 = W * (np.arange(o) != 2)[:, None]
    where = part(W=W0)
    φ = dora.init(dora.Config(r=r), where, np.random.default_rng(1))
    assert φ["m"][2] == 0
    y, grads, dx = run("dora", φ, where, x, detach_norm=detach)
    same(y, x @ W0.T + b)
    assert all(np.isfinite(d).all() for d in [*grads.values(), dx()])
    assert not dora.merge(dora.Config(r=r), W0, b, φ)[0][2].any()


@pytest.mark.parametrize("detach", [True, False])
def test_rows_of_dora_have_the_norms_m(detach: bool) -> None:
    """D3, also for negative magnitudes"""
    m = rng.normal(size=o)
    same(rows_norm(merged("dora", φ0 | {"m": m}, detach_norm=detach)[0]), np.abs(m))


def test_doubling_the_magnitude_doubles_the_weight_and_not_the_bias() -> None:
    """D4"""
    m = rng.normal(size=o)
    (W1, b1), (W2, b2) = (merged("dora", φ0 | {"m": c * m}) for c in (1, 2))
    same(W2, 2 * W1)
    np.testing.assert_array_equal(b1, b)
    np.testing.assert_array_equal(b2, b)


def test_the_two_readings_of_dora_differ_in_gradients_only() -> None:
    φ = φ0 | {"m": 1 + rng.random(o)}
    (y, grads, _), (y2, grads2, _) = (run("dora", φ, part(), x, detach_norm=detach) for detach in (True, False))
    np.testing.assert_array_equal(y, y2)
    same(grads["m"], grads2["m"])
    assert np.abs(grads["A"] - grads2["A"]).max() > 1e-3
    along = (grads2["W"] * (W + 1.5 * φ0["B"] @ φ0["A"])).sum(
        1
    )  # scaling a row of V changes nothing: no gradient along it
    same(along, np.zeros(o))


def test_a_detached_norm_is_a_constant() -> None:
    """The gradient is that of diag(m/n) V with n a number: the definition, without the rule."""
    m, s, G = 1 + rng.random(o), 1.5, rng.normal(size=(o, i))
    n = rows_norm(W + s * φ0["B"] @ φ0["A"])
    _, _, vjp = dora.merge(dora.Config(r=r, lora_alpha=3), W, b, φ0 | {"m": m})
    dW, d = vjp(lambda: G, lambda: b)
    same(dW(), (m / n)[:, None] * G)
    same(d["A"](), s * φ0["B"].T @ ((m / n)[:, None] * G))


# ── initialisation ───────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(kind: str = "linear", W: Array = W, **config: Any) -> dict[str, Array]:
    return lora.init(lora.Config(**{"r": r, **config}), part(kind, W), np.random.default_rng(1))


def test_the_default_is_kaiming_uniform() -> None:
    A = drawn(W=np.ones((3, 100)), r=50)["A"]
    assert np.abs(A).max() <= 0.1
    assert abs(A.std() * np.sqrt(3) - 0.1) < 0.003
    assert not drawn()["B"].any()


def test_gaussian_has_deviation_1_over_r() -> None:
    A = drawn(W=np.ones((3, 500)), r=20, init_lora_weights="gaussian")["A"]
    assert abs(A.std() - 1 / 20) < 0.003
    assert not drawn(init_lora_weights="gaussian")["B"].any()


def test_orthogonal_factors_cancel_without_being_zero() -> None:
    φ = drawn(init_lora_weights="orthogonal")
    assert np.abs(φ["A"]).max() > 1e-3
    assert np.abs(φ["B"]).max() > 1e-3
    same(φ["B"] @ φ["A"], np.zeros((o, i)), 1e-13)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_starts_from_the_best_approximation_of_w(use_rslora: bool) -> None:
    """What is left of W has the singular values that were not taken (Eckart and Young)."""
    cfg = lora.Config(r=r, lora_alpha=3, use_rslora=use_rslora, init_lora_weights="pissa")
    φ = lora.init(cfg, part(), np.random.default_rng(1))
    left = np.linalg.svd(W - cfg.scale * φ["B"] @ φ["A"], compute_uv=False)
    same(left[: min(o, i) - r], np.linalg.svd(W, compute_uv=False)[r:])


def test_olora_starts_from_the_qr_of_w() -> None:
    φ = drawn(init_lora_weights="olora")
    same(φ["B"].T @ φ["B"], np.eye(r))
    same(φ["B"] @ φ["A"][:, :r], W[:, :r])  # the first r columns of W are Q R of their own


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_what_pissa_and_olora_mean_after_training(how: str) -> None:
    """W′ = W + s (B A − B₀ A₀), which is the plain LoRA of rank 2r with A ← [A; A₀], B ← [B, −B₀] and the same s."""
    φ = drawn(init_lora_weights=how)
    φ |= {"A": φ["A"] + rng.normal(size=(r, i)), "B": φ["B"] + rng.normal(size=(o, r))}
    W1, _ = merged("lora", φ)
    same(W1, W + 1.5 * (φ["B"] @ φ["A"] - φ["B0"] @ φ["A0"]))
    plain = {"A": np.vstack([φ["A"], φ["A0"]]), "B": np.hstack([φ["B"], -φ["B0"]])}
    same(merged("lora", plain, r=2 * r, lora_alpha=6)[0], W1)


def test_companions_are_not_trained() -> None:
    model = model_of("conv1d")
    adapter = fresh(model, "pissa", "conv1d")
    assert {name.rpartition(".lora_")[2] for name in adapter.frozen} == {"A0.weight", "B0.weight"}
    out, vjp = model(IDS, adapter)
    assert not set(vjp(out)) & set(adapter.frozen)


REFUSED = [
    ({"r": 0}, "r must be a positive integer, found 0"),
    ({"r": 2.0}, "r must be .*int.*, found 2.0"),
    ({"r": True}, "r must be .*int.*, found True"),
    ({"rank_pattern": {"c_attn": -1}}, "rank_pattern.*c_attn.* must be a positive integer, found -1"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights must be one of .*, found 'loftq'"),
    ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', found 'some'"),
    ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), found 1.0"),
    ({"rank": 3}, "lora has no config field 'rank'"),
    ({"init_lora_weights": "orthogonal", "r": 3}, "c_attn: .* needs an even rank, found 3"),
    ({"init_lora_weights": "pissa", "r": 17}, "needs r ≤ 16, found 17"),
    ({"init_lora_weights": "olora", "target_modules": ["wte"]}, "wte: .*not for embeddings"),
    ({"lora_bias": True, "target_modules": ["wte"]}, "wte: lora_bias is not defined for an embedding"),
    ({"target_modules": ["q_proj"]}, "matches no module of the model, which has c_attn"),
    ({"target_modules": ["ln_1"]}, "ln_1, a layer_norm, which has no matrix"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_what_makes_no_sense_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refpeft.init("lora", config, tiny("gpt2"))


def test_dora_refuses_lora_bias() -> None:
    with pytest.raises(ValueError, match="lora_bias is not defined for DoRA"):
        refpeft.init("dora", {"lora_bias": True}, tiny("gpt2"))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'loar': there are lora, rslora, dora"):
        refpeft.init("loar", {}, tiny("gpt2"))


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_claim_of_every_docstring_is_tested() -> None:
    """A claim's label (L1, D3, …) stands in the docstring of a test here, or in a test file of its method's own."""
    cited = " ".join(
        ast.get_docstring(f) or ""
        for path in Path(__file__).parent.glob("test_*.py")
        for f in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")
    )
    for name, method in METHODS.items():
        labels = re.findall(r"^    ([A-Z]+\d+) ", method.__doc__ or "", re.M)
        assert labels, f"{name} claims nothing"
        assert [label for label in labels if not re.search(rf"\b{label}\b", cited)] == []
