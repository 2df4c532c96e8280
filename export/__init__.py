"""ONNX: the specification evaluated on symbols, which is the exported graph.

`export` writes a folder; read `program` for what is in it, `symbols` for how NumPy code becomes a graph.
"""

from typing import Any


def export(*args: Any, **options: Any) -> Any:
    """`refpeft.export.program.export`; onnx is imported when it is called."""
    from refpeft.export.program import export

    return export(*args, **options)


__all__ = ["export"]
