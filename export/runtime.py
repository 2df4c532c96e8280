"""onnxruntime: which one is installed, on which device a session really runs, and runs with adapters.

    runner = open_folder("exported")                    a folder that `refpeft export` made
    runner.run({"input_ids": …, "attention_mask": …})   outputs by name
    one = runner.load("one.onnx_adapter")               for the forms that take their adapter from outside
    runner.using(one).run(…)

onnxruntime itself does not object when

* the object of a loaded adapter is dropped: it stops applying;
* two active adapters have tensors of the same names, or one has what is also fed: one of them wins;
* inputs and outputs are bound (`run_with_iobinding`): adapters are left out.

A `Runner` holds on to what it loaded, refuses the second, and binds only where no adapter is active.
"""

import contextlib
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.export import devices
from refpeft.export.devices import CPU as CPU
from refpeft.export.devices import CUDA as CUDA

Array = np.ndarray[Any, Any]

WHEELS = ("onnxruntime", "onnxruntime-gpu")
MODEL, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model_merged.onnx"


def installed() -> list[str]:
    return [name for name in WHEELS if present(name)]


def present(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def require() -> Any:
    """The module onnxruntime, or one sentence saying what to install."""
    if len(installed()) > 1:
        raise ImportError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall both, then install one of them, refpeft[cpu] or refpeft[gpu]"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise ImportError("running a graph needs onnxruntime: pip install 'refpeft[cpu]' or 'refpeft[gpu]'")
    onnxruntime = importlib.import_module("onnxruntime")
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ImportError("onnxruntime is installed only in part: pip install --force-reinstall 'refpeft[cpu]'")
    return onnxruntime


def session(path: Path, device: str | None = None) -> Any:
    """A session on CUDA where onnxruntime offers it and it works, else on the CPU; `device` ('cuda', 'cpu') insists.

    onnxruntime falls back to the CPU without a word, when a session is made and when it runs, and for single nodes. It
    may do none of these where CUDA was asked for; only what reckons with shapes stays on the CPU. TF32 is off.
    """
    cuda, ort = offered(device), require()
    options = ort.SessionOptions()
    options.log_severity_level = devices.FATAL  # what goes wrong is raised
    options.add_session_config_entry(devices.RECORD, "1")
    providers = [(CUDA, devices.OPTIONS), CPU] if cuda else [CPU]
    try:
        made = ort.InferenceSession(str(path), options, providers, enable_fallback=0)
    except Exception as error:  # of types of its own
        raise ValueError(f"{path}: onnxruntime cannot load it: {' '.join(str(error).split())[:300]}") from None
    if device == "cuda":
        insisted(made, path)
    return made


def insisted(made: Any, path: Path) -> None:
    """All that should run on CUDA does."""
    if provider(made) != CUDA:
        raise ValueError(f"CUDA was asked for, and onnxruntime fell back to {provider(made)} for {path}")
    if lacking := devices.placement(made, path).lacking:
        raise ValueError(
            f"CUDA was asked for, and onnxruntime {require().__version__} has no CUDA kernel for "
            f"{devices.listed(lacking)} of {path}: without --device these run on the CPU"
        )


def offered(device: str | None = None) -> bool:
    """Is there CUDA, and does it work? If it is asked for and does not, one sentence says what is missing."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, found {device!r}")
    ort = require()
    if device == "cpu":
        return False
    there = CUDA in ort.get_available_providers()
    if device == "cuda" and not there:
        raise ValueError(
            "CUDA was asked for, which this onnxruntime does not offer: pip uninstall onnxruntime, then "
            "pip install 'refpeft[gpu]'"
        )
    why = devices.trouble(ort) if there else ""
    if device == "cuda" and why:
        raise ValueError(f"CUDA was asked for, and onnxruntime-gpu {ort.__version__} cannot use it: {why}")
    return there and not why


def provider(made: Any) -> str:
    return str(made.get_providers()[0])


def on_cpu(runner: "Runner") -> dict[str, int]:
    """Of sessions on CUDA, the operators of the nodes that stayed on the CPU, and how many."""
    found = Counter[str]()
    made = [r.session for r in (runner.encoder, runner) if r is not None]
    for one, path in zip(made, graphs(runner.folder), strict=True):
        if provider(one) == CUDA:
            found.update(devices.placement(one, path).on_cpu)
    return dict(found)


# ── runs with adapters ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Loaded:
    """An adapter file: onnxruntime's object, which must live as long as it is used, and the names of its tensors."""

    path: Path
    handle: Any = field(repr=False)
    names: frozenset[str] = field(repr=False)


@dataclass(frozen=True)
class Runner:
    """A session, the adapters that are active in its runs, and inputs that all its runs get. `encoder`: of an
    encoder-decoder, another session, for which the same holds. `base`: the number by which adapter files know the base
    model, 1 if that is not known."""

    folder: Path
    session: Any
    active: Sequence[Loaded] = ()
    fixed: Mapping[str, Array] = field(default_factory=dict, repr=False)
    encoder: "Runner | None" = None
    base: int = 1

    def load(self, path: str | os.PathLike[str]) -> Loaded:
        """An adapter file, for `using`. Every tensor in it must be an optional input of this graph."""
        from refpeft.export import adapters

        tensors = adapters.read(path, self.base)
        known = {i.name: i for i in self.session.get_overridable_initializers()}
        for name, a in tensors.items():
            if name not in known:
                raise ValueError(f"{path}: {name} is not an input of the graph in {self.folder}")
            fits(path, name, a, known[name])
        handle = require().LoraAdapter()
        handle.Load(str(path))
        return Loaded(Path(path), handle, frozenset(tensors))

    def using(self, *adapters: Loaded) -> "Runner":
        """The same session with these adapters, and no others, in its runs."""
        seen: dict[str, Path] = {}
        for a in adapters:
            for name in a.names:
                if name in seen:
                    raise ValueError(f"{a.path} and {seen[name]} both hold {name}: they cannot be used together")
                seen[name] = a.path
        return replace(self, active=adapters, encoder=self.encoder and self.encoder.using(*adapters))

    def feeding(self, fixed: Mapping[str, Array]) -> "Runner":
        """The same session, these inputs in all its runs."""
        return replace(self, fixed=fixed, encoder=self.encoder and self.encoder.feeding(fixed))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name."""
        options = self.options(feeds)
        with running(self.folder):
            values = self.session.run(None, {**self.fixed, **feeds}, options)
        return dict(zip(self.outputs, values, strict=True))

    def encoded(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What the encoder makes of these."""
        assert self.encoder is not None
        return self.encoder.run(feeds)

    def run_values(self, feeds: Mapping[str, Any], wanted: Sequence[str], looked: int = 1) -> list[Any]:
        """The same with values that stay where they are, but for the first of those wanted, which are `looked` at: on a
        GPU inputs and outputs are bound to it, but not with an adapter file, of which bound runs take no notice."""
        fixed = {name: require().OrtValue.ortvalue_from_numpy(a) for name, a in self.fixed.items()}
        values = {**fixed, **feeds}
        options = self.options(feeds)
        with running(self.folder):
            if provider(self.session) == CUDA and not self.active:
                return self.bound(values, wanted, "cuda", looked)
            found: list[Any] = self.session.run_with_ort_values(list(wanted), values, options)
        return found

    def bound(self, values: Mapping[str, Any], wanted: Sequence[str], device: str, looked: int) -> list[Any]:
        """A run whose outputs are left on the device, but for the first ones."""
        binding = self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for n, name in enumerate(wanted):
            binding.bind_output(name, "cpu" if n < looked else device)
        self.session.run_with_iobinding(binding)
        found: list[Any] = binding.get_outputs()
        return found

    def options(self, feeds: Mapping[str, Any]) -> Any:
        made = require().RunOptions()
        for a in self.active:
            for name in a.names & feeds.keys():
                raise ValueError(f"{name} is fed, and {a.path} holds it too")
            made.add_active_adapter(a.handle)
        return made

    @property
    def inputs(self) -> list[str]:
        """Those that every run needs."""
        return [i.name for i in self.session.get_inputs() if i.name not in self.fixed]

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.session.get_outputs()]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """What onnxruntime says of a run that fails, in one sentence; its errors are of types of their own."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{folder}: onnxruntime cannot run it: {words[:300]}") from None


def fits(path: Any, name: str, a: Array, wanted: Any) -> None:
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    shape = list(wanted.shape)
    if a.ndim != len(shape) or any(isinstance(d, int) and d != n for d, n in zip(shape, a.shape, strict=True)):
        raise ValueError(f"{path}: {name} must have the shape {shape}, found {list(a.shape)}")
    if a.dtype != kinds.get(wanted.type):
        raise ValueError(f"{path}: {name} must be a {wanted.type}, found {a.dtype}")


def open_folder(folder: str | os.PathLike[str], device: str | None = None) -> Runner:
    """The graphs of a folder that `refpeft export` made, ready to run."""
    from refpeft.export import initialisers
    from refpeft.export.card import whole

    offered(device)  # said before all files are read
    card = whole(Path(folder))
    for file in graphs(Path(folder)):
        initialisers.read(file)
    runner, base = open_graph(Path(folder), device), card.get("base", 1)
    return replace(runner, base=base, encoder=runner.encoder and replace(runner.encoder, base=base))


def open_graph(folder: Path, device: str | None = None) -> Runner:
    """The same, of a folder that is being made."""
    encoder, *rest = [Runner(folder, session(path, device)) for path in graphs(folder)]
    return replace(rest[0], encoder=encoder) if rest else encoder


def graphs(folder: Path) -> list[Path]:
    """The files of an export: model.onnx, or encoder and decoder."""
    pair = [folder / ENCODER, folder / DECODER]
    if not (folder / MODEL).exists() and all(path.is_file() for path in pair):
        return pair
    if not (folder / MODEL).is_file():
        raise ValueError(f"{folder}: there is no {MODEL}, nor {ENCODER} with {DECODER}")
    return [folder / MODEL]
