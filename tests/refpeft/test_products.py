"""DyLoRA, LoHa, LoKr, GLoRA, OFT and BOFT: the claims of their docstrings, and what they refuse."""

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy.linalg import expm

import refpeft
from refpeft import METHODS, Adapter, Model
from refpeft.method import Phi
from refpeft.methods import boft, lokr, oft
from refpeft.part import Part
from refpeft.rotations import cayley, cayley_series, rotate, skew
from tests.models import tiny
from tests.refpeft.equal import EXACT, Array, moved, same, wrap_is_merge

IDS = np.random.default_rng(0).integers(0, 29, (2, 6))
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dylora": ("dylora", {"r": 4, "rank": 2, "alpha": 5, "block_size": 2}),
    "dylora-all": ("dylora", {"r": 3, "alpha": 5}),
    "loha": ("loha", {"r": 2, "alpha": 5}),
    "loha-patterns": ("loha", {"r": 2, "rank_pattern": {"c_attn": 3, "q_proj": 1}, "alpha_pattern": {"q.*": 7}}),
    "loha-random": ("loha", {"r": 2, "init_weights": False}),
    "loha-cores": ("loha", {"r": 2, "alpha": 5, "taps": 2}),
    "lokr": ("lokr", {"r": 1, "alpha": 5}),
    "lokr-full": ("lokr", {"r": 16, "alpha": 5}),
    "lokr-unscaled": ("lokr", {"r": 16, "alpha": 5, "scale_full": False}),
    "lokr-both": ("lokr", {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr-factor": ("lokr", {"r": 2, "decompose_factor": 2}),
    "lokr-lycoris": ("lokr", {"r": 1, "init_weights": "lycoris"}),
    "lokr-random": ("lokr", {"r": 1, "init_weights": False}),
    "glora": ("glora", {"r": 2, "alpha": 5}),
    "glora-patterns": (
        "glora",
        {"r": 2, "rank_pattern": {"c_attn": 3}, "alpha_pattern": {"q.*": 7}, "use_rslora": True},
    ),
    "glora-random": ("glora", {"r": 2, "init_weights": False}),
    "oft": ("oft", {"oft_block_size": 4}),
    "oft-blocks": ("oft", {"oft_block_size": 0, "r": 3}),
    "oft-terms": ("oft", {"oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    "oft-exact": ("oft", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft-shared": ("oft", {"oft_block_size": 4, "block_share": True}),
    "oft-output": ("oft", {"oft_block_size": 4, "use_cayley_neumann": False, "side": "output"}),
    "boft": ("boft", {}),
    "boft-butterflies": ("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
    "boft-blocks": ("boft", {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 2}),
    "boft-random": ("boft", {"init_weights": False}),
    "boft-output": (
        "boft",
        {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 2, "side": "output"}
        | {"exclude_modules": ["classifier", "lm_head"]},  # of 3 and 29 outputs
    ),
    "oft-output-shared": ("oft", {"oft_block_size": 8, "block_share": True, "side": "output"}),
}
LAYERS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "linear": ("llama", None, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "linear-with-bias": ("bert", "ForSequenceClassification", {"target_modules": "all-linear"}),
    "conv1d": ("gpt2", None, {"target_modules": ["c_attn", "mlp.c_proj"], "modules_to_save": ["ln_f"]}),
    "embedding": ("gpt2", None, {"target_modules": ["wte", "wpe", "c_attn"]}),
    "tied-head": ("gpt2", None, {"target_modules": ["lm_head", "c_fc"]}),
}


def defined(option: str, layer: str) -> bool:
    """BOFT is refused on embeddings, and taps that do not divide the vocabulary (tested below)."""
    if option == "loha-cores" and layer in ("embedding", "tied-head"):
        return False
    return layer != "embedding" or not option.startswith("boft")


COMBINATIONS = [(o, layer) for o in OPTIONS for layer in LAYERS if defined(o, layer)]
everywhere = pytest.mark.parametrize(("option", "layer"), COMBINATIONS, ids=["-on-".join(c) for c in COMBINATIONS])
always = pytest.mark.parametrize("option", OPTIONS)


def model_of(layer: str, **options: Any) -> Model:
    family, architecture, _ = LAYERS[layer]
    return tiny(family, architecture, **options)


def fresh(model: Model, option: str, layer: str, seed: int = 0, **config: Any) -> Adapter:
    method, options = OPTIONS[option]
    return refpeft.init(method, {**LAYERS[layer][2], **options, **config}, model, seed)


def values(option: str, o: int = 6, i: int = 12, seed: int = 0, **config: Any) -> tuple[Any, Any, Part, dict[str, Any]]:
    """Method, config, a linear layer [o, i] with a bias, and parameters that were moved."""
    from refpeft.part import BASE, make

    method, options = OPTIONS[option]
    rng = np.random.default_rng(seed)
    part = make("layer", "linear", rng.normal(size=(o, i)), rng.normal(size=o), (BASE, "W"), (BASE, "b"))
    m = METHODS[method]
    cfg = m.Config(**options | config).at("layer")
    φ = {n: v + 0.3 * rng.normal(size=v.shape) for n, v in m.init(cfg, part, rng).items()}
    return m, cfg, part, φ


def merged(option: str, seed: int = 0, **config: Any) -> tuple[Array, Array]:
    """W and W′"""
    m, cfg, part, φ = values(option, seed=seed, **config)
    return part.W, m.merge(cfg, part.W, part.b, φ)[0]


# ── what holds for all of them ───────────────────────────────────────────────────────────────────────────────────────


@everywhere
def test_gradients_are_exact(option: str, layer: str) -> None:
    """Of the adapter and of the whole base under it."""
    model = model_of(layer)
    adapter = moved(fresh(model, option, layer))
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT


@everywhere
def test_wrap_is_merge(option: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DY2, LH2, LK2, GL2, OF2, BO2: outputs of the run-time form and the merged model, and gradients of both forms."""
    model = model_of(layer)
    adapter = moved(fresh(model, option, layer))
    wrap_is_merge(model, adapter, IDS, monkeypatch)


@everywhere
def test_a_fresh_adapter_changes_nothing(option: str, layer: str) -> None:
    """DY1, LH1, LK1, GL1, OF1, BO1: not a bit, merged or not."""
    model = model_of(layer)
    adapter = fresh(model, option, layer)
    out, merged = model(IDS)[0], refpeft.merge(model, adapter)
    if option.endswith("random"):
        assert np.abs(model(IDS, adapter)[0] - out).max() > 1e-3
        return
    np.testing.assert_array_equal(model(IDS, adapter)[0], out)
    assert all(np.array_equal(merged.params[n], v) for n, v in model.params.items() if n in merged.params)
    grads = model(IDS, adapter)[1](np.ones_like(out))
    assert any(np.abs(d).max(initial=0) > 1e-9 for d in grads.values())


@always
def test_several_adapters(option: str) -> None:
    """DY6, LH5, LK5, GL6: they add up in any order; OF6, BO7: rotations compose, W R₁ᵀ R₂ᵀ, in this order."""
    model = model_of("linear-with-bias")
    a, b = (moved(fresh(model, option, "linear-with-bias", seed=s), seed=s + 5) for s in (0, 1))
    out = model(IDS, [a, b])[0]
    same(refpeft.merge(model, [a, b])(IDS)[0], out)
    gap = np.abs(refpeft.merge(refpeft.merge(model, a), b)(IDS)[0] - out).max()
    assert gap > 1e-3 if a.method == "glora" else gap < EXACT * 10
    assert max(d for found in [refpeft.check_model(model, IDS, [a, b], base=True)] for d in found.values()) <= EXACT
    gap = np.abs(model(IDS, [b, a])[0] - out).max()
    assert gap > 1e-3 if "oft" in a.method else gap < EXACT * 10


@pytest.mark.parametrize("option", ["oft", "oft-output", "boft", "boft-output"])
def test_beside_other_methods(option: str) -> None:
    """OF6: what is turned is all that came before, a LoRA with its bias too; and a LoRA on top is not turned."""
    model = model_of("linear-with-bias")
    low = moved(refpeft.init("lora", {**LAYERS["linear-with-bias"][2], "r": 2, "lora_bias": True}, model))
    turned = moved(fresh(model, option, "linear-with-bias"))
    for pair in ([low, turned], [turned, low], [turned, low, turned]):
        same(refpeft.merge(model, pair)(IDS)[0], model(IDS, pair)[0])
        assert max(refpeft.check_model(model, IDS, pair, base=True).values()) <= EXACT


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "option",
    ["loha", "loha-cores", "lokr", "glora", "oft", "oft-output", "boft-butterflies", "boft-output"],
)
def test_a_layer_of_16_bits_stays_one(option: str, dtype: Any) -> None:
    layer = "embedding" if defined(option, "embedding") else "conv1d"
    model = model_of(layer, dtype=dtype)
    adapter = moved(fresh(model, option, layer, modules_to_save=None))
    assert {a.dtype for a in adapter.params.values()} == {np.dtype(np.float32)}
    out, vjp = model(IDS, adapter)
    assert out.dtype == dtype
    assert {a.dtype for a in refpeft.merge(model, adapter).params.values()} == {np.dtype(dtype)}
    wide = model.astype(np.float64)
    grads, exact = vjp(np.ones_like(out)), wide(IDS, adapter)[1](np.ones(out.shape))
    for name, d in grads.items():
        assert np.abs(d - exact[name]).max() < 0.2 * np.abs(exact[name]).max()


# ── LoHa and LoKr ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("option", ["loha", "loha-cores", "lokr", "lokr-full", "glora"])
def test_only_the_scale_enters(option: str) -> None:
    """LH3, LK4, GL3: ΔW is linear in α."""
    W, W1 = merged(option, alpha=3)
    _, W2 = merged(option, alpha=6)
    same(W2 - W, 2 * (W1 - W))


def test_only_the_scale_enters_full_factors() -> None:
    """LK4: α/r though nothing has that rank; with `scale_full` off, 1, whatever α is."""
    W, W1 = merged("lokr-full", alpha=32)
    _, W2 = merged("lokr-unscaled", alpha=32)
    _, W3 = merged("lokr-unscaled", alpha=7)
    same(W1 - W, 2 * (W2 - W))
    np.testing.assert_array_equal(W3, W2)


def test_loha_by_entries() -> None:
    """ΔW_jk = s (Σ_r B₁ A₁)(Σ_r B₂ A₂), entry by entry."""
    m, cfg, part, φ = values("loha")
    W1, b1, _ = m.merge(cfg, part.W, part.b, φ)
    for j in range(6):
        for k in range(12):
            P, Q = (sum(φ[f"B{n}"][j, t] * φ[f"A{n}"][t, k] for t in range(2)) for n in (1, 2))
            assert W1[j, k] - part.W[j, k] == pytest.approx(2.5 * P * Q, abs=1e-13)
    assert b1 is part.b


def test_loha_with_cores_by_entries() -> None:
    """ΔW_oik = s (Σ_ab T₁_abk B₁_ao A₁_bi)(Σ_ab T₂_abk B₂_ao A₂_bi), entry by entry."""
    m, cfg, part, φ = values("loha-cores", taps=3)
    assert {n: v.shape for n, v in φ.items()} == {
        n + t: shape for n, shape in {"T": (2, 2, 3), "B": (2, 6), "A": (2, 4)}.items() for t in "12"
    }
    W1 = m.merge(cfg, part.W, part.b, φ)[0]
    pairs = [(a, b) for a in range(2) for b in range(2)]
    for o, i, k in np.ndindex(6, 4, 3):
        P, Q = (sum(φ[f"T{n}"][a, b, k] * φ[f"B{n}"][a, o] * φ[f"A{n}"][b, i] for a, b in pairs) for n in (1, 2))
        assert W1[o, 3 * i + k] - part.W[o, 3 * i + k] == pytest.approx(2.5 * P * Q, abs=1e-12)


def test_loha_with_cores_that_are_the_identity() -> None:
    """LH7"""
    m, cfg, _, φ = values("loha-cores", taps=3)
    φ |= {n: np.repeat(np.eye(2)[:, :, None], 3, axis=2) for n in ("T1", "T2")}
    plain = {"B1": φ["B1"].T, "A1": φ["A1"], "B2": φ["B2"].T, "A2": φ["A2"]}
    Δ = m.merge(m.Config(r=2, alpha=5), np.zeros((6, 4)), None, plain)[0]
    same(m.merge(cfg, np.zeros((6, 12)), None, φ)[0].reshape(6, 4, 3), np.repeat(Δ[:, :, None], 3, axis=2))


def test_loha_reaches_the_square_of_its_rank() -> None:
    """LH4"""
    W, W1 = merged("loha", r=2)
    assert np.linalg.matrix_rank(W1 - W) == 4


def test_loha_of_ones_is_lora() -> None:
    """LH6"""
    m, cfg, part, φ = values("loha")
    φ |= {"B2": np.full_like(φ["B2"], 0.5), "A2": np.ones_like(φ["A2"])}
    lora = METHODS["lora"]
    expected = lora.merge(lora.Config(r=2, lora_alpha=5), part.W, part.b, {"B": φ["B1"], "A": φ["A1"]})[0]
    same(m.merge(cfg, part.W, part.b, φ)[0], expected)


@pytest.mark.parametrize("option", ["lokr", "lokr-full", "lokr-both", "lokr-factor"])
def test_lokr_is_numpys_kron(option: str) -> None:
    m, cfg, part, φ = values(option, o=16, i=24)
    C = φ["C"] if "C" in φ else φ["Cb"] @ φ["Ca"]
    D = φ["D"] if "D" in φ else φ["B"] @ φ["A"]
    same(m.merge(cfg, part.W, part.b, φ)[0], part.W + cfg.alpha / cfg.r * np.kron(C, D))


def test_lokr_has_the_rank_of_both_factors() -> None:
    """LK3: C [2, 3] has rank 2, D rank 1."""
    W, W1 = merged("lokr", r=1)
    assert np.linalg.matrix_rank(W1 - W) == 2


def test_lokr_of_primes() -> None:
    """LK6"""
    m, cfg, part, φ = values("lokr", o=5, i=7)
    assert φ["C"].shape == (1, 1)
    same(m.merge(cfg, part.W, part.b, φ)[0], part.W + 5 * φ["C"][0, 0] * (φ["B"] @ φ["A"]))


@pytest.mark.parametrize(
    ("n", "factor", "expected"),
    [(128, -1, (8, 16)), (127, -1, (1, 127)), (360, 16, (15, 24)), (250, 4, (2, 125)), (1024, 4, (4, 256)),
     (12, 6, (6, 2)), (12, 5, (3, 4)), (1, -1, (1, 1))],
)  # fmt: skip
def test_divisors(n: int, factor: int, expected: tuple[int, int]) -> None:
    assert lokr.divisors(n, factor) == expected


# ── DyLoRA ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("option", ["dylora", "dylora-all"])
def test_dylora_is_the_lora_of_its_first_ranks(option: str) -> None:
    """DY3"""
    m, cfg, part, φ = values(option)
    b, lora = {"dylora": 2, "dylora-all": 3}[option], METHODS["lora"]
    few = {"A": φ["A"][:b], "B": φ["B"][:, :b]}
    expected = lora.merge(lora.Config(r=b, lora_alpha=5), part.W, part.b, few)[0]
    same(m.merge(cfg, part.W, part.b, φ)[0], expected)


def test_ranks_that_are_not_in_play_have_no_influence_and_no_gradient() -> None:
    """DY4"""
    model = model_of("linear")
    adapter = moved(fresh(model, "dylora", "linear"))
    out, vjp = model(IDS, adapter)
    grads, last = vjp(np.ones_like(out)), {"A": np.s_[2:], "B": np.s_[:, 2:]}
    for name, d in grads.items():
        place = last[name.split(".lora_")[1][0]]
        assert not d[place].any()
        other = adapter.params[name].copy()
        other[place] += 1
        np.testing.assert_array_equal(model(IDS, adapter.replace(params={**adapter.params, name: other}))[0], out)


def test_what_is_frozen_is_a_constant() -> None:
    """DY5: of ranks 0 … 3 in blocks of 2 the last block is trained, as it would be anyway."""
    model = model_of("linear")
    free = moved(fresh(model, "dylora", "linear", r=6, rank=4))
    frozen = free.replace(config=replace(free.config, frozen=True))
    (out, vjp), (out2, vjp2) = model(IDS, free), model(IDS, frozen)
    np.testing.assert_array_equal(out2, out)
    grads, grads2 = vjp(np.ones_like(out)), vjp2(np.ones_like(out))
    for name, d in grads2.items():
        axis = "AB".index(name.split(".lora_")[1][0])
        first, second, rest = np.split(d, [2, 4], axis)
        assert second.any()
        np.testing.assert_array_equal(second, np.split(grads[name], [2, 4], axis)[1])
        assert not first.any()
        assert not rest.any()


# ── GLoRA ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_glora_by_entries() -> None:
    """ΔW_jk = s (Σ_i W_ji A_ik + B_jk), entry by entry."""
    m, cfg, part, φ = values("glora")
    W1, b1, _ = m.merge(cfg, part.W, part.b, φ)
    for j in range(6):
        for k in range(12):
            A = [sum(φ["Au"][i, t] * φ["Ad"][t, k] for t in range(2)) for i in range(12)]
            B = sum(φ["Bu"][j, t] * φ["Bd"][t, k] for t in range(2))
            expected = 2.5 * (sum(part.W[j, i] * A[i] for i in range(12)) + B)
            assert W1[j, k] - part.W[j, k] == pytest.approx(expected, abs=1e-12)
    assert b1 is part.b


def test_glora_without_a_is_lora() -> None:
    """GL4"""
    m, cfg, part, φ = values("glora")
    lora = METHODS["lora"]
    expected = lora.merge(lora.Config(r=2, lora_alpha=5), part.W, part.b, {"B": φ["Bu"], "A": φ["Bd"]})[0]
    same(m.merge(cfg, part.W, part.b, {**φ, "Au": 0 * φ["Au"]})[0], expected)


def test_glora_without_b_is_the_layer_of_other_inputs() -> None:
    """GL5"""
    m, cfg, part, φ = values("glora")
    x = np.random.default_rng(3).normal(size=(2, 3, 12))
    moved_x = x + 2.5 * x @ (φ["Au"] @ φ["Ad"]).T
    same(m.wrap(cfg, Phi({**φ, "Bu": 0 * φ["Bu"]}, {}), part).run(x)[0], part.run(moved_x)[0])


def test_what_starts_at_zero_alone_gets_gradients_first() -> None:
    """GL1"""
    model = model_of("linear")
    adapter = fresh(model, "glora", "linear")
    out, vjp = model(IDS, adapter)
    grads = vjp(np.random.default_rng(0).normal(size=out.shape))
    assert {n.split(".")[-2] for n, d in grads.items() if d.any()} == {"a2", "b2"}


# ── OFT ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("p", [1, 2, 5])
def test_rotations_have_exact_gradients(p: int) -> None:
    rng = np.random.default_rng(p)
    v = rng.normal(size=(3, p * (p - 1) // 2))
    Q, R = skew(v)[0], rng.normal(size=(3, p, p))
    assert max(refpeft.check_op(cayley, Q), refpeft.check_op(skew, v) if p > 1 else 0) <= EXACT
    assert max(refpeft.check_op(cayley_series, Q, terms=t) for t in (4, 5, 9)) <= EXACT
    x = rng.normal(size=(2, 4, 3 * p))
    assert max(refpeft.check_op(rotate, x, R), refpeft.check_op(rotate, x, R[:1])) <= EXACT


def test_skew() -> None:
    """The upper triangle row by row."""
    np.testing.assert_array_equal(skew(np.array([[1.0, 2, 3]]))[0], [[[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]])


def test_cayley_turns_by_twice_the_arc_tangent() -> None:
    """In the plane, (I + Q)(I − Q)⁻¹ = exp(θ J) with θ = 2 arctan v, the paper's direction."""
    v = 0.7
    R = cayley(skew(np.array([[v]]))[0])[0][0]
    same(R, expm(2 * math.atan(v) * np.array([[0.0, 1], [-1, 0]])))


@pytest.mark.parametrize("option", ["oft-exact", "oft-output"])
def test_norms_and_angles_stay(option: str) -> None:
    """OF3: W W′ᵀ of inputs that are turned; of outputs, Wᵀ W."""
    W, W1 = merged(option)
    same(W1.T @ W1, W.T @ W) if option == "oft-output" else same(W1 @ W1.T, W @ W.T)
    assert np.abs(W1 - W).max() > 0.1
    _, cfg, _, φ = values(option)
    same(np.linalg.det(oft.rotation(cfg, φ)[0]), np.ones(len(next(iter(φ.values())))))


def test_minus_v_turns_back() -> None:
    """OF4"""
    m, cfg, part, φ = values("oft-exact")
    W1 = m.merge(cfg, part.W, part.b, φ)[0]
    same(m.merge(cfg, W1, part.b, {"v": -φ["v"]})[0], part.W)


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_the_series_approaches_the_exact_form(terms: int) -> None:
    """OF5"""
    Q = skew(0.1 * np.random.default_rng(0).normal(size=(2, 10)))[0]
    rest = np.linalg.matrix_power(Q, terms - 1)
    same(cayley(Q)[0] - cayley_series(Q, terms=terms)[0], cayley(Q)[0] @ rest, 1e-14)


def test_one_block_for_all() -> None:
    """OF7"""
    model = model_of("linear")
    one = moved(fresh(model, "oft-shared", "linear"))
    many = fresh(model, "oft", "linear")
    many = many.replace(params={n: np.repeat(one.params[n], len(v), axis=0) for n, v in many.params.items()})
    out, vjp = model(IDS, one)
    same(model(IDS, many)[0], out)
    grads = model(IDS, many)[1](np.ones_like(out))
    for name, d in vjp(np.ones_like(out)).items():
        same(d, grads[name].sum(0, keepdims=True))


@pytest.mark.parametrize(("size", "r", "p"), [(4, 0, 4), (5, 0, 4), (32, 0, 12), (0, 3, 4), (0, 5, 3), (0, 100, 1)])
def test_blocks_that_do_not_divide(size: int, r: int, p: int) -> None:
    """The nearest divisor of i = 12, of p or of the number of blocks; of two, the smaller."""
    _, _, _, φ = values("oft", oft_block_size=size, r=r)
    assert φ["v"].shape == (12 // p, p * (p - 1) // 2)


def test_the_bias_of_oft_only() -> None:
    model = model_of("linear-with-bias")
    adapter = fresh(model, "oft", "linear-with-bias", bias="oft_only", target_modules=["query"])
    assert {n for n in adapter.params if n.endswith("bias")} == {n for n in model.params if n.endswith("query.bias")}


# ── BOFT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def matrix_of(p: int, n: int, factors: int, seed: int = 0) -> Array:
    """M [i, i], by what W = I is merged to: Mᵀ."""
    rng, W = np.random.default_rng(seed), np.eye(p * n)
    cfg = boft.Config(boft_block_size=p, boft_n_butterfly_factor=factors)
    φ = {"A": rng.normal(size=(factors, n, p, p)), "s": np.ones((p * n, 1))}
    M: Array = boft.merge(cfg, W, None, φ)[0].T
    return M


def test_butterflies_mix_what_the_paper_says() -> None:
    """BO3, BO5: M is orthogonal, and full with 2^(m−1) p inputs; with a factor less it is not."""
    for factors, mixed in ((1, 2), (2, 4), (3, 8)):
        M = matrix_of(2, 4, factors)
        same(M @ M.T, np.eye(8))
        assert {int(c) for c in (np.abs(M) > 1e-9).sum(1)} == {mixed}


def test_the_second_factor_pairs_halves_of_neighbours() -> None:
    """B₁ by hand: of blocks a b | c d | e f | g h it turns (a, c), (b, d), (e, g) and (f, h)."""
    rng = np.random.default_rng(0)
    R = boft.rotation({"A": rng.normal(size=(2, 4, 2, 2))})[0]
    B1 = np.zeros((8, 8))
    for block, (j, k) in enumerate([(0, 2), (1, 3), (4, 6), (5, 7)]):
        B1[np.ix_([j, k], [j, k])] = R[1, block]
    x = rng.normal(size=(3, 8))
    same(boft.butterfly(x, R, [1])[0], x @ B1)


def test_one_factor_is_oft() -> None:
    """BO4"""
    m, cfg, part, φ = values("boft")
    i, j = np.triu_indices(4, 1)
    S = (φ["A"][0] - φ["A"][0].swapaxes(1, 2)) / 2
    turned = oft.Config(oft_block_size=4, use_cayley_neumann=False)
    expected = oft.merge(turned, part.W, part.b, {"v": -S[:, i, j]})[0]
    same(m.merge(cfg, part.W, part.b, {**φ, "s": np.ones((6, 1))})[0], expected)


def test_the_scale_doubles_the_weight_alone() -> None:
    """BO6"""
    m, cfg, part, φ = values("boft")
    W1, b1, _ = m.merge(cfg, part.W, part.b, φ)
    W2, b2, _ = m.merge(cfg, part.W, part.b, {**φ, "s": 2 * φ["s"]})
    same(W2, 2 * W1)
    assert b1 is b2 is part.b


def test_outputs_are_turned_as_inputs_of_the_transpose() -> None:
    """BO8: diag(s) M W, with the M of `turned` inputs; and what was not turned before is b."""
    m, cfg, part, φ = values("boft-output", o=8, i=6)
    turned = {"A": φ["C"], "s": np.ones((6, 1))}
    plain = boft.Config(boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=2)
    W1, b1, _ = m.merge(cfg, part.W, part.b, φ)
    same(W1, φ["s"] * m.merge(plain, part.W.T, None, turned)[0].T)
    assert b1 is part.b


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("loha", {"r": 0}, "r must be a positive integer, found 0"),
        ("loha", {"taps": 0}, "taps must be a positive integer, found 0"),
        ("loha", {"taps": 3}, r"q_proj: taps=3 must divide the 16 inputs"),
        ("loha", {"init_weights": "lycoris"}, r"init_weights must be one of \(True, False\), found 'lycoris'"),
        ("lokr", {"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] must be a positive integer, found -1"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor must be −1 or a positive integer, found 0"),
        ("lokr", {"init_weights": "other"}, "init_weights must be one of"),
        ("dylora", {"r": 4, "rank": 5}, "rank must be a multiple of block_size=1 from there to r=4, found 5"),
        ("dylora", {"r": 4, "rank": 1, "block_size": 2}, "rank must be a multiple of block_size=2 .*, found 1"),
        ("dylora", {"r": 4, "block_size": 3}, "block_size must be a positive integer that divides r=4, found 3"),
        ("glora", {"r": 0}, "r must be a positive integer, found 0"),
        ("glora", {"init_weights": "lycoris"}, r"init_weights must be one of \(True, False\), found 'lycoris'"),
        ("oft", {"r": 4}, "one of r and oft_block_size must be a positive integer and the other 0, found r=4"),
        ("oft", {"r": 0, "oft_block_size": 0}, "one of r and oft_block_size must be"),
        ("oft", {"num_cayley_neumann_terms": 3}, "num_cayley_neumann_terms must be at least 4, found 3"),
        ("oft", {"side": "left"}, r"side must be one of \('input', 'output'\), found 'left'"),
        ("oft", {"bias": "lora_only"}, "bias must be 'none', 'all' or 'oft_only', found 'lora_only'"),
        ("boft", {"boft_block_num": 2}, "one of boft_block_size and boft_block_num must be a positive integer"),
        ("boft", {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor must be from 1 to 32, found 0"),
        ("boft", {"boft_block_size": 3}, r"q_proj: boft_block_size must divide the 16 inputs, found 3"),
        ("boft", {"boft_n_butterfly_factor": 4}, "4 butterfly factors need an even block size and a number of blocks"),
        ("boft", {"target_modules": ["embed_tokens"]}, "embed_tokens: BOFT is defined for linear layers, not for emb"),
        ("boft", {"side": "left"}, r"side must be one of \('input', 'output'\), found 'left'"),
        ("boft", {"side": "output", "boft_block_size": 3}, "q_proj: boft_block_size must divide the 16 outputs, found"),
        ("boft", {"bias": "oft_only"}, "bias must be 'none', 'all' or 'boft_only', found 'oft_only'"),
        ("oft", {"coft": True}, "oft has no config field 'coft'"),
    ],
)
def test_bad_configs(method: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refpeft.init(method, config, tiny("llama"))
