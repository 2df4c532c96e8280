"""Published parameter counts, as data: what a paper's table says, and the method and config from which we derive it.

A row is derived by the same count as everything else (`refpeft.count`), from what the paper says of the method. Where
that does not give the published number, `why` says what differs, and the formula is left as it is. Where the paper does
not say a hyperparameter, `how` says so, and which value was taken.

In the LoRA paper (Hu et al. 2021, arXiv 2106.09685, §5.1), with d the width of the model and L its layers:

    LoRA        2 d r          for each adapted matrix               PreEmbed    d (l_p + l_i)
    Adapter     2 d r + r + d  for each adapter                      PreLayer    L d (l_p + l_i)
                + 2 d          for each trained LayerNorm

Adapter^H has two adapters in each layer (`houlsby`), Adapter^P, Adapter^L and Adapter^D one (`pfeiffer`), Adapter^L
with a LayerNorm before it, Adapter^D in some of the layers. PreEmbed is `prompt_tuning`. PreLayer is no method here: it
replaces hidden states, while `prefix_tuning` adds keys and values, which are twice as many.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refpeft.count import count, outline
from refpeft.model import Model

Json = Mapping[str, Any]
QV, QKVO = (
    ("query", "value", "query_proj", "value_proj", "q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
)


@dataclass(frozen=True)
class Row:
    """`published` is as in the paper ('0.3M', '0.83%', '350GB', '76,961,664'), rounded to its last digit, or to
    `digits`. A share is of model and adapter together, and so is a number `of_both`."""

    model: str  # a key of MODELS
    label: str
    published: str
    how: str
    method: str = "full"
    config: Json = field(default_factory=dict)
    plus: tuple[str, Json] | None = None  # a second method beside the first
    why: str = ""  # the published number is not what the paper's description gives
    digits: int | None = None
    of_both: bool = False


@dataclass(frozen=True)
class Table:
    source: str
    rows: Sequence[Row]


APART = {"model_type": "gpt3"}  # GPT-2 with queries, keys and values in layers of their own
CLASSES = {"architectures": ["RobertaForSequenceClassification"]}
MODELS: Mapping[str, tuple[str, Json]] = {  # a name in the tables → a preset, and what is to be changed in it
    "RoBERTa base": ("roberta-base", CLASSES),
    "RoBERTa large": ("roberta-large", CLASSES),
    "DeBERTa XXL": ("deberta-v2-xxlarge", {"architectures": ["DebertaV2ForSequenceClassification"]}),
    "GPT-2 M": ("gpt2-medium", APART),
    "GPT-2 L": ("gpt2-large", APART),
    "GPT-3": ("gpt3", {}),
    "LLaMA-7B": ("llama-7b", {}),
    "LLaMA-13B": ("llama-13b", {}),
    "LLaMA2-7B": ("llama2-7b", {}),
    "LLaMA3-8B": ("llama3-8b", {}),
    **{f"T5 {size}": (f"t5-v1.1-{size.lower()}", {}) for size in ("Small", "Base", "Large", "XL", "XXL")},
}


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def full(model: str, published: str, how: str = "all tensors", **rest: Any) -> Row:
    return Row(model, "FT", published, how, **rest)


def lora(model: str, published: str, r: int, label: str = "LoRA", on: Sequence[str] = QV, **rest: Any) -> Row:
    where = {QV: "W_q and W_v", QKVO: "W_q, W_k, W_v, W_o", ("v_proj",): "W_v"}[tuple(on)]
    return Row(
        model, label, published, f"2 d r on {where}, r = {r}", "lora", {"r": r, "target_modules": list(on)}, **rest
    )


def adapter(model: str, kind: str, published: str, r: int, d: int, said: str = "", **rest: Any) -> Row:
    """Adapter^H, ^P, ^L, ^D with a bottleneck of r."""
    config: dict[str, Any] = {"reduction_factor": d / r}
    how = f"2 d r + r + d, {'two' if kind == 'H' else 'one'} in each layer, r = {r}"
    if kind == "H":
        config["train_norms"] = False
    if kind == "L":
        config, how = config | {"ln_before": True}, f"2 d r + r + 3 d, one in each layer, r = {r}"
    if kind == "D" and (dropped := rest.pop("dropped", 0)):
        config, how = (
            config | {"leave_out": list(range(dropped))},
            f"2 d r + r + d, one in each but {dropped} layers, r = {r}",
        )
    method = "houlsby" if kind == "H" else "pfeiffer"
    return Row(model, f"Adapter^{kind}", published, how + said, method, config, **rest)


def embed(published: str, p: int, i: int, **rest: Any) -> Row:
    return Row(
        "GPT-3", "PreEmbed", published, f"d (l_p + l_i), l_p = {p}, l_i = {i}", "prompt_tuning", words(p + i), **rest
    )


def layer(model: str, published: str, n: int, how: str, **rest: Any) -> Row:
    return Row(model, "PreLayer", published, f"L d (l_p + l_i), {how}", "prefix_layer", words(n), **rest)


def words(n: int) -> dict[str, Any]:
    return {"num_virtual_tokens": n}


def dora(model: str, published: str, label: str, r: int) -> Row:
    name = "lora" if label == "LoRA" else "dora"
    on = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    how = f"r = {r} on q, k, v, up and down; of model and adapter together"
    return Row(model, label, published, how, name, {"r": r, "target_modules": on})


UNSAID = "; the paper does not say r: {}"
ONLY = UNSAID.format("no other fits")
NAME = "{} is the model's name, rounded; {}"
PRELAYER = "more than L d (l_p + l_i); all five counts of PreLayer in table 15 are, by 1 to 8 %, and nothing says why"
TENTH = "0.1 % of the model, as Li & Liang 2021 put it: {}"

GLUE = Table(
    "Hu et al. 2021, arXiv 2106.09685, table 2; hyperparameters: tables 9 and 10",
    (
        full("RoBERTa base", "125.0M", why=NAME.format("125M", "with its classifier it has 124.6M")),
        Row("RoBERTa base", "BitFit", "0.1M", "all biases", "bitfit"),
        adapter("RoBERTa base", "D", "0.3M", 48, 768, UNSAID.format("16 in all layers fits too"), dropped=8),
        adapter("RoBERTa base", "D", "0.9M", 48, 768, UNSAID.format("46 to 51 fit")),
        lora("RoBERTa base", "0.3M", 8),
        full("RoBERTa large", "355.0M", why=NAME.format("355M", "with its classifier it has 355.4M")),
        lora("RoBERTa large", "0.8M", 8),
        adapter("RoBERTa large", "P", "3.0M", 64, 1024, why="r = 64 (table 9) makes 3.2M; 3.0M would be r = 60 or 61"),
        adapter("RoBERTa large", "P", "0.8M", 16, 1024),
        adapter("RoBERTa large", "H", "6.0M", 64, 1024, why="r = 64 (table 9) makes 6.3M; 6.0M would be r = 60 or 61"),
        adapter("RoBERTa large", "H", "0.8M", 8, 1024),
        lora("RoBERTa large", "0.8M", 8, "LoRA†"),
        full("DeBERTa XXL", "1500.0M", why=NAME.format("1.5B", "deberta-v2-xxlarge has 1566.9M with its classifier")),
        lora("DeBERTa XXL", "4.7M", 8, why="r = 8 (table 10) makes 2.4M; the released scripts have r = 16: 4.7M"),
    ),
)  # fmt: skip

GPT2 = Table(
    "Hu et al. 2021, arXiv 2106.09685, table 3; hyperparameters: table 11",
    (
        full("GPT-2 M", "354.92M", why="0.1M more than GPT-2 medium has, and nothing says which"),
        adapter("GPT-2 M", "L", "0.37M", 6, 1024, ONLY),
        adapter("GPT-2 M", "L", "11.09M", 224, 1024, ONLY),
        adapter("GPT-2 M", "H", "11.09M", 112, 1024, UNSAID.format("this is the nearest"),
                why="no r fits: 112 makes 11.06M and 113 makes 11.16M; 11.09M is what Adapter^L has above"),
        Row("GPT-2 M", "FT^Top2", "25.19M", "the last two layers", "partial", {"layers": 2, "head": False}),
        layer("GPT-2 M", "0.35M", 14, "14 places; the paper does not say how many",
              why=TENTH.format("no number of places fits, 14 make 0.34M and 15 make 0.37M")),
        lora("GPT-2 M", "0.35M", 4, why=TENTH.format("r = 4 (table 11) makes 0.39M")),
        full("GPT-2 L", "774.03M"),
        adapter("GPT-2 L", "L", "0.88M", 8, 1280, ONLY),
        adapter("GPT-2 L", "L", "23.00M", 248, 1280, ONLY),
        layer("GPT-2 L", "0.77M", 17, "17 places; the paper does not say how many",
              why=TENTH.format("no number of places fits, 16 make 0.74M and 17 make 0.78M")),
        lora("GPT-2 L", "0.77M", 4, why=TENTH.format("r = 4 (table 11) makes 0.74M")),
    ),
)  # fmt: skip

GPT3_FULL = (
    "651.5M more than GPT-2's layers have with 96 layers, d = 12,288, 50,257 words, 2,048 positions and a tied head; "
    "a head of its own would be 617.6M of them"
)
GPT3 = Table(
    "Hu et al. 2021, arXiv 2106.09685, table 4; hyperparameters: §D.4; checkpoints: §4.2",
    (
        full("GPT-3", "175,255.8M", why=GPT3_FULL),
        Row("GPT-3", "BitFit", "14.2M", "all biases, those of the norms too: 11 L d + d", "bitfit",
            why="14.2M is 12 L d: one bias of width d more in each layer than GPT-2's layers have"),
        embed("3.2M", 256, 8),
        layer("GPT-3", "20.2M", 16, "l_p = 8, l_i = 8", why=PRELAYER),
        adapter("GPT-3", "H", "7.1M", 1, 12288),
        adapter("GPT-3", "H", "40.1M", 8, 12288),
        lora("GPT-3", "4.7M", 1),
        lora("GPT-3", "37.7M", 8),
        Row("GPT-3", "FT, checkpoint", "350GB", "all tensors in 16 bits", "full", digits=-1),
        lora("GPT-3", "35MB", 4, "LoRA, checkpoint",
             why="18.9M numbers in 16 bits are 37.7 MB, or 36.0 MiB; the paper rounds them to 18M (§7.1)"),
    ),
)  # fmt: skip

CUT = "cut off, not rounded, as all counts of LoRA in this table"
GPT3_MORE = Table(
    "Hu et al. 2021, arXiv 2106.09685, table 15",
    (
        full("GPT-3", "175B", why=""),
        embed("0.4M", 32, 8, why="0.4M is l_p = 32 alone: with l_i = 8 it is 0.5M"),
        embed("0.9M", 64, 8),
        embed("1.7M", 128, 8),
        embed("3.2M", 256, 8),
        embed("6.4M", 512, 8),
        *(layer("GPT-3", m, p + i, f"l_p = {p}, l_i = {i}", why=PRELAYER)
          for m, p, i in (("5.1M", 2, 2), ("10.1M", 8, 0), ("20.2M", 8, 8), ("44.1M", 32, 4), ("76.1M", 64, 0))),
        *(adapter("GPT-3", "H", m, r, 12288)
          for m, r in (("7.1M", 1), ("21.2M", 4), ("40.1M", 8), ("77.9M", 16), ("304.4M", 64))),
        lora("GPT-3", "4.7M", 2, on=("v_proj",)),
        lora("GPT-3", "4.7M", 1),
        lora("GPT-3", "9.4M", 2),
        lora("GPT-3", "9.4M", 1, on=QKVO),
        lora("GPT-3", "18.8M", 4, why=CUT),
        lora("GPT-3", "18.8M", 2, on=QKVO, why=CUT),
        lora("GPT-3", "37.7M", 8),
        lora("GPT-3", "37.7M", 4, on=QKVO),
        lora("GPT-3", "301.9M", 64, why=CUT),
        lora("GPT-3", "603.8M", 64, on=QKVO, why="twice the 301.9M above, which was cut off before"),
        *(lora("GPT-3", m, r, "LoRA+PE", plus=("prompt_tuning", words(12)), why=why)
          for m, r, why in (("37.8M", 8, CUT), ("151.1M", 32, ""), ("302.1M", 64, ""))),
        lora("GPT-3", "52.8M", 8, "LoRA+PL", plus=("prefix_layer", words(12)), why=PRELAYER),
    ),
)  # fmt: skip

DORA = Table(
    "Liu et al. 2024, arXiv 2402.09353, table 1; hyperparameters: tables 8 and 9",
    tuple(
        dora(model, published, label, r)
        for model, counts in {
            "LLaMA-7B": ("0.83%", "0.43%", "0.84%"),
            "LLaMA-13B": ("0.67%", "0.35%", "0.68%"),
            "LLaMA2-7B": ("0.83%", "0.43%", "0.84%"),
            "LLaMA3-8B": ("0.70%", "0.36%", "0.71%"),
        }.items()
        for published, (label, r) in zip(counts, (("LoRA", 32), ("DoRA†", 16), ("DoRA", 32)), strict=True)
    ),
)

PROMPTS = {  # rows of the prompt → its parameters, those of prompt and model, and the share
    "Small": """
          1      512      76,961,664 0.00067%
          5    2,560      76,963,712 0.00333%
         20   10,420      76,971,572 0.01330%
         50   25,600      76,986,752 0.03325%
        100   51,200      77,012,352 0.06648%
        150   76,800      77,037,952 0.09969%""",
    "Base": """
          1      768     247,578,624 0.00031%
          5    3,840     247,581,696 0.00155%
         20   15,360     247,593,216 0.00620%
         50   38,400     247,616,256 0.01551%
        100   76,800     247,654,656 0.03101%
        150  115,200     247,693,056 0.04651%""",
    "Large": """
          1    1,024     783,151,104 0.00013%
          5    5,120     783,155,200 0.00065%
         20   20,480     783,170,560 0.00262%
         50   51,200     783,201,280 0.00654%
        100  102,400     783,252,480 0.01907%
        150  153,600     783,303,680 0.01961%""",
    "XL": """
          1    2,048   2,849,759,232 0.00007%
          5   10,240   2,849,767,424 0.00036%
         20   40,960   2,849,798,144 0.00143%
         50  102,400   2,849,859,584 0.00359%
        100  204,800   2,849,961,984 0.00718%
        150  307,200   2,850,064,384 0.01078%""",
    "XXL": """
          1    4,096  11,135,336,448 0.00004%
          5   20,480  11,135,352,832 0.00018%
         20   81,920  11,135,414,272 0.00074%
         50  204,800  11,137,380,352 0.00184%
        100  409,600  11,135,741,952 0.00368%
        150  614,400  11,135,946,752 0.00552%""",
}
SLIPS = {  # what the paper prints → how that came about, as it seems
    "10,420": "two digits changed places: 20 · 512 = 10,240",
    "76,971,572": "the sum with the 10,420 above",
    "0.01907%": "one digit is another: 102,400 of 783,252,480 are 0.01307 %",
    "0.00143%": "cut off, not rounded",
    "0.00718%": "cut off, not rounded",
    "11,137,380,352": "the sum with 2,048,000 in the place of 204,800",
}


def prompts() -> Iterator[Row]:
    for size, lines in PROMPTS.items():
        for line in lines.split("\n")[1:]:
            n, *counts = line.split()
            labels = (f"prompt of {n}", "… and model", "… its share")
            hows = (f"n d, n = {n}", "n d and the model", "n d of n d and the model")
            for published, label, how in zip(counts, labels, hows, strict=True):
                both = label.endswith("model")
                why = SLIPS.get(published, "")
                yield Row(f"T5 {size}", label, published, how, "prompt_tuning", words(int(n)), why=why, of_both=both)


LESTER = Table("Lester et al. 2021, arXiv 2104.08691, table 4; T5 1.1 with LM adaptation", tuple(prompts()))

TABLES: Mapping[str, Table] = {
    "lora-glue": GLUE,
    "lora-gpt2": GPT2,
    "lora-gpt3": GPT3,
    "lora-gpt3-more": GPT3_MORE,
    "dora": DORA,
    "prompt-tuning": LESTER,
}


# ── deriving them ────────────────────────────────────────────────────────────────────────────────────────────────────

UNITS = {"": 1, "M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9, "%": 0.01}


@dataclass(frozen=True)
class Derived:
    """`value` and `published` are in the unit of the table; `agrees`: they are the same, rounded as published."""

    row: Row
    exact: float
    value: float
    published: float
    unit: str
    digits: int

    @property
    def agrees(self) -> bool:
        return round(self.value, self.digits) == round(self.published, self.digits)

    @property
    def difference(self) -> float:
        return self.value - self.published


def derive(row: Row, model: Model) -> Derived:
    """The number that a row publishes, from shapes. `model`: MODELS[row.model]."""
    published, unit, digits = reading(row)
    parts = [parameters(m, cfg, model) for m, cfg in ((row.method, row.config), *([row.plus] if row.plus else []))]
    exact: float = sum(parts)
    if unit == "%" or row.of_both:
        found = count(outline(row.method, row.config, model), model)
        exact = found.share_of_both if unit == "%" else found.model + found.added
    if unit.endswith("B") and unit != "B":
        exact *= 2  # bytes of a number in 16 bits
    return Derived(row, exact, exact / UNITS[unit], published, unit, digits)


def reading(row: Row) -> tuple[float, str, int]:
    """'175,255.8M' → 175255.8, 'M', 1"""
    m = re.fullmatch(r"([\d,]+(?:\.(\d+))?)(\D*)", row.published)
    assert m is not None, row.published
    return float(m[1].replace(",", "")), m[3], len(m[2] or "") if row.digits is None else row.digits


def parameters(method: str, config: Json, model: Model) -> int:
    if method in FORMULAE:
        return FORMULAE[method](config, model)
    return count(outline(method, dict(config), model), model).trained


FORMULAE: Mapping[str, Callable[[Json, Model], int]] = {
    "prefix_layer": lambda cfg, m: m.config.num_layers * m.config.hidden_size * int(cfg["num_virtual_tokens"]),
}
