"""An English model learns Russian: new tokens first, then in stages, as Chinese LLaMA came to be.

    python examples/staged_vocabulary.py [--out FOLDER] [--quick]          needs refpeft[examples]

A small LLaMA is trained on the English that Python carries (its own help texts). To it, Russian is a row of bytes, two
to a letter. As in Cui, Yang & Yao 2023 (arXiv 2304.08177) a second tokenizer, trained on Russian, is merged into the
first; embedding and head get a row for every new token; and then three stages follow, each an adapter that is saved,
merged, and the base of the next: the embedding alone; LoRA on attention with embedding and head whole; LoRA on all
linear layers, for instructions. The Russian is 156 sentences about a village (staged_vocabulary.txt), a fifth of which
is kept for the test. Losses are in bits per character, since tokens of different tokenizers cannot be compared.

The same stages without new tokens are run beside it. A minute or two; the folders that are left can be used on:
`refpeft train`, `refpeft export`, transformers.
"""

import argparse
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices as small as these gain nothing from two threads of BLAS
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import refpeft
from refpeft import objectives, train
from refpeft.checkpoint import tokens
from refpeft.checkpoint.families import plan as planned

END = 0  # <|end|>: begins and ends every text
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 176, "max_position_embeddings": 256,
    "bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
STAGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("partial", {"layers": 0, "head": False, "modules_to_save": ["embed_tokens"]}),
    "attention": ("lora", {"r": 8, "lora_alpha": 32, "target_modules": ATTENTION,
                           "modules_to_save": ["embed_tokens", "lm_head"]}),
    "instructions": ("lora", {"r": 8, "lora_alpha": 32, "target_modules": ATTENTION + MLP}),
}  # fmt: skip
RATES = {"embedding": 1e-2, "attention": 4e-3, "instructions": 2e-3}
Row = dict[str, list[int]]
GOAL = objectives.make("causal", objectives.Setting(pad_id=END))


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pretraining: int = 500
    vocabulary: int = 640
    pieces: int = 560
    steps: Mapping[str, int] = field(default_factory=lambda: {"embedding": 100, "attention": 100, "instructions": 100})


QUICK = Size(60, 400, 420, {"embedding": 30, "attention": 30, "instructions": 20})


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Texts:
    english: Sequence[str]
    english_test: Sequence[str]
    russian: Sequence[str]
    russian_test: Sequence[str]


def texts() -> Texts:
    """English in pieces of 120 characters, Russian in sentences; of both some for the test."""
    english = " ".join(" ".join(topics.values()).split())
    chunks = [english[n : n + 120] for n in range(0, len(english), 120)]
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    test = set(range(4, len(lines), 5))
    kept, tested = ([s for n, s in enumerate(lines) if (n in test) == t] for t in (False, True))
    return Texts(chunks[50:], chunks[:50], kept, tested)


def tokenizer(lines: Sequence[str], size: int) -> Any:
    """Byte-level BPE."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False, min_frequency=2
        ),
    )
    return t


def rows(t: Any, lines: Sequence[str]) -> list[Row]:
    return [{"input_ids": [END], "labels": [*t.encode(line).ids, END]} for line in lines]


def instructions(t: Any, lines: Sequence[str]) -> list[Row]:
    """'Дополни (complete): Кошка спит' → ' на печи.'"""
    found = []
    for line in lines:
        at = line.index(" ", len(line) // 2 - 2)
        question, answer = f"Дополни: {line[:at]} …\n", line[at:]
        found.append({"input_ids": [END, *t.encode(question).ids], "labels": [*t.encode(answer).ids, END]})
    return found


def length(t: Any, lines: Sequence[str]) -> float:
    """Tokens per character."""
    return sum(len(t.encode(line).ids) for line in lines) / sum(map(len, lines))


# ── training, and what it comes to ───────────────────────────────────────────────────────────────────────────────────


def fresh(size: int) -> refpeft.Model:
    """LLaMA with random weights: N(0, 0.02²), norms 1."""
    p = planned({**CONFIG, "vocab_size": size})
    rng = np.random.default_rng(0)
    params = {n: np.ones(s) if len(s) == 1 else rng.normal(0, 0.02, s) for n, s in p.shapes.items()}
    params = {n: a.astype(np.float32) for n, a in params.items()}
    return refpeft.Model(p.config, p.sites, params, {**CONFIG, "vocab_size": size})


def trained(model: refpeft.Model, adapter: refpeft.Adapter, data: Sequence[Row], plan: train.Plan) -> refpeft.Adapter:
    state = train.start(plan, adapter)
    while state.step < plan.steps:
        state = train.step(plan, model, adapter, GOAL, data, state)
    return train.trained(adapter, state)


def bits(model: refpeft.Model, data: Sequence[Row], t: Any) -> float:
    """Bits per character of what is to be predicted, the end of the text included."""
    rng, total = np.random.default_rng(0), 0.0
    for n in range(0, len(data), 16):
        batch = GOAL.batch(data[n : n + 16], rng)
        logits, _ = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        L, _, count = GOAL.loss(logits, batch)
        total += float(L) * count
    return total / math.log(2) / sum(len(t.decode(row["labels"])) for row in data)


@dataclass(frozen=True)
class Score:
    """After one stage: how many parameters it trained, and bits per character of the test texts."""

    stage: str
    parameters: int
    russian: float
    english: float
    answers: float


def score(stage: str, parameters: int, model: refpeft.Model, t: Any, data: Texts) -> Score:
    tests = rows(t, data.russian_test), rows(t, data.english_test), instructions(t, data.russian_test)
    return Score(stage, parameters, *(bits(model, test, t) for test in tests))


def stage(name: str, model: refpeft.Model, t: Any, data: Texts, size: Size) -> refpeft.Adapter:
    method, config = STAGES[name]
    work = instructions(t, data.russian) if name == "instructions" else rows(t, data.russian)
    plan = train.Plan(size.steps[name], batch=16, lr=RATES[name], schedule="cosine", warmup=5, clip=1.0)
    return trained(model, refpeft.init(method, config, model), work, plan)


def chain(model: refpeft.Model, t: Any, data: Texts, size: Size, out: Path) -> list[Score]:
    """The stages one after the other: each adapter is saved, and merged into the base of the next."""
    scores = [score("before", 0, model, t, data)]
    for name in STAGES:
        adapter = stage(name, model, t, data, size)
        refpeft.save_adapter(adapter, out / f"{name}-adapter")
        model = refpeft.merge(model, adapter)
        save(model, t, out / name)
        scores.append(score(name, sum(a.size for a in adapter.params.values()), model, t, data))
    return scores


def save(model: refpeft.Model, t: Any, folder: Path) -> None:
    """As `refpeft merge` does: an HF folder with its tokenizer."""
    refpeft.save(model, folder)
    t.save(str(folder / tokens.FILE))


def answer(model: refpeft.Model, t: Any, question: str, most: int = 40) -> str:
    """The likeliest token after the other, until the text ends."""
    ids, cache, found = np.array([[END, *t.encode(question).ids]]), None, []
    while len(found) < most:
        logits, cache = model.decode(ids, cache)
        ids = logits[:, -1:].argmax(-1)
        if ids[0, 0] == END:
            break
        found.append(int(ids[0, 0]))
    return str(t.decode(found))


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────

Lengths = Mapping[str, tuple[float, float]]  # language → tokens per character, with the old tokenizer and the new
Scores = Mapping[str, Sequence[Score]]  # with the new tokens, and with the old ones only


def show(console: Console, lengths: Lengths, inits: Mapping[str, tuple[float, float]], scores: Scores) -> None:
    for title, head, lines in (
        ("tokens per character", ("", "before", "after"), [(n, *map(two, pair)) for n, pair in lengths.items()]),
        (
            "Russian with the new tokens, bits per character, by what their rows start from",
            ("", "untrained", "after the embedding stage"),
            [(n, *map(two, pair)) for n, pair in inits.items()],
        ),
        *(
            (
                f"stages with the {which} tokens, bits per character",
                ("", "trained", "Russian", "answers", "English"),
                [(s.stage, f"{s.parameters:,}", two(s.russian), two(s.answers), two(s.english)) for s in found],
            )
            for which, found in scores.items()
        ),
    ):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0), header_style="bold")
        for n, name in enumerate(head):
            table.add_column(name, justify="right" if n else "left")
        for line in lines:
            table.add_row(*line)
        console.print()
        console.print(table)


def two(x: float) -> str:
    return f"{x:.2f}"


def plot(file: Path, lengths: Lengths, scores: Scores) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", gridspec_kw={"width_ratios": [1, 2]}
    )
    places = np.arange(len(lengths))
    for n, (label, colour) in enumerate((("before", "tab:gray"), ("with new tokens", "tab:blue"))):
        bars = left.bar(
            places + 0.38 * n - 0.19, [pair[n] for pair in lengths.values()], 0.36, color=colour, label=label
        )
        left.bar_label(bars, fmt="%.2f", padding=2)
    left.set_xticks(places, list(lengths))
    left.set(title="Length of texts", ylabel="tokens per character")
    left.margins(y=0.3)
    left.legend()
    for which, style in (("new", "o-"), ("old", "s--")):
        found = scores[which]
        for language, colour in (("russian", "tab:blue"), ("english", "tab:orange")):
            values = [getattr(s, language) for s in found]
            right.plot(range(len(found)), values, style, color=colour, label=f"{language.title()}, {which} tokens")
    right.margins(x=0.09)
    right.set_xticks(range(len(scores["new"])), [s.stage for s in scores["new"]])
    right.set(title="Loss after each stage", ylabel="bits per character", yscale="log")
    right.yaxis.set_major_locator(ticker.FixedLocator([1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30]))
    right.yaxis.set_major_formatter(ticker.ScalarFormatter())
    right.yaxis.set_minor_locator(ticker.NullLocator())
    right.grid(axis="y", alpha=0.3)
    right.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


# ── the example ──────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("out/staged-vocabulary"), help="where folders and plot go")
    parser.add_argument("--quick", action="store_true", help="a small size, with checks that can fail")
    options = parser.parse_args()
    size, start, out = QUICK if options.quick else Size(), time.perf_counter(), options.out
    for name in ("new", "old"):
        (out / name).mkdir(parents=True, exist_ok=True)
    data, console = texts(), Console(highlight=False)

    def tell(what: str) -> None:
        console.print(f"{what}, after {time.perf_counter() - start:.0f} s")

    old = tokenizer(data.english, size.vocabulary)
    model = fresh(old.get_vocab_size())
    plan = train.Plan(size.pretraining, batch=16, lr=4e-3, schedule="cosine", warmup=20, clip=1.0)
    model = refpeft.merge(model, trained(model, refpeft.init("full", {}, model), rows(old, data.english), plan))
    save(model, old, out / "english")
    tell(f"an English model of {sum(a.size for a in model.params.values()):,} parameters")

    new, pieces, made = tokens.merged(old, tokenizer(data.russian, size.pieces))
    starts = {init: refpeft.extend_vocabulary(model, made, init, old, 8) for init in ("mean", "subword_mean", "normal")}
    save(starts["mean"], new, out / "extended")
    scores = {"new": chain(starts["mean"], new, data, size, out / "new")}
    tell(f"{len(pieces)} new tokens, and three stages")
    scores["old"] = chain(model, old, data, size, out / "old")
    tell("the same without new tokens")

    test = rows(new, data.russian_test)
    inits = {}
    for init, m in starts.items():
        first = refpeft.merge(m, stage("embedding", m, new, data, size))
        inits[init] = bits(m, test, new), bits(first, test, new)
    lengths = {
        name: (length(old, lines), length(new, lines))
        for name, lines in (("English", data.english_test), ("Russian", data.russian_test))
    }
    show(console, lengths, inits, scores)
    last, words = refpeft.load(out / "new" / "instructions"), tokens.read(out / "new" / "instructions")
    console.print()
    for line in data.russian_test[:4]:
        question = "Дополни: " + line[: line.index(" ")] + " …\n"
        console.print(f"{question.strip()}{answer(last, words, question)}")
    file = out / "staged-vocabulary.png"
    plot(file, lengths, scores)
    console.print()
    tell(str(file))
    if options.quick:
        check(out, model, starts["mean"], old, data, lengths, scores)


def check(
    out: Path, model: refpeft.Model, extended: refpeft.Model, old: Any, data: Texts, lengths: Lengths, scores: Scores
) -> None:
    """What the paper says, as far as a short run can show it, and that the folders hold what was measured."""
    before, after = lengths["Russian"]
    assert after < before / 2, f"Russian takes {after:.2f} tokens per character, {before:.2f} before"
    assert lengths["English"][0] == lengths["English"][1], f"English is cut otherwise than before: {lengths['English']}"
    english = rows(old, data.english_test)
    v, v1 = len(model.params["lm_head.weight"]), len(extended.params["lm_head.weight"])
    most = math.log2(v1 / v) * sum(len(row["labels"]) for row in english) / sum(map(len, data.english_test))
    lost = bits(extended, english, old) - bits(model, english, old)
    assert 0 < lost < most, f"English lost {lost:.3f} bits by new rows, which can be {most:.3f} at most"
    for which, found in scores.items():
        start, embedding, attention, instructions = found
        assert start.russian > embedding.russian > attention.russian, f"{which} tokens: the loss did not fall: {found}"
        assert instructions.answers < attention.answers, f"{which} tokens: instructions were not learnt: {found}"
    assert scores["new"][2].russian < scores["old"][2].russian, "new tokens did not help"
    assert scores["new"][2].english < scores["new"][0].english + 1.5, f"English is forgotten: {scores['new']}"
    folder = out / "new" / "instructions"
    again = score("again", 0, refpeft.load(folder), tokens.read(folder), data)
    assert math.isclose(again.russian, scores["new"][-1].russian, rel_tol=1e-6), (
        f"the folder holds something else: {again}"
    )
    print("As the paper says: shorter texts, and a lower loss stage by stage.")


if __name__ == "__main__":
    main()
