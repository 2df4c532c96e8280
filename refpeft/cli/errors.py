"""What went wrong, in one sentence."""

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
    return " ".join(str(error).split()) or type(error).__name__


def missing(package: str) -> str:
    extra = EXTRAS.get(package)
    return f"needs {package}: pip install " + (f"'refpeft[{extra}]'" if extra else package)
