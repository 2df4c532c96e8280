"""Runs in onnxruntime-genai's environment: questions about exported folders as JSON in, answers as JSON out."""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as og


def answer(q: dict[str, Any]) -> Any:
    model = og.Model(q["folder"])
    if "text" in q:
        tokenizer = og.Tokenizer(model)
        ids = tokenizer.encode(q["text"])
        return {"ids": ids.tolist(), "text": tokenizer.decode(ids)}
    ids = np.array(q["feeds"]["input_ids"], np.int32)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=ids.shape[1] + q["new"], batch_size=len(ids))
    generator = og.Generator(model, params)
    if q["adapter"]:
        adapters = og.Adapters(model)
        adapters.load(q["adapter"], "mine")
        generator.set_active_adapter(adapters, "mine")
    if q["adapter_ids"]:
        generator.set_model_input("adapter_ids", np.array(q["adapter_ids"], np.int64))
    generator.append_tokens(ids)
    if not q["new"]:
        return {name: generator.get_input(name).tolist() for name in ("attention_mask", "position_ids")}
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(k)[ids.shape[1] :].tolist() for k in range(len(ids))]


def asked(q: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"answer": answer(q)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


print(json.dumps([asked(q) for q in json.load(sys.stdin)]))
