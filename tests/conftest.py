"""What all tests share: one BLAS thread, Hypothesis without a stopwatch, and markers for what needs an extra."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read once, when NumPy is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from importlib.util import find_spec
from pathlib import Path
from shutil import which

import hypothesis
import numpy as np
import pytest

from refpeft.conformance.targets.libraries import EVERY, present

NEEDS = {  # marker → its libraries or programs, and what brings them
    "peft": (("torch", "transformers", "peft"), "the extra [peft]"),
    "adapterhub": (("torch", "adapters"), "the extra [adapters], in an environment of its own"),
    "ort": (("onnxruntime",), "the extra [cpu] or [gpu]"),
    "node": (("node",), "node.js"),
    "cc": (("cc",), "a C compiler"),
    "rustc": (("rustc",), "a Rust compiler"),
    "jsonschema": (("jsonschema",), "the extra [dev]"),
    "dask": (("distributed",), "the extra [dask]"),
}
PROGRAMS = ("node", "cc", "rustc")
MISSING = {
    marker: [name for name in names if not (which(name) if marker in PROGRAMS else find_spec(name))]
    for marker, (names, _) in NEEDS.items()
}
NPM = Path(__file__).parents[1] / "examples" / "training" / "node_modules" / "onnxruntime-node"
NEEDS["npm"] = (("onnxruntime-node",), "npm install in examples/training")
MISSING["npm"] = [] if NPM.is_dir() else ["onnxruntime-node"]
for name, library in EVERY.items():  # here, or in an environment of its own
    NEEDS[name] = ((library.module,), f"refpeft targets --install {name}")
    MISSING[name] = [] if present(name) else [library.module]

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def same_numbers(request: pytest.FixtureRequest) -> None:
    """A module's own generator begins anew for each test: what is drawn must not depend on what ran before it."""
    module = getattr(request, "module", None)
    if isinstance(getattr(module, "rng", None), np.random.Generator):
        module.rng = np.random.default_rng(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests whose libraries are not installed are deselected: neither passed nor skipped."""
    out = [item for item in items if any(item.get_closest_marker(marker) for marker in MISSING if MISSING[marker])]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not run, and what would bring it; the libraries with an environment of their own in one line."""
    absent = [marker for marker, names in MISSING.items() if names]
    for marker in absent:
        if marker not in EVERY:
            names = ", ".join(MISSING[marker])
            terminalreporter.write_line(f"Not run: tests marked '{marker}' ({names} is missing: {NEEDS[marker][1]})")
    if libraries := [marker for marker in absent if marker in EVERY]:
        bring = "refpeft targets --install NAME brings one"
        terminalreporter.write_line(f"Not run: tests of the libraries {', '.join(libraries)} ({bring})")
