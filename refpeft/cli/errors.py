"""What went wrong, in one sentence."""

from pathlib import Path

EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "peft",
    "transformers": "peft",
    "peft": "peft",
    "adapters": "adapters",
}  # package → extra that brings it


def sentence(error: Exception) -> str:
    """Which file, or which extra is missing, or the sentence that the error came with."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this {missing(error.name.partition('.')[0])}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"there is not enough memory{': ' * bool(said)}{said[:1].lower()}{said[1:]}"
    return said or type(error).__name__


def put(file: Path, text: str) -> None:
    """A result into a file. What a full disk says does not name it."""
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise OSError(f"{file}: could not be written: {(error.strerror or str(error)).lower()}") from None


def missing(package: str) -> str:
    extra = EXTRAS.get(package)
    return f"needs {package}: pip install " + (f"'refpeft[{extra}]'" if extra else package)
