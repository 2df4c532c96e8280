"""Runs in optimum's environment: prompts for exported encoder-decoders as JSON in, what is written as JSON out."""

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from onnxruntime import set_default_logger_severity  # noqa: E402
from optimum.onnxruntime import ORTModelForSeq2SeqLM  # noqa: E402

set_default_logger_severity(3)


def answer(q: dict[str, Any]) -> Any:
    model = ORTModelForSeq2SeqLM.from_pretrained(q["folder"], local_files_only=True)
    feeds = {name: torch.tensor(rows) for name, rows in q["feeds"].items()}
    return model.generate(**feeds, max_new_tokens=q["new"], do_sample=False).tolist()


print(json.dumps([answer(q) for q in json.load(sys.stdin)]))
