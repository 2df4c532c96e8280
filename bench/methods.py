"""One training step (forward, loss, all gradients) of each method: the specification against what people train it with.

    python bench/methods.py                       HF peft where it has the method, else plain torch
    python bench/methods.py --adapters PYTHON     and AdapterHub, by the Python of an environment that has it

GPT-2 of width 256 (P-tuning v2 and AdapterHub: BERT, with a class for each text), the same weights, batch and adapter
on both sides, two threads each; both losses must agree. As in `step.py`, they take turns, and a ratio is ours/theirs of
one round. HF peft 0.21 refuses P-tuning v2 with transformers 5.24 (docs/findings/peft-prefix-of-classifiers.md), and is
measured with the name of one argument put right.

DID and SAID have no row: none of the libraries has them. What they cost beside the model is in `fastfood.py`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.step import MALLOC, THREADS, Engine, turns, worker, write

LAYERS, WIDTH, HEADS, BATCH, TOKENS, VOCAB = 4, 256, 4, 2, 128, 5000
STEPS, ROUNDS, LIMIT = 4, 9, 1.0
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS,
    "vocab_size": VOCAB, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "vocab_size": VOCAB,
    "max_position_embeddings": 256, "type_vocab_size": 2, "num_labels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
LORA = {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
PREFIX = {"num_virtual_tokens": 10}
METHODS: Mapping[str, tuple[str, dict[str, Any], str]] = {  # row → our method, its config, who does it on their side
    "full fine-tuning": ("full", {}, "torch"),
    "partial (last 2 layers)": ("partial", {"layers": 2, "head": False}, "torch"),
    "BitFit": ("bitfit", {}, "torch"),
    "LayerNorm tuning": ("ln_tuning", {"target_modules": ["ln_1", "ln_2", "ln_f"]}, "LNTuningConfig"),
    "trainable tokens": (
        "trainable_tokens", {"token_indices": [5, 7, 11], "target_modules": ["wte"]}, "TrainableTokensConfig",
    ),
    "LoRA": ("lora", LORA, "LoraConfig"),
    "rsLoRA": ("rslora", LORA, "LoraConfig"),
    "DoRA": ("dora", LORA, "LoraConfig"),
    "prompt tuning": ("prompt_tuning", {"num_virtual_tokens": 20}, "PromptTuningConfig"),
    "P-tuning (MLP)": ("p_tuning", {"num_virtual_tokens": 20}, "PromptEncoderConfig"),
    "P-tuning (LSTM)": (
        "p_tuning", {"num_virtual_tokens": 20, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 128},
        "PromptEncoderConfig",
    ),
    "prefix tuning": ("prefix_tuning", PREFIX, "PrefixTuningConfig"),
    "prefix tuning (MLP)": ("prefix_tuning", {**PREFIX, "prefix_projection": True}, "PrefixTuningConfig"),
    "P-tuning v2": ("p_tuning_v2", PREFIX, "PrefixTuningConfig"),
    "Houlsby": ("houlsby", {"train_norms": False}, "AdapterHub"),
    "Pfeiffer": ("pfeiffer", {}, "AdapterHub"),
    "parallel": ("parallel", {}, "AdapterHub"),
}  # fmt: skip
MORE = {"rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}  # fields that only their config needs


def source(row: str) -> dict[str, Any]:
    return BERT if row == "P-tuning v2" or against(row) == "AdapterHub" else GPT2


def batch(row: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """ids [b, s], and labels: the ids themselves, or a class [b]."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, VOCAB, (BATCH, TOKENS))
    return ids, ids if source(row) is GPT2 else rng.integers(0, 3, BATCH)


# ── the two sides ────────────────────────────────────────────────────────────────────────────────────────────────────


def adapter_of(row: str, model: Any) -> Any:
    """Both sides begin with these numbers."""
    import refpeft

    method, fields, _ = METHODS[row]
    return refpeft.init(method, fields, model, seed=0)


def spec_step(row: str, folder: str) -> Callable[[], float]:
    import refpeft
    from refpeft.ops import cross_entropy

    model = refpeft.load(folder)
    adapter = adapter_of(row, model)
    ids, labels = batch(row)
    if labels.ndim > 1:
        extra = adapter.config.num_virtual_tokens if adapter.method in ("prompt_tuning", "p_tuning") else 0
        blank = np.full_like(labels[:, :1], -100)
        labels = np.concatenate([blank] * extra + [labels[:, 1:], blank], axis=1)
        if extra:  # the last row of the prompt predicts the first token
            labels[:, extra - 1] = ids[:, 0]

    def step() -> float:
        logits, vjp = model(ids, adapter)
        loss, vjp_loss = cross_entropy(logits, labels)
        vjp(vjp_loss(np.ones((), logits.dtype))[0]())
        return float(loss)

    return step


def their_step(row: str, folder: str) -> Callable[[], float]:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    kind = "GPT2LMHeadModel" if source(row) is GPT2 else "BertForSequenceClassification"
    model = getattr(transformers, kind).from_pretrained(folder)
    import refpeft

    adapter = adapter_of(row, refpeft.load(folder))
    if against(row) == "AdapterHub":
        of_adapterhub(model, adapter)
    else:
        model = of_torch(model, adapter) if against(row) == "torch" else of_peft(row, model, adapter)
    model.train()
    ids, labels = (torch.tensor(a) for a in batch(row))

    def step() -> float:
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return float(loss.item())

    return step


def of_torch(model: Any, adapter: Any) -> Any:
    """What is not trained needs no gradient."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in adapter.params)
    return model


def of_peft(row: str, model: Any, adapter: Any) -> Any:
    import peft
    import torch

    if row == "P-tuning v2":
        under_its_old_name(peft.peft_model)
    _, fields, name = METHODS[row]
    tasks = (
        {}
        if name in ("LoraConfig", "LNTuningConfig", "TrainableTokensConfig")
        else {"task_type": adapter.config.task_type}
    )
    model = peft.get_peft_model(model, getattr(peft, name)(**fields, **MORE.get(row, {}), **tasks))
    own = dict(model.named_parameters())
    for key, value in adapter.params.items():
        short = key.removeprefix("prompt_encoder.").replace("prompt_embeddings", "embedding.weight")
        prompt = "prompt_encoder.default." + short
        if prompt in own:
            own[prompt].data.copy_(torch.from_numpy(value))
    return model


def under_its_old_name(peft_model: Any) -> None:
    """HF peft looks for an argument `past_key_values`, which newer transformers call `cache` and take by both names."""
    inspect = peft_model.inspect

    def signature(f: Any) -> Any:
        names = inspect.signature(f).parameters
        return SimpleNamespace(parameters={"past_key_values" if n == "cache" else n: p for n, p in names.items()})

    peft_model.inspect = SimpleNamespace(**vars(inspect) | {"signature": signature})


def of_adapterhub(model: Any, adapter: Any) -> None:
    """By a folder, which both read."""
    import adapters

    import refpeft

    adapters.init(model)
    with tempfile.TemporaryDirectory() as scratch:
        refpeft.save_adapter(adapter, Path(scratch) / "adapter")
        model.load_adapter(str(Path(scratch) / "adapter"), load_as="own", use_safetensors=True)
    model.train_adapter("own")
    for name, p in model.named_parameters():  # AdapterHub trains the head always
        p.requires_grad_(".adapters." in name)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "FOLDER", "ROW"), help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, action="append", help="only these rows (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often they take turns (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--adapters", metavar="PYTHON", help="the Python of an environment with AdapterHub's adapters")
    parser.add_argument("--malloc-default", action="store_true", help="leave the C library's allocator as it comes")
    options = parser.parse_args()
    if options.malloc_default:
        MALLOC.clear()
    if options.worker:
        side, folder, row = options.worker
        worker(lambda: (spec_step if side == "spec" else their_step)(row, folder))
        return
    table = Table(title="One training step of each method, d=256, float32, 2 threads (medians)")
    for column in ("method", "against", "spec ms", "other ms", "ratio", "wanted", "spec MB", "other MB"):
        table.add_column(column, justify="left" if column in ("method", "against") else "right")
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for row in options.method or METHODS:
            if against(row) == "AdapterHub" and not options.adapters:
                print(
                    f"{row}: not measured, since AdapterHub needs an environment of its own (--adapters)",
                    file=sys.stderr,
                )
                continue
            python = options.adapters if against(row) == "AdapterHub" else sys.executable
            r = figures[row] = measure(row, scratch, options.rounds, python)
            print(f"{row}: {r['ratio']:.2f}", file=sys.stderr, flush=True)
            times = f"{r['a_ms']:.1f}", f"{r['b_ms']:.1f}", f"{r['ratio']:.2f}", f"≤ {LIMIT}"
            table.add_row(row, against(row), *times, f"{r['a_mb']:.0f}", f"{r['b_mb']:.0f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"Median of the ratios: {statistics.median(r['ratio'] for r in figures.values()):.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def against(row: str) -> str:
    who = METHODS[row][2]
    return who if who in ("torch", "AdapterHub") else "HF peft"


def measure(row: str, scratch: str, rounds: int, python: str) -> dict[str, float]:
    folder = Path(scratch) / source(row)["model_type"]
    if not folder.exists():
        write(str(folder), source(row))
    spec = Engine("spec", str(folder), row, __file__)
    return turns((spec, Engine("other", str(folder), row, __file__, python)), STEPS, rounds)


if __name__ == "__main__":
    main()
