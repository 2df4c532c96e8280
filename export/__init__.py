"""ONNX: the specification evaluated on symbols, which is the exported graph.

`export` writes a folder; read `program` for what is in it, `forms` for what of a model and its adapters may come from
outside, `symbols` for how NumPy code becomes a graph, `runtime` and `generation` for how it is run.
"""

from typing import Any


def export(*args: Any, **options: Any) -> Any:
    """`refpeft.export.program.export`; onnx is imported when it is called."""
    from refpeft.export.program import export

    return export(*args, **options)


__all__ = ["export"]
