"""Kinds of PEFT adapters × exporters to ONNX: which of the graphs compute what the tuned model computes.

    python bench/peft_kinds.py              the table, of the exporters that are installed
    python bench/peft_kinds.py --write      and docs/exporters.md, and the counts in README.md
    python bench/peft_kinds.py --kind dora --exporter genai --exporter refpeft

Each kind is a tiny LLaMA with an adapter that HF peft made, every trained number moved at random, so that the adapter
matters. A cell is decided by running what was exported: its logits are the PeftModel's (right), they are others and
nothing was said (wrong), or no graph that onnxruntime runs came out (refused). `bench/exporters.py --install NAME`
brings an exporter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import peers
from bench.exporters import lacking, python_of, tokenizer
from bench.figures import markdown, rewrite, table

Array = np.ndarray[Any, Any]
LIMIT = 1e-4  # relative distance of logits: float32 gives 1e-6, an adapter that was dropped 1e-2 and more
CONFIG = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LAYERS = ["q_proj", "v_proj"]
BOTH = {"target_modules": LAYERS, "init_weights": False}
KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {  # of HF peft: a config and its fields
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": LAYERS}),
    "LoRA, all linear layers": ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "rsLoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": LAYERS}),
    "LoRA, rank and alpha patterns": (
        "LoraConfig",
        {"r": 4, "target_modules": LAYERS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    ),
    "LoRA, trained head": ("LoraConfig", {"r": 4, "target_modules": LAYERS, "modules_to_save": ["lm_head"]}),
    "LoRA, embeddings": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA with biases": ("LoraConfig", {"r": 4, "target_modules": LAYERS, "lora_bias": True}),
    "DoRA": ("LoraConfig", {"r": 4, "target_modules": LAYERS, "use_dora": True}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": LAYERS}),
    "LoHa": ("LoHaConfig", {"r": 4, **BOTH}),
    "LoKr": ("LoKrConfig", {"r": 4, **BOTH}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, "target_modules": LAYERS}),
    "VeRA": ("VeraConfig", {"r": 8, "target_modules": ["q_proj"]}),
    "IA³": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "trainable tokens": (
        "TrainableTokensConfig", {"token_indices": list(range(3, 50)), "target_modules": ["embed_tokens"]},
    ),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "P-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
}  # fmt: skip
SIZES = {"VeRA": 2.0}  # by how much numbers are moved, where 0.2 changes little
EXPORTERS = ("refpeft", *peers.EXPORTERS)
NAMES = {
    "refpeft": "refpeft export", "torch": "torch.onnx.export (dynamo)", "transformers": "transformers OnnxExporter",
    "optimum": "optimum-onnx", "genai": "onnxruntime-genai builder", "mobius": "mobius-onnx",
}  # fmt: skip
PACKAGES = {
    "torch": "torch", "transformers": "transformers", "optimum": "optimum-onnx", "genai": "onnxruntime-genai",
    "mobius": "mobius-onnx",
}  # fmt: skip


# ── models and adapters ──────────────────────────────────────────────────────────────────────────────────────────────


def ids() -> Array:
    return np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (2, 9))


def write_base(folder: Path) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    tokenizer(folder)


def write_adapter(kind: str, base: Path, folder: Path) -> Array:
    """The adapter as HF peft saves it; the logits [b, s, v] of the PeftModel that peft makes of what it saved."""
    import peft
    import torch
    import transformers

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(base).eval()

    name, fields = KINDS[kind]
    torch.manual_seed(1)
    config = getattr(peft, name)(task_type="CAUSAL_LM", inference_mode=False, **fields)
    model = peft.get_peft_model(load(), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += SIZES.get(kind, 0.2) * torch.randn_like(p)
    model.save_pretrained(folder)
    tokens = torch.tensor(ids())
    with torch.no_grad():
        plain = load()(tokens).logits.numpy()
        tuned = peft.PeftModel.from_pretrained(load(), folder).eval()(tokens).logits.numpy()[:, -tokens.shape[1] :]
    if gap(plain, tuned) < 100 * LIMIT:
        raise RuntimeError(f"{kind} changes nothing, so it can decide nothing")
    return np.asarray(tuned)


def gap(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# ── exports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(base: Path, adapters: Path, out: Path) -> None:
    """refpeft export --form unmerged, for each adapter."""
    import refpeft
    from refpeft.export import export

    out.mkdir()
    model = refpeft.load(base)
    for folder in sorted(adapters.iterdir()):
        try:
            export(model, refpeft.load_adapter(folder, model), out / folder.name, "unmerged")
        except (ValueError, ArithmeticError) as error:
            (out / f"{folder.name}.error").write_text(str(error))


def theirs(name: str, base: Path, adapters: Path, out: Path) -> None:
    command = [str(python_of(name)), str(Path(peers.__file__)), name, str(base), str(out), "--adapters", str(adapters)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def verdict(folder: Path, expected: Array) -> tuple[str, str]:
    """right, wrong or refused; and how far off, or why."""
    failed = folder.with_name(folder.name + ".error")
    if failed.is_file():
        return "refused", failed.read_text()
    try:
        got = answer(folder / "model.onnx")
    except Exception as error:  # onnxruntime has types of its own
        return "refused", f"onnxruntime: {' '.join(str(error).split())}".replace(str(folder), "OUT")
    if got.shape[0] != expected.shape[0] or got.shape[1] < expected.shape[1] or got.shape[2] != expected.shape[2]:
        return "wrong", f"logits of shape {list(got.shape)}"
    off = gap(got[:, -expected.shape[1] :], expected)
    return ("right" if off <= LIMIT else "wrong"), f"relative distance {off:.1e}"


def answer(path: Path) -> Array:
    """The logits of a graph, with an empty past where it wants one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    tokens = ids()
    b, s = tokens.shape
    whole = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.tile(np.arange(s), (b, 1))}
    width = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]  # type: ignore[operator]
    past = np.zeros((b, CONFIG["num_key_value_heads"], 0, width), np.float32)  # type: ignore[arg-type]
    found = session.run(None, {i.name: whole.get(i.name, past) for i in session.get_inputs()})
    return np.asarray(found[0])


def version(name: str) -> str:
    if name == "refpeft":
        import refpeft

        return refpeft.__version__
    code = f"from importlib.metadata import version as v; print(v({PACKAGES[name]!r}))"
    done = subprocess.run([str(python_of(name)), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

Cells = Mapping[str, Mapping[str, tuple[str, str]]]  # exporter → kind → verdict and why
SIGNS = {"right": "✓", "refused": "refused", "wrong": "**wrong**"}
ROOT, MARK = Path(__file__).parents[1], "<!-- kinds -->\n"


def decided(root: Path, kinds: list[str], exporters: list[str]) -> Cells:
    base, adapters = root / "base", root / "adapters"
    with quiet():
        write_base(base)
        expected = {kind: write_adapter(kind, base, adapters / slug(kind)) for kind in kinds}
    cells: dict[str, dict[str, tuple[str, str]]] = {}
    for name in exporters:
        print(f"{NAMES[name]} …", file=sys.stderr, flush=True)
        if name == "refpeft":
            ours(base, adapters, root / name)
        else:
            theirs(name, base, adapters, root / name)
        cells[name] = {kind: verdict(root / name / slug(kind), expected[kind]) for kind in kinds}
    return cells


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers and peft say while they load and save, which is a page for every kind."""
    import transformers

    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def slug(kind: str) -> str:
    return f"{list(KINDS).index(kind):02}"


def rows(cells: Cells) -> list[list[str]]:
    kinds = list(next(iter(cells.values())))
    found = [[kind, *(SIGNS[cells[name][kind][0]] for name in cells)] for kind in kinds]
    total = [f"{sum(v == 'right' for v, _ in column.values())} of {len(kinds)}" for column in cells.values()]
    return [*found, ["right", *total]]


def counts(cells: Cells) -> list[list[str]]:
    """Of each exporter: right, refused, wrong."""
    return [[NAMES[n], *(str(sum(v == s for v, _ in c.values())) for s in SIGNS)] for n, c in cells.items()]


PAGE = """# Adapters and exporters to ONNX

Which exporter makes a graph of a tuned model that computes what HF peft computes? Written by

```sh
python bench/peft_kinds.py --write
```

on a tiny LLaMA with one adapter of each kind, made by HF peft {peft}, every trained number moved at random. Every
graph was run on onnxruntime {ort} and its logits compared with the PeftModel's: ✓ they are the same to {limit:g};
**wrong**: they are others, and nobody said so; refused: there is no graph that onnxruntime runs.

{table}
What each was given: torch.onnx.export and transformers' exporter a PeftModel, in Python; genai's builder
`adapter_path`; optimum-onnx the adapter's folder; mobius-onnx has no place for an adapter; refpeft `--form unmerged`.
Where an adapter has a merge, those that take none can be given the merged model, of `refpeft merge` or HF peft.

## Versions

{versions}

## Why refused

{why}
"""


def page(cells: Cells, missing: list[str]) -> str:
    from importlib.metadata import version as installed

    head = ["", *(NAMES[name] for name in cells)]
    versions = "\n".join(f"- {NAMES[name]}: {version(name)}" for name in cells)
    return PAGE.format(
        peft=installed("peft"), ort=installed("onnxruntime"), limit=LIMIT,
        table=markdown(head, rows(cells)),
        versions="\n".join([versions, *(f"- {sentence}" for sentence in missing)]),
        why="\n".join(f"- {NAMES[name]}: {sentence}" for name in cells for sentence in refusals(cells[name])),
    )  # fmt: skip


def refusals(column: Mapping[str, tuple[str, str]]) -> list[str]:
    """Each reason once, with the kinds that it is for."""
    reasons: dict[str, list[str]] = {}
    for kind, (what, why) in column.items():
        if what == "refused":
            reasons.setdefault(why.replace("\n", " ")[:160], []).append(kind)
    everything = len(column)
    return [f"{'all' if len(k) == everything else ', '.join(k)}: {why}" for why, k in reasons.items()]


def main(options: argparse.Namespace) -> None:
    from rich.console import Console

    if options.write and (options.kind or options.exporter):
        sys.exit("--write needs all kinds and exporters, so neither --kind nor --exporter")
    wanted = options.exporter or EXPORTERS
    missing = [lacking(name) for name in wanted if name != "refpeft" and python_of(name) is None]
    exporters = [name for name in wanted if name == "refpeft" or python_of(name)]
    with tempfile.TemporaryDirectory() as root:
        cells = decided(Path(root), options.kind or list(KINDS), exporters)
    console = Console(width=140)
    plain = [[cell.strip("*") for cell in row] for row in rows(cells)]
    console.print(table("What was exported, against HF peft", ("", *(NAMES[name] for name in cells)), plain))
    for name, column in cells.items():
        for kind, (what, why) in column.items():
            if what != "right":
                console.print(f"{NAMES[name]}, {kind}: {what}: {why[:200]}", highlight=False, markup=False)
    for sentence in missing:
        console.print(f"[red]{sentence}[/]")
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1))
    if options.write:
        (ROOT / "docs" / "exporters.md").write_text(page(cells, missing), "utf-8")
        rewrite(ROOT / "README.md", MARK, markdown(["exporter", "right", "refused", "silently wrong"], counts(cells)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these (default: all)")
    parser.add_argument("--exporter", choices=EXPORTERS, action="append", help="only these (default: all)")
    parser.add_argument("--write", action="store_true", help="write the pages of the documentation")
    parser.add_argument("--json", type=Path, help="write the verdicts there too")
    main(parser.parse_args())
