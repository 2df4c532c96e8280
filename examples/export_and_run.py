"""From a base model and an adapter to an ONNX graph, and a batch through it on onnxruntime.

python examples/export_and_run.py MODEL ADAPTER OUT          three folders; OUT must not exist yet
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

import refpeft
from refpeft.export import export


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("model", "adapter", "out"):
        arguments.add_argument(name, type=Path)
    given = arguments.parse_args()

    model = refpeft.load(given.model)
    adapter = refpeft.load_adapter(given.adapter, model)
    made = export(model, adapter, given.out, source=given.model)  # verified on onnxruntime before it is kept
    print(
        f"{made.nodes} nodes; worst ratio to the specification {max(c['ratio'] for c in made.cases):.2f}, of 10 allowed"
    )

    session = onnxruntime.InferenceSession(given.out / "model.onnx")
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (graph,) = session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})

    spec, _ = model(ids, adapter)
    off = np.abs(graph - spec).max() / np.abs(spec).max()
    print(f"onnxruntime and NumPy differ by {off:.0e} on two rows of four tokens")


if __name__ == "__main__":
    main()
