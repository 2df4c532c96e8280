"""HF model and adapter folders ↔ arrays: the one place of the specification that reads and writes files."""
