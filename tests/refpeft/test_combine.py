"""Combinations of LoRA adapters: claims CO1–CO6 of `refpeft.combine`, and what it refuses. HF peft's: the stories."""

import re
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.adapter import Adapter
from refpeft.combine import HOW, PLAIN, average, combine
from refpeft.methods.lora import ΔW
from tests.models import tiny

MODEL = tiny("gpt2")
Found = dict[str, Any]


def lora(seed: int, method: str = "lora", **config: Any) -> Adapter:
    own = {"r": 2, "lora_alpha": 3.0, "target_modules": ["c_attn", "mlp.c_proj"], **config}
    own |= {"use_rslora": True} if method == "rslora" else {}
    fresh = refpeft.init(method, own, MODEL)
    rng = np.random.default_rng(seed)
    return fresh.replace(params={n: rng.normal(size=v.shape) for n, v in fresh.params.items()})


def deltas(a: Adapter) -> Found:
    """ΔW of each layer."""
    return {
        path: ΔW(a.at(path), {short: a.params[name] for short, name in names.items()})
        for path, (names, _) in a.by_module.items()
    }


def total(adapters: list[Adapter], weights: list[float]) -> Found:
    found: Found = {}
    for a, w in zip(adapters, weights, strict=True):
        for path, Δ in deltas(a).items():
            found[path] = found.get(path, 0) + w * Δ
    return found


def same(found: Found, wanted: Found) -> None:
    assert found.keys() == wanted.keys()
    for path, Δ in found.items():
        np.testing.assert_allclose(Δ, wanted[path], rtol=0, atol=1e-12 * np.abs(wanted[path]).max() + 1e-13)


def ones(k: int, name: str, T: Any) -> Any:
    return np.ones(T.shape, bool)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_cat_and_a_wide_svd_are_the_weighted_sum(method: str) -> None:
    """CO1, with patterns, unlike ranks, and layers that one of them has alone."""
    both = [
        lora(1, method, alpha_pattern={"c_attn": 7.0}),
        lora(2, method, r=3, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 1}),
    ]
    wanted = total(both, [0.5, -2.0])
    same(deltas(combine(both, [0.5, -2.0], "cat")), wanted)
    same(deltas(combine(both, [0.5, -2.0], "svd", rank=5)), wanted)


def test_linear_has_cross_terms_unless_one_is_alone() -> None:
    """CO2"""
    both = [lora(1), lora(2)]
    for weights in ([-0.5, 0.0], [0.0, 2.0]):
        same(deltas(combine(both, weights, "linear")), total(both, weights))
    same(deltas(combine(both[:1], [-0.5], "ties")), total(both[:1], [-0.5]))
    found, wanted = deltas(combine(both, [1.0, 1.0], "linear")), total(both, [1.0, 1.0])
    crossed = {n: both[0].config.scale * sum(
        both[j].params[f"{n}.lora_B.weight"] @ both[1 - j].params[f"{n}.lora_A.weight"] for j in (0, 1)
    ) for n in wanted}  # fmt: skip
    same(found, {n: wanted[n] + crossed[n] for n in wanted})


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_weight_zero_takes_out_and_a_negative_weight_subtracts(how: str) -> None:
    """CO3"""
    both = [lora(1), lora(2)]
    same(deltas(combine(both, [0.0, 1.0], how)), total(both, [0.0, 1.0]))
    plus, minus = (deltas(combine(both, [w, 0.0], how)) for w in (0.7, -0.7))
    same(minus, {path: -Δ for path, Δ in plus.items()})


@pytest.mark.parametrize("how", ["magnitude_prune", "dare_linear"])
def test_density_one_prunes_nothing(how: str) -> None:
    """CO4"""
    both, weights = [lora(1), lora(2)], [0.7, -1.5]
    same(deltas(combine(both, weights, how)), deltas(combine(both, weights, "linear")))
    same(deltas(combine(both, weights, how + "_svd")), deltas(combine(both, weights, "svd")))


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_dare_keeps_the_original_over_the_density(density: float) -> None:
    """CO5, entry by entry of A, of one layer that one adapter has alone."""
    both = [lora(1), lora(2, target_modules=["c_fc"])]
    rng = np.random.default_rng(3)
    masks: Found = {}

    def mask(k: int, name: str, T: Any) -> Any:
        masks[name] = rng.random(T.shape) < density
        return masks[name]

    found = combine(both, [4.0, 1.0], "dare_linear", density, mask=mask)
    for name, T in both[0].params.items():
        kept = masks[name]
        np.testing.assert_allclose(found.params[name][kept], T[kept] / density * 6.0**0.5, rtol=1e-14)  # 4 α/r = 6
        assert not found.params[name][~kept].any()
        assert 0 < kept.sum() < kept.size


def test_magnitudes_and_signs() -> None:
    """By hand: of 4 entries the 2 largest; + where the sum is 0; the mean of those that agree."""
    from refpeft.combine import elected, top

    T = np.array([[3.0, -1.0], [0.5, -2.0]])
    assert top(T, 0.5).tolist() == [[3.0, 0.0], [0.0, -2.0]]
    assert top(T, 0.9).tolist() == [[3.0, -1.0], [0.0, -2.0]]
    τ = [np.array([1.0, -3.0, 2.0, 0.0]), np.array([-1.0, 1.0, 2.0, 0.0]), np.array([0.0, 1.0, 2.0, -1.0])]
    assert elected(τ, "total").tolist() == [
        [True, True, True, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    assert elected(τ, "frequency")[:, 1].tolist() == [False, True, True]


def test_the_scale_is_one_whatever_it_was() -> None:
    for method in ("lora", "rslora"):
        for how in HOW:
            made = combine([lora(1, method), lora(2, method)], [1.0, 1.0], how, 0.5, mask=ones)
            assert all(abs(made.at(path).scale - 1) < 1e-15 for path in made.by_module)


@pytest.mark.parametrize(
    ("adapters", "how", "options", "said"),
    [
        (lambda: [lora(1), lora(2)], "sum", {}, "unknown combination 'sum'"),
        (lambda: [lora(1), lora(2, r=3)], "linear", {}, "linear needs adapters of one rank, found [2, 3]"),
        (lambda: [lora(1), lora(2, rank_pattern={"c_attn": 1})], "ties", {}, "found [2, 1] at transformer.h.0.attn"),
        (lambda: [lora(1), lora(2)], "ties", {"density": 0.0}, "density must be in (0, 1], found 0.0"),
        (lambda: [lora(1), lora(2)], "ties", {"sign": "odd"}, "sign must be 'total' or 'frequency', found 'odd'"),
        (lambda: [lora(1), lora(2)], "dare_ties", {"density": 0.5}, "needs masks"),
        (lambda: [lora(1, "dora"), lora(2)], "cat", {}, "which dora is not"),
        (lambda: [lora(1), lora(2, lora_bias=True)], "cat", {}, "lora_B.bias besides A and B"),
        (lambda: [lora(1)], "cat", {}, "1 adapters need as many weights, found 2"),
    ],
)
def test_what_cannot_be_combined(adapters: Any, how: str, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        combine(adapters(), [1.0, 1.0], how, **options)


def test_one_name_for_each_way() -> None:
    assert len(set(HOW)) == 11
    assert set(PLAIN) < set(HOW)
    made = combine([lora(1), lora(2)], [1.0, 1.0], "svd")
    assert made.config.r == 2


def test_an_average_is_linear_in_the_tensors_and_not_in_what_they_do() -> None:
    """CO6"""
    one, two = lora(1), lora(2)
    first = average([one, two], [1.0, 0.0])
    assert all(np.array_equal(v, one.params[n]) for n, v in first.params.items())
    same(deltas(average([one], [-1.0])), deltas(one))
    sum_of_halves = average([one, two], [0.5, 0.25])
    for path, (names, _) in one.by_module.items():
        A, B = ([a.params[names[x]] for a in (one, two)] for x in "AB")
        wanted = one.config.scale * (0.5 * B[0] + 0.25 * B[1]) @ (0.5 * A[0] + 0.25 * A[1])
        np.testing.assert_allclose(deltas(sum_of_halves)[path], wanted, atol=1e-12)


def test_an_average_of_vectors_is_the_average_of_what_they_do() -> None:
    """CO6: of (IA)³, in which W′ is linear."""
    config = {"target_modules": ["c_attn"], "feedforward_modules": []}
    fresh = refpeft.init("ia3", config, MODEL)
    rng = np.random.default_rng(0)
    both = [fresh.replace(params={n: rng.normal(size=v.shape) for n, v in fresh.params.items()}) for _ in range(2)]
    name = next(site.weight for site in MODEL.sites.values() if site.path.endswith("c_attn"))
    W = [refpeft.merge(MODEL, a).params[name] for a in both]
    found = refpeft.merge(MODEL, average(both, [0.75, -1.5])).params[name]
    np.testing.assert_allclose(found, 0.75 * W[0] - 1.5 * W[1], atol=1e-12)


def test_what_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match="one method with one config, and these differ"):
        average([lora(1), lora(2, r=3)], [1.0, 1.0])
    with pytest.raises(ValueError, match="1 adapters need as many weights, found 2"):
        average([lora(1)], [1.0, 1.0])
