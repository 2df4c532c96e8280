"""An onnxruntime-gpu as it is on machines with a GPU and without one; no more of it than is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from refpeft.export.devices import CPU, CUDA

TERSE = (
    "[E] Status Message: cuda_call.cc:154 std::conditional_t<…> CUDA failure {0} ; GPU=-1 ; expr=cudaSetDevice(id_);"
)


class Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.log_severity_level = 2
        self.optimized_model_filepath = ""

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@dataclass
class Session:
    providers: list[str]
    asked: dict[str, Any]
    stays: Sequence[tuple[str, str]]

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, names: Any, feeds: Any) -> None:
        pass

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [(CUDA, "big", "MatMul"), *((CPU, *node) for node in self.stays)]
        made = [(ep, SimpleNamespace(name=name, op_type=op)) for ep, name, op in nodes]
        return [SimpleNamespace(ep_name=ep, get_nodes=lambda node=node: [node]) for ep, node in made]


@dataclass
class FakeRuntime:
    """`works`: it takes CUDA, not the CPU without a word; `raises`: what it says of a session on CUDA; `stays`: nodes
    on the CPU; `wrote`: what it leaves as an optimised graph."""

    offers: bool = True
    works: bool = True
    raises: str = ""
    stays: Sequence[tuple[str, str]] = ()
    wrote: bytes = b""
    cuda_version: str = "13.0"
    severities: list[int] = field(default_factory=list)
    preloaded: int = 0
    __version__ = "1.31.1"
    SessionOptions = Options

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU] if self.offers else [CPU]

    def set_default_logger_severity(self, level: int) -> None:
        self.severities.append(level)

    def preload_dlls(self) -> None:
        self.preloaded += 1
        print("Failed to load libcublas.so.13")

    def InferenceSession(
        self, graph: Any, options: Any = None, providers: Sequence[Any] = (), enable_fallback: int = 1
    ) -> Session:
        on_cuda = providers[0] != CPU
        if on_cuda and self.raises:
            raise RuntimeError(self.raises)
        if options is not None and options.optimized_model_filepath:
            Path(options.optimized_model_filepath).write_bytes(self.wrote)
        asked = {"providers": list(providers), "options": options, "fallback": enable_fallback}
        return Session([CUDA, CPU] if on_cuda and self.works else [CPU], asked, self.stays)
