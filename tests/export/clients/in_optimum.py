"""Runs in optimum's environment: questions about exported folders as JSON in, answers as JSON out."""

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from onnxruntime import AdapterFormat, set_default_logger_severity  # noqa: E402
from optimum import onnxruntime as optimum  # noqa: E402

set_default_logger_severity(3)


def answer(q: dict[str, Any]) -> Any:
    model = getattr(optimum, q["class"]).from_pretrained(q["folder"], local_files_only=True)
    feeds = {name: torch.tensor(rows) for name, rows in q["feeds"].items()}
    if not q["new"]:
        return {name: value.tolist() for name, value in model(**feeds).items()}
    if q["prefix"]:
        feeds |= prefixed(feeds, q["prefix"])
    out = model.generate(**feeds, max_new_tokens=q["new"], do_sample=False)
    return out[:, feeds["input_ids"].shape[1] :].tolist()


def prefixed(feeds: dict[str, torch.Tensor], file: str) -> dict[str, Any]:
    """The prefix as the past of every row. transformers cuts off as many ids as there are in the past, so something
    has to stand there."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    tensors = AdapterFormat.read_adapter(file).get_parameters()
    past = {name: torch.tensor(a.numpy().copy()).repeat(len(ids), 1, 1, 1) for name, a in tensors.items()}
    layers = range(len(past) // 2)
    pairs = tuple((past[f"past_key_values.{n}.key"], past[f"past_key_values.{n}.value"]) for n in layers)
    fill = ids.new_zeros(len(ids), pairs[0][0].shape[2])
    return {
        "input_ids": torch.cat([fill, ids], 1),
        "attention_mask": torch.cat([fill + 1, mask], 1),
        "past_key_values": pairs,
    }


def asked(q: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"answer": answer(q)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


print(json.dumps([asked(q) for q in json.load(sys.stdin)]))
