"""Bottleneck adapters: how many parameters, how they begin, where they are, what else may be in a model; training."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft import bottleneck, objectives, train
from refpeft.bottleneck import Config
from refpeft.checkpoint.families import describe
from refpeft.methods import METHODS
from refpeft.model import Model, Site
from tests.models import config_json, tiny
from tests.refpeft.equal import EXACT, moved, same
from tests.refpeft.necks import FAMILIES, IDS, THREE, fresh

three = pytest.mark.parametrize("method", THREE)
each_family = pytest.mark.parametrize("family", FAMILIES)


# ── counts, beginnings, places ───────────────────────────────────────────────────────────────────────────────────────


def hollow(family: str, architecture: str, **config: Any) -> Model:
    """A model of any size, of whose tensors there are only the norms."""
    source = config_json(family, architecture, **config)
    fields, sites, _ = describe(source)
    zeros = np.zeros(fields.hidden_size, np.float32)
    norms = [s for s in sites.values() if s.kind.endswith("norm")]
    return Model(fields, sites, {name: zeros for s in norms for name in (s.weight, s.bias)}, source)


def count(method: str, model: Model, **config: Any) -> int:
    cfg = METHODS[method].Config(**config)
    sizes = [
        math.prod(s) for p in bottleneck.places(cfg, model) for s in bottleneck.shapes(cfg, p.layer, model).values()
    ]
    return sum(sizes) + sum(model.params[t].size for t in bottleneck.norms(model).values() if cfg.train_norms)


LIN = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False, "ln_before": True}
GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96}
COUNTS = [  # of arXiv 2106.09685, tables 2 to 4, in millions
    ("houlsby", GPT3, {"reduction_factor": 12288, "train_norms": False}, 7.1),
    ("houlsby", GPT3, {"reduction_factor": 1536, "train_norms": False}, 40.1),
    ("pfeiffer", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, {"reduction_factor": 170, **LIN}, 0.37),
    ("pfeiffer", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, {"reduction_factor": 1024 / 224.5, **LIN}, 11.09),
    ("pfeiffer", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, {"reduction_factor": 160, **LIN}, 0.88),
    ("pfeiffer", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, {"reduction_factor": 1280 / 248.5, **LIN}, 23.00),
    ("pfeiffer", {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}, {}, 0.9),
]


@pytest.mark.parametrize(("method", "size", "config", "millions"), COUNTS)
def test_parameters_are_as_many_as_in_papers(
    method: str, size: dict[str, int], config: dict[str, Any], millions: float
) -> None:
    """H2, PF2, PF3: Hu et al. 2021 count them."""
    family, architecture = ("gpt2", "GPT2Model") if "n_embd" in size else ("roberta", "RobertaModel")
    digits = len(str(millions).partition(".")[2])
    assert round(count(method, hollow(family, architecture, **size), **config) / 1e6, digits) == millions


@three
@each_family
def test_there_are_as_many_parameters_as_the_formula_says(family: str, method: str) -> None:
    """H2: 2 m d + d + m each, and 2 d for each norm (d for those without β), in as many places as there are."""
    model = tiny(family)
    adapter = fresh(method, model)
    d, m, L = 16, 4, 2
    adapters = {"houlsby": 2 * L}.get(method, L)
    norms = sum(s.kind.endswith("norm") for s in model.sites.values()) * d * (1 if family in ("llama", "qwen2") else 2)
    own = sum(p.size for p in adapter.params.values())
    assert own == adapters * (2 * m * d + d + m) + (norms if method == "houlsby" else 0)
    assert own == count(method, model, reduction_factor=4)


def test_how_they_begin() -> None:
    model = tiny("bert", hidden_size=512, num_attention_heads=4)
    draws = {how: fresh("houlsby", model, init_weights=how, use_gating=True, reduction_factor=2).params
             for how in ("houlsby", "bert", "mam_adapter")}  # fmt: skip
    D, U = (np.array([p for n, p in draws["houlsby"].items() if n.endswith(f"{s}.weight")]) for s in ("down", "up"))
    for W in (D, U):  # N(0, 0.01²) within two standard deviations has the standard deviation 0.0088
        assert 0.0199 < np.abs(W).max() <= 0.02
        assert abs(W.std() / 0.01 - math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / 0.9544997361)) < 0.002
    up, down = (np.array([p for n, p in draws["bert"].items() if n.endswith(f"{s}.weight")]) for s in ("up", "down"))
    assert abs(up.std() - 0.02) < 1e-4
    assert abs(down.std() - 0.02) < 1e-4
    for n, p in draws["mam_adapter"].items():
        if n.endswith("adapter_down.weight"):
            assert 0.99 / math.sqrt(512) < np.abs(p).max() <= 1 / math.sqrt(512)
        if ".adapter_up." in n or (n.endswith("bias") and ".adapters." in n):
            assert not p.any()
    norms = {n: p for n, p in draws["bert"].items() if ".adapters." not in n}
    assert norms.keys() == bottleneck.norms(model).keys()
    assert all(np.array_equal(p, model.params[n]) for n, p in norms.items())


def test_encoders_and_decoders() -> None:
    """Layers of the decoder are numbered on; the attention to the encoder has a location of its own."""
    paths = {
        "t5": ["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo",
               "decoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.1.EncDecAttention.o",
               "decoder.block.0.layer.2.DenseReluDense.wo"],
        "bart": ["model.encoder.layers.0.self_attn.out_proj", "model.encoder.layers.0.fc2",
                 "model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.0.encoder_attn.out_proj",
                 "model.decoder.layers.0.fc2"],
    }  # fmt: skip
    modules = {
        "t5": [path.rpartition(".")[0].rpartition(".")[0] for path in paths["t5"]],
        "bart": [f"model.{stack}.layers.0.{name}" for stack, name in [
            ("encoder", "attention_adapters"), ("encoder", "output_adapters"), ("decoder", "attention_adapters"),
            ("decoder", "cross_attention_adapters"), ("decoder", "output_adapters")]],
    }  # fmt: skip
    roles = ["encoder.layers.0.attn.o", "encoder.layers.0.mlp.down", "decoder.layers.0.attn.o",
             "decoder.layers.0.cross.o", "decoder.layers.0.mlp.down"]  # fmt: skip
    base = tiny("bert")
    for family in ("t5", "bart"):
        sites = {r: Site(path, "linear", path + ".weight", "") for r, path in zip(roles, paths[family], strict=True)}
        model = replace(base, config=replace(base.config, family=family), sites=sites)
        with pytest.raises(ValueError, match="masks are not drawn for adapters in a decoder"):
            bottleneck.masks(Config(dropout=0.1), replace(base, sites=dict(list(sites.items())[2:])), None, (2, 5))  # type: ignore[arg-type]
        found = bottleneck.places(Config(cross_adapter=True), model)
        assert [p.module for p in found] == modules[family]
        assert [p.layer for p in found] == [0, 0, 1, 1, 1]
        assert [p.at for p in found] == [role.rpartition(".")[0] + "." for role in roles]
        assert len(bottleneck.places(Config(), model)) == 4
        assert [p.at for p in bottleneck.places(Config(leave_out=[0]), model)] == [
            "decoder.layers.0.attn.", "decoder.layers.0.mlp."
        ]  # fmt: skip


DECODER_IDS = np.random.default_rng(2).integers(2, 29, (2, 4))


@three
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_gradients_in_encoder_decoders_are_exact(family: str, method: str) -> None:
    """In both stacks and between them, with layers left out that are numbered on from the encoder's."""
    model = tiny(family, "ForConditionalGeneration")
    options = {
        "cross_adapter": True,
        "use_gating": True,
        "leave_out": [1, 2],
        "reduction_factor": {"3": 2, "default": 4},
    }
    adapter = moved(fresh(method, model, **options))
    found = refpeft.check_model(model, IDS, adapter, base=True, decoder_input_ids=DECODER_IDS)
    assert set(found) == set(adapter.params) | set(model.params)
    assert max(found.values()) <= EXACT


@three
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoding_step_by_step_behind_an_encoder(family: str, method: str) -> None:
    model = tiny(family, "ForConditionalGeneration")
    adapter = moved(fresh(method, model, cross_adapter=True))
    want, _ = model(IDS, adapter, decoder_input_ids=DECODER_IDS)
    cache = None
    for t in range(DECODER_IDS.shape[1]):
        y, cache = model.decode(IDS, cache, adapter, decoder_input_ids=DECODER_IDS[:, t : t + 1])
        same(y[:, 0], want[:, t])


# ── 16 bits, together with others, bad input ─────────────────────────────────────────────────────────────────────────


@three
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_16_bits(method: str, dtype: str) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    model = tiny("bert", dtype=kind)
    adapter = fresh(method, model, use_gating=True, ln_after=True, scaling="learned", train_norms=False)
    adapter = adapter.replace(params={n: (p + 0.1).astype(p.dtype) for n, p in adapter.params.items()})
    out, vjp = model(IDS, adapter)
    assert out.dtype == kind
    assert {p.dtype for p in adapter.params.values()} == {np.dtype(np.float32)}
    assert {g.dtype for g in vjp(np.ones_like(out)).values()} == {np.dtype(np.float32)}
    want, _ = model.astype(np.float64)(IDS, adapter)
    np.testing.assert_allclose(out.astype(np.float64), want, atol=0.1)


def test_a_mam_adapter_is_a_prefix_and_a_parallel_adapter() -> None:
    model = tiny("bert", "ForSequenceClassification")
    prefix = moved(refpeft.init("prefix_tuning", {"num_virtual_tokens": 3}, model))
    lora = moved(refpeft.init("lora", {"target_modules": ["output.dense"]}, model))
    found = refpeft.check_model(model, IDS, [prefix, moved(fresh("parallel", model)), lora], base=True)
    assert max(found.values()) <= EXACT


BAD: list[tuple[dict[str, Any], str]] = [
    ({"non_linearity": "elu"}, "non_linearity must be one of relu, gelu, .*, found 'elu'"),
    ({"scaling": "row"}, "scaling must be one of learned, channel, found 'row'"),
    ({"reduction_factor": 0}, "reduction_factor must be a positive number, found 0"),
    ({"reduction_factor": {"0": 4, "1": -1}}, r"reduction_factor\['1'\] must be a positive number, found -1"),
    ({"reduction_factor": {"0": 4}}, "reduction_factor has no entry '1' and no 'default'"),
    ({"reduction_factor": "16"}, "reduction_factor must be .*, found '16'"),
    ({"leave_out": [2]}, "leave_out names layer 2, and the model has layers 0 to 1"),
    ({"leave_out": [0, 1]}, "there is no sublayer left to adapt"),
    ({"mh_adapter": False, "output_adapter": False}, "there is no sublayer left to adapt"),
    ({"init_weights": "xavier"}, "init_weights must be one of houlsby, bert, mam_adapter, found 'xavier'"),
    ({"residual_before_ln": "pre_add"}, "residual_before_ln must be one of True, False, post_add, found 'pre_add'"),
    ({"residual_before_ln": "post_add"}, "residual_before_ln 'post_add' needs original_ln_before"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, found 1.0"),
    ({"phm_layer": True}, "houlsby has no config field 'phm_layer'"),
    ({"modules_to_save": ["score"]}, r"modules_to_save \['score'\] matches no module of the model"),
]


@pytest.mark.parametrize(("config", "says"), BAD)
def test_bad_configs_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        refpeft.init("houlsby", config, tiny("bert"))


def test_adapters_of_other_models_are_refused() -> None:
    adapter = fresh("houlsby", tiny("bert", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"encoder\.layer\.2\.\S+, a (sublayer|module) that the model does not have"):
        tiny("bert")(IDS, adapter)
    wide = fresh("pfeiffer", tiny("bert", hidden_size=8))
    with pytest.raises(ValueError, match=r"adapter_down.weight must have shape \(4, 16\), found \(2, 8\)"):
        tiny("bert")(IDS, wide)
    few = fresh("pfeiffer", tiny("bert"))
    few = few.replace(params={n: p for n, p in few.params.items() if not n.endswith("adapter_up.bias")})
    with pytest.raises(ValueError, match=r"adapter_up.bias must have shape \(16,\), found nothing"):
        tiny("bert")(IDS, few)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@three
def test_training(method: str) -> None:
    """It learns to count, dropout has a say in it, and a run can be repeated."""
    model = tiny("gpt2")
    rows: list[Any] = [{"input_ids": [(s + k) % 29 for k in range(6)]} for s in range(12)]
    plan = train.Plan(steps=40, batch=12, lr=0.02)  # all rows in every step
    objective = objectives.make("causal", objectives.Setting())

    def losses(**config: Any) -> list[float]:
        adapter = fresh(method, model, **config)
        state = train.start(plan, adapter)
        while state.step < plan.steps:
            state = train.step(plan, model, adapter, objective, rows, state)
        return [float(L) for L in state.losses]

    plain = losses()
    assert plain[0] > math.log(29) > max(plain[-3:])  # what all words being alike would give
    assert losses() == plain
    assert losses(dropout=0.2) != plain
    assert losses(stochastic_depth=0.5) != plain
