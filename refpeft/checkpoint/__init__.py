"""HF model and adapter folders ↔ arrays: the one place of the specification that reads and writes files."""

from refpeft.checkpoint.adapters import load_adapter, save_adapter
from refpeft.checkpoint.models import load, save
from refpeft.checkpoint.safetensors import Malformed

__all__ = ["Malformed", "load", "load_adapter", "save", "save_adapter"]
