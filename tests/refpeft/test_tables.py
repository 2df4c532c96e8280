"""The tables of papers, and the models in them: derived numbers are the published ones, or it is said what differs."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from refpeft import Model, bottleneck
from refpeft.checkpoint import outlines
from refpeft.count import count, outline
from refpeft.presets import ALIASES, PRESETS
from refpeft.tables import MODELS, TABLES, Derived, Row, derive, reading

ROWS = [(table, row) for table, t in TABLES.items() for row in t.rows]
each_row = pytest.mark.parametrize(
    ("table", "row"), ROWS, ids=[f"{t}-{n}-{r.label}-{r.published}" for n, (t, r) in enumerate(ROWS)]
)


@cache
def model(name: str) -> Model:
    preset, own = MODELS[name]
    return outlines.of_config(outlines.config(preset) | dict(own))


def derived(row: Row, **config: Any) -> Derived:
    return derive(replace(row, config={**row.config, **config}), model(row.model))


def rows(table: str, named: str, label: str) -> list[Row]:
    return [r for r in TABLES[table].rows if (r.model, r.label) == (named, label)]


@each_row
def test_a_row_agrees_or_says_why_not(table: str, row: Row) -> None:
    assert derived(row).agrees == (not row.why)


@each_row
def test_a_row_is_what_the_formulae_of_its_paper_give(table: str, row: Row) -> None:
    """§5.1 of Hu et al. 2021, written down once more, with the numbers that `how` names."""
    c = model(row.model).config
    d, L, n = c.hidden_size, c.num_layers, {k: int(v) for k, v in re.findall(r"(r|l_p|l_i) = (\d+)", row.how)}
    formulae = {
        r"2 d r on W_q and W_v": lambda: 2 * L * 2 * d * n["r"],
        r"2 d r on W_v": lambda: L * 2 * d * n["r"],
        r"2 d r on W_q, W_k, W_v, W_o": lambda: 4 * L * 2 * d * n["r"],
        r"2 d r \+ r \+ d, one in each layer": lambda: L * (2 * d * n["r"] + n["r"] + d),
        r"2 d r \+ r \+ d, two in each layer": lambda: 2 * L * (2 * d * n["r"] + n["r"] + d),
        r"2 d r \+ r \+ d, one in each but 8 layers": lambda: (L - 8) * (2 * d * n["r"] + n["r"] + d),
        r"2 d r \+ r \+ 3 d, one in each layer": lambda: L * (2 * d * n["r"] + n["r"] + d) + 2 * L * d,
        r"d \(l_p \+ l_i\), l_p": lambda: d * (n["l_p"] + n["l_i"]),
        r"L d \(l_p \+ l_i\), l_p": lambda: L * d * (n["l_p"] + n["l_i"]),
        r"L d \(l_p \+ l_i\), \d+ places": lambda: L * d * int(re.findall(r"(\d+) places", row.how)[0]),
        r"all biases, those of the norms too: 11 L d \+ d": lambda: 11 * L * d + d,
        r"the last two layers": lambda: 2 * (12 * d * d + 13 * d),
        r"n d, n": lambda: d * int(row.label.removeprefix("prompt of ")),
        r"all tensors|all biases$|r = \d+ on q, k, v, up and down|n d ": lambda: None,  # of whole models: see below
    }
    (found,) = (f() for how, f in formulae.items() if re.match(how + r"(,|;|:|$| |\b)", row.how))
    beside = {"LoRA+PE": 12 * d, "LoRA+PL": 12 * L * d}.get(row.label, 0)
    if found is not None:
        assert derived(row).exact == (found + beside) * (2 if row.published.endswith("MB") else 1)


@each_row
def test_a_bottleneck_is_as_wide_as_the_row_says(table: str, row: Row) -> None:
    """AdapterHub's field is a factor, by which the width is divided and rounded down."""
    if row.method in ("houlsby", "pfeiffer"):
        found = outline(row.method, row.config, model(row.model))
        r = int(re.findall(r"r = (\d+)", row.how)[0])
        assert bottleneck.width(found.config, 0, model(row.model)) == r


def test_every_published_number_is_read_to_its_last_digit() -> None:
    readings = [("175,255.8M", 175255.8, "M", 1), ("0.83%", 0.83, "%", 2), ("35MB", 35, "MB", 0), ("175B", 175, "B", 0)]
    for published, *expected in readings:
        assert reading(Row("GPT-3", "", published, "")) == tuple(expected)


# ── what the notes say ───────────────────────────────────────────────────────────────────────────────────────────────


def bottlenecks(row: Row) -> list[int]:
    """All bottlenecks that would agree with the published number, by the formula that the row has just been held to."""
    c, (published, _, digits) = model(row.model).config, reading(row)
    d, extra = c.hidden_size, 3 if row.label == "Adapter^L" else 1
    places = (2 if row.method == "houlsby" else 1) * c.num_layers - len(row.config.get("leave_out", ()))
    return [r for r in range(1, d) if round(places * (2 * d * r + r + extra * d) / 1e6, digits) == published]


@pytest.mark.parametrize("named", ["GPT-2 M", "GPT-2 L"])
def test_no_other_bottleneck_fits(named: str) -> None:
    for row in rows("lora-gpt2", named, "Adapter^L"):
        (r,) = bottlenecks(row)
        assert f"r = {r}; the paper does not say r: no other fits" in row.how


def test_which_bottlenecks_would_fit() -> None:
    small, large = rows("lora-glue", "RoBERTa base", "Adapter^D")
    assert bottlenecks(large) == list(range(46, 52))
    assert 48 in bottlenecks(small)
    assert bottlenecks(replace(small, config={})) == [14, 15, 16, 17, 18]  # in all layers
    for kind in "PH":
        wide, _ = rows("lora-glue", "RoBERTa large", f"Adapter^{kind}")
        assert bottlenecks(wide) == [60, 61]
    (row,) = rows("lora-gpt2", "GPT-2 M", "Adapter^H")
    assert bottlenecks(row) == []
    assert [round(derived(row, reduction_factor=1024 / r).value, 2) for r in (112, 113)] == [11.06, 11.16]
    assert row.published == rows("lora-gpt2", "GPT-2 M", "Adapter^L")[1].published


def test_what_the_notes_say_of_lora() -> None:
    (deberta,) = rows("lora-glue", "DeBERTa XXL", "LoRA")
    assert not derived(deberta).agrees
    assert derived(deberta, r=16).agrees
    for named, size, places in (("GPT-2 M", 354.92, (0.34, 0.37)), ("GPT-2 L", 774.03, (0.74, 0.78))):
        for label in ("LoRA", "PreLayer"):
            (row,) = rows("lora-gpt2", named, label)
            assert row.published == f"{size / 1000:.2f}M"  # 0.1 %
        n = int(re.findall(r"(\d+) places", row.how)[0]) - (named == "GPT-2 L")
        assert tuple(round(derived(row, num_virtual_tokens=k).value, 2) for k in (n, n + 1)) == places
    for row in TABLES["lora-gpt3-more"].rows:
        if row.why.startswith("cut off"):
            assert int(derived(row).value * 10) / 10 == reading(row)[0]


def test_what_the_notes_say_of_gpt3() -> None:
    full, bias = (rows("lora-gpt3", "GPT-3", label)[0] for label in ("FT", "BitFit"))
    assert round(-derived(full).difference, 1) == 651.5
    assert round(50257 * 12288 / 1e6, 1) == 617.6
    assert round(12 * 96 * 12288 / 1e6, 1) == reading(bias)[0]
    for row in rows("lora-gpt3-more", "GPT-3", "PreLayer"):
        assert 1.007 < reading(row)[0] / derived(row).value < 1.085
    (checkpoint,) = rows("lora-gpt3", "GPT-3", "LoRA, checkpoint")
    assert (round(derived(checkpoint).value, 1), round(derived(checkpoint).exact / 2**20, 1)) == (37.7, 36.0)


def test_what_the_notes_say_of_prompts() -> None:
    """The slips of Lester et al.'s table 4, each as it came about; all other numbers are right to the last digit."""
    known = {row.published: derived(row) for row in TABLES["prompt-tuning"].rows if row.why}
    small, both, cut = known["10,420"], known["76,971,572"], (known["0.00143%"], known["0.00718%"])
    assert (small.exact, both.exact + 10_420 - 10_240) == (20 * 512, 76_971_572)
    assert f"{known['0.01907%'].value:.5f}" == "0.01307"
    assert known["11,137,380,352"].exact + 2_048_000 - 204_800 == 11_137_380_352
    assert [int(d.value * 1e5) for d in cut] == [143, 718]
    assert len(known) == 6


# ── the models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def built() -> Iterator[tuple[str, dict[str, Any]]]:
    """The presets, and what the tables make of them."""
    yield from PRESETS.items()
    for preset, own in MODELS.values():
        if own and "model_type" not in own:
            yield preset, PRESETS[preset] | dict(own)


@pytest.mark.peft
@pytest.mark.parametrize(("name", "config"), list(built()))
def test_a_model_has_the_parameters_that_transformers_gives_it(name: str, config: dict[str, Any]) -> None:
    """By name and shape; GPT-3's, which HF has not, are as many as GPT-2's would be."""
    import torch
    import transformers

    model_class = getattr(transformers, config["architectures"][0].replace("GPT3", "GPT2"))
    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        theirs = model_class(model_class.config_class(**fields))
    expected = {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    if config["model_type"] == "t5" and not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = expected["shared.weight"]  # transformers 5 ties it until it reads a file
    ours = outlines.of_config(config)
    found = {n: a.shape for n, a in ours.params.items() if n not in ours.config.buffers}
    if name == "gpt3":
        assert sum(p.numel() for p in theirs.parameters()) == count(outline("full", {}, ours), ours).model
    else:
        assert found == expected


def test_the_sizes_that_everybody_knows() -> None:
    """From model cards: LLaMA 6.7B and 13.0B, LLaMA-2 70B 69.0B, LLaMA-3 8.03B, T5 60M to 11B, BERT 110M and 340M."""
    known = {
        "llama-7b": 6.7e9, "llama-13b": 13.0e9, "llama2-70b": 69.0e9, "llama3-8b": 8.03e9, "llama3-70b": 70.6e9,
        "t5-small": 60e6, "t5-11b": 11.3e9, "t5-v1.1-xxl": 11.1e9, "bert-base": 110e6, "gpt2": 124e6, "gpt2-xl": 1.56e9,
    }  # fmt: skip
    for name, size in known.items():
        ours = outlines.model(name)
        assert count(outline("full", {}, ours), ours).model == pytest.approx(size, rel=0.01)


def test_other_names_are_of_models_that_are_there() -> None:
    assert set(ALIASES.values()) <= set(PRESETS)
    assert not ALIASES.keys() & PRESETS.keys()
    assert outlines.config("DeBERTa-XXL") == outlines.config("deberta-v2-xxlarge") == PRESETS["deberta-v2-xxlarge"]
    assert all(preset in PRESETS for preset, _ in MODELS.values())


def test_what_is_trained_in_deberta() -> None:
    """The convolution after the first layer, and the positions that all layers share, are at the bottom."""
    ours = outlines.model("deberta-v2-xxlarge", "DebertaV2ForSequenceClassification")
    top = outline("partial", {"layers": 1}, ours).params
    assert set(top) == {n for n in ours.params if n.startswith(("deberta.encoder.layer.47.", "pooler.", "classifier."))}
    assert "encoder.conv.conv.bias" in outline("bitfit", {}, outlines.model("deberta-v2-xxlarge")).params
    with pytest.raises(ValueError, match=r"encoder\.conv\.conv, a convolution, which has no matrix"):
        outline("lora", {"target_modules": ["conv.conv"]}, ours)
