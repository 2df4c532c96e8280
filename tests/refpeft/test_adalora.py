"""AdaLoRA: the claims of its docstring, its budget beside HF peft's, its folders both ways, what it refuses."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refpeft
from refpeft import Adapter, Model, objectives
from refpeft import train as engine
from refpeft.checkpoint.safetensors import read
from refpeft.methods import adalora
from tests.models import ARCHITECTURES, tiny
from tests.refpeft.equal import EXACT, Array, moved, same, wrap_is_merge

IDS = np.random.default_rng(0).integers(0, 29, (2, 6))
SMALL = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 20, "target_modules": "all-linear"}


def fresh(model: Model, **config: Any) -> Adapter:
    return refpeft.init("adalora", {**SMALL, **config}, model)


def some(adapter: Adapter, seed: int = 0) -> dict[str, Array]:
    """A choice of triplets, of one matrix none."""
    rng = np.random.default_rng(seed)
    kept = {n: rng.random(len(v)) < 0.5 for n, v in adapter.params.items() if n.endswith("lora_E")}
    first = next(iter(kept))
    return kept | {first: np.zeros(len(kept[first]), bool)}


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_gradients_are_exact_on_every_model(family: str, architecture: str) -> None:
    """Of P, Λ, Q and of the whole base under them; dropout is an argument."""
    model = tiny(family, architecture)
    adapter = moved(fresh(model, lora_dropout=0.4))
    found = refpeft.check_model(model, IDS, adapter, base=True)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT
    dropped = refpeft.dropout(adapter, model, IDS.shape, seed=3)
    assert dropped.masks
    assert max(refpeft.check_model(model, IDS, dropped).values()) <= EXACT


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_wrap_is_merge(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AL2: outputs, and the gradients of both forms."""
    model = tiny(family)
    adapter = moved(fresh(model))
    wrap_is_merge(model, adapter, IDS, monkeypatch)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_fresh_adapter_changes_nothing(family: str) -> None:
    """AL1: not a bit, run or merged, and P and Q have no gradient; drawn at random, it does."""
    model = tiny(family)
    adapter = fresh(model)
    out, vjp = model(IDS, adapter)
    np.testing.assert_array_equal(out, model(IDS)[0])
    merged = refpeft.merge(model, adapter)
    assert all(np.array_equal(merged.params[n], v) for n, v in model.params.items())
    grads = vjp(np.random.default_rng(0).normal(size=out.shape))
    assert not any(d.any() for n, d in grads.items() if not n.endswith("lora_E"))
    assert sum(np.abs(d).max() for n, d in grads.items() if n.endswith("lora_E")) > 0
    assert np.abs(model(IDS, fresh(model, init_lora_weights=False))[0] - out).max() > 1e-3


@pytest.mark.parametrize("α", [6, 0])
def test_it_is_a_lora_with_the_singular_values_in_a_factor(α: float) -> None:
    """AL4: α stands alone over r₀, or is r₀ if it is not above zero."""
    model = tiny("gpt2")
    adapter = moved(fresh(model, lora_alpha=α))
    s = (α or 4) / (4 + 1e-5)
    lora = refpeft.init("lora", {"r": 4, "lora_alpha": s * 4, "target_modules": "all-linear"}, model)
    p = adapter.params
    factors = {f"{x}.lora_A.weight": p[f"{x}.lora_E"] * p[f"{x}.lora_A"] for x in lora.by_module}
    factors |= {f"{x}.lora_B.weight": p[f"{x}.lora_B"] for x in lora.by_module}
    same(model(IDS, adapter)[0], model(IDS, lora.replace(params=factors))[0])


def test_several_adapters_add_up() -> None:
    """AL3"""
    model = tiny("llama")
    a, b = moved(fresh(model)), moved(fresh(model, init_r=3, lora_alpha=1), 2)
    lora = moved(refpeft.init("lora", {"r": 2}, model))
    for order in ([a, lora, b], [b, a, lora]):
        assert max(refpeft.check_model(model, IDS, order).values()) <= EXACT
        same(refpeft.merge(model, order)(IDS)[0], model(IDS, order)[0])
    one, other, both = (refpeft.merge(model, x).params for x in (a, b, [b, a]))
    for n, v in model.params.items():
        same(both[n] - v, one[n] + other[n] - 2 * v)


def test_triplets_that_are_zero_can_be_left_out() -> None:
    """AL5: the scale is that of the ranks there were, also where no triplet is left."""
    model = tiny("gpt2")
    adapter = moved(fresh(model))
    kept = some(adapter)
    params = {n: v * kept[n][:, None] if n in kept else v for n, v in adapter.params.items()}
    without = adalora.pruned(adapter, kept)
    assert {n: v.shape[0] for n, v in without.params.items() if n in kept} == {n: k.sum() for n, k in kept.items()}
    same(model(IDS, without)[0], model(IDS, adapter.replace(params=params))[0])
    assert max(refpeft.check_model(model, IDS, without).values()) <= EXACT


def test_orthogonality() -> None:
    """AL6: R is zero where P and Q are orthogonal, and so is its gradient; elsewhere the gradient is that of R."""
    rng = np.random.default_rng(0)
    assert refpeft.check_op(adalora.orthogonality, rng.normal(size=(3, 5))) <= EXACT
    adapter = moved(fresh(tiny("gpt2")))
    R, grads = adalora.penalty(adapter.config, adapter.params)
    v = {n: rng.normal(size=d.shape) for n, d in grads.items()}
    step = {n: p + 1e-100j * v[n] if n in v else p for n, p in adapter.params.items()}
    slope = np.imag(adalora.penalty(adapter.config, step)[0]) / 1e-100
    assert abs(slope - sum((grads[n] * v[n]).sum() for n in v)) <= EXACT * abs(R)
    straight = {n: np.eye(*p.shape) if n in grads else p for n, p in adapter.params.items()}
    R, grads = adalora.penalty(adapter.config, straight)
    assert R == 0
    assert not any(d.any() for d in grads.values())


def test_the_budget_falls_and_is_kept() -> None:
    """AL7: from all triplets to the target, cubic in between; those that stay have the largest scores."""
    cfg = adalora.Config(init_r=4, target_r=1, tinit=3, tfinal=5, total_step=20)
    found = [adalora.budget(cfg, t, 6) for t in range(1, 21)]
    assert found[:3] == [24] * 3
    assert found[14:] == [6] * 6
    assert all(a >= b for a, b in itertools.pairwise(found))
    assert adalora.budget(cfg, 9, 6) == int(18 * 0.5**3 + 6)
    rng = np.random.default_rng(0)
    S = {str(k): rng.random(4) for k in range(6)}
    for b in (24, 17, 6, 1):
        keep = adalora.allocate(S, b)
        assert sum(k.sum() for k in keep.values()) == b
        out = [S[k][~keep[k]] for k in S]
        assert min(S[k][keep[k]].min(initial=1) for k in S) > max(x.max(initial=0) for x in out)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_training_keeps_what_the_budget_leaves(tmp_path: Path) -> None:
    """Stopped and gone on from a state, to the bit; saved without the triplets that were cut."""
    model = tiny("gpt2", "LMHeadModel", dtype=np.float32)
    rows = [{"input_ids": [int(k) for k in row]} for row in np.random.default_rng(0).integers(0, 29, (12, 5))]
    goal = objectives.make("causal", objectives.Setting())
    adapter = fresh(model, init_r=3, target_r=1, tinit=2, tfinal=3, total_step=12)
    plan = engine.Plan(steps=12, batch=4, lr=0.02, clip=1.0)
    states = [engine.start(plan, adapter)]
    while states[-1].step < plan.steps:
        states.append(engine.step(plan, model, adapter, goal, rows, states[-1]))
    left = [sum(int((v != 0).sum()) for n, v in s.params.items() if n.endswith("lora_E")) for s in states]
    K = sum(n.endswith("lora_E") for n in adapter.params)
    assert left[1:3] == [3 * K] * 2
    assert left[2:] == sorted(left[2:], reverse=True)
    assert left[3:] == [adalora.budget(adapter.config, t, K) for t in range(3, 13)]
    assert left[-1] == K
    done = engine.trained(adapter, states[-1])
    assert sum(len(v) for n, v in done.params.items() if n.endswith("lora_E")) == K
    same(model(IDS, done)[0], model(IDS, adapter.replace(params=states[-1].params))[0], 1e-6)
    refpeft.save_adapter(done, tmp_path / "a")
    again = refpeft.load_adapter(tmp_path / "a", model)
    assert again.config == done.config
    assert all(np.array_equal(again.params[n], v) for n, v in done.params.items())


def test_refpeft_train_knows_how_many_steps_there_are() -> None:
    from refpeft.cli.asked import method_fields

    model = tiny("gpt2", "LMHeadModel")
    assert method_fields("adalora", [], "causal", model, steps=40) == {"total_step": 40}
    assert method_fields("adalora", ["total_step=9"], "causal", model, steps=40) == {"total_step": 9}


@pytest.mark.peft
def test_importance_and_budget_are_those_of_hf_peft() -> None:
    """Its allocator beside `follow` for a whole run: the same Λ are cut at every step."""
    import peft
    import torch

    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 7), "b": torch.nn.Linear(7, 4)}).double()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Any) -> Any:
            return self.layers["b"](torch.tanh(self.layers["a"](x)))

    fields = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 16, "beta1": 0.7}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.AdaLoraConfig(**fields, target_modules=["a", "b"], init_lora_weights=False)
        model = peft.get_peft_model(Net(), config).double()
    cfg = adalora.Config(**fields)
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.SGD(own.values(), lr=1e-3)

    def now(of: Any) -> dict[str, Array]:
        return {n: of(p).detach().numpy().copy() for n, p in own.items()}

    memory = adalora.remembered(cfg, now(lambda p: p))
    cuts = []
    for t in range(1, 17):
        optimizer.zero_grad()
        model(torch.randn(3, 5, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        params, memory = adalora.follow(cfg, t, now(lambda p: p), now(lambda p: p.grad), memory)
        model.base_model.update_and_allocate(t)
        for n, p in own.items():
            np.testing.assert_allclose(params[n], p.detach().numpy(), rtol=1e-12, atol=0)
        cuts.append(sum(int((v == 0).sum()) for n, v in params.items() if n.endswith("lora_E")))
    assert cuts[:3] == [0, 0, 0]
    assert cuts[-1] == 4
    assert len(set(cuts)) > 2


@pytest.mark.peft
def test_the_penalty_is_that_of_hf_peft() -> None:
    import peft
    import torch
    import transformers

    c = transformers.GPT2Config(
        vocab_size=13, n_embd=8, n_head=2, n_layer=1, n_positions=12, bos_token_id=1, eos_token_id=2
    )
    c.resid_pdrop = c.embd_pdrop = c.attn_pdrop = 0
    config = peft.AdaLoraConfig(init_r=3, target_r=1, total_step=10, task_type="CAUSAL_LM", init_lora_weights=False,
                                fan_in_fan_out=True)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(c), config).double()
    ids = torch.tensor([[3, 4, 5]])
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    with_it = model(input_ids=ids, labels=ids).loss
    config.orth_reg_weight = 0
    without = model(input_ids=ids, labels=ids).loss
    cfg = adalora.Config(init_r=3, target_r=1, total_step=10)
    R, grads = adalora.penalty(cfg, {n: p.detach().numpy() for n, p in own.items()})
    same(R, (with_it - without).item(), 1e-6)  # their sum is in float32
    (with_it - without).backward()
    for n, d in grads.items():
        same(d, own[n].grad.numpy())


# ── configs and folders ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["wte"]}, r"transformer\.wte: AdaLoRA is defined for linear layers"),
        ({"total_step": None}, "total_step must be a positive integer, found None"),
        ({"target_r": 5}, "target_r must be at most init_r, 4, found 5"),
        ({"tinit": 12, "tfinal": 8}, "tinit and tfinal must leave some of 20 steps, found 12, 8"),
        ({"beta1": 1.0}, "beta1 must be above 0 and below 1"),
        ({"rank_pattern": {"x.lora_E": [True]}}, "rank_pattern.* say of each of 4 triplets"),
        ({"bias": "vera_only"}, "bias must be"),
        ({"r": 3}, "adalora has no config field 'r'"),
    ],
)
def test_each_mistake_is_one_sentence(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fresh(tiny("gpt2"), **config)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_layers_of_16_bits_stay_so(dtype: Any) -> None:
    model = tiny("gpt2", dtype=dtype)
    adapter = moved(fresh(model))
    assert {v.dtype for v in adapter.params.values()} == {np.dtype(np.float32)}
    out, vjp = model(IDS, adapter)
    assert out.dtype == dtype
    assert all(d.dtype == np.float32 for d in vjp(np.ones_like(out)).values())
    assert {v.dtype for v in refpeft.merge(model, adapter).params.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_r": 5}, "rank_pattern.* say of each of 5 triplets"),
        ({"rank_pattern": None}, r"lora_B'.*expected shape \[\d+, 4\], found"),
        ({"use_rslora": True}, "'use_rslora' is set to True, which is not supported"),
        ({"total_step": 0}, "total_step must be a positive integer, found 0"),
    ],
)
def test_folders_that_do_not_fit_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny("gpt2")
    adapter = moved(fresh(model))
    refpeft.save_adapter(adalora.pruned(adapter, some(adapter)), tmp_path / "a")
    where = tmp_path / "a" / "adapter_config.json"
    where.write_text(json.dumps({**json.loads(where.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        refpeft.load_adapter(tmp_path / "a", model)


@pytest.mark.peft
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_hf_peft_and_this_read_each_other(family: str, cut: bool, tmp_path: Path) -> None:
    """The same tensors, bit for bit, and the same outputs: run, and merged; with triplets left out, and without."""
    import peft
    import torch
    import transformers

    head = {"gpt2": "LMHeadModel", "llama": "ForCausalLM", "bert": "Model"}[family]
    model = tiny(family, head)
    refpeft.save(model, tmp_path / "base")
    adapter = moved(fresh(model))
    if cut:
        adapter = adalora.pruned(adapter, some(adapter))
    refpeft.save_adapter(adapter, tmp_path / "ours")
    name = model.source["architectures"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks transformers
        base = getattr(transformers, name).from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours", autocast_adapter_dtype=False).eval()
    want = model(IDS, adapter)[0]
    with torch.no_grad():
        same(theirs(input_ids=torch.tensor(IDS))[0].numpy(), want, 1e-10 if family in ("gpt2", "bert") else 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a matrix of rank 0 is incomplete
        theirs.save_pretrained(tmp_path / "theirs")
    again = refpeft.load_adapter(tmp_path / "theirs", model)
    assert again.params.keys() == adapter.params.keys()
    assert all(np.array_equal(again.params[n], v) for n, v in adapter.params.items())
    mine, others = (read(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in others.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dict(theirs.merge_and_unload().named_parameters())
    for n, v in refpeft.merge(model, adapter).params.items():
        if n in found:
            same(found[n].detach().numpy(), v)
