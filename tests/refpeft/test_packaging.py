"""The specification imports NumPy and SciPy only; its neighbours are linked into it."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import refpeft

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
ELSEWHERE = {"export": ROOT / "export", "conformance": ROOT / "conformance"}
OUTSIDE = ("cli", "checkpoint", "export", "conformance", "strategies.py")  # of refpeft/, what is not the specification
SPECIFICATION = sorted(
    path for path in (ROOT / "refpeft").rglob("*.py") if path.relative_to(ROOT / "refpeft").parts[0] not in OUTSIDE
)


def test_every_package_says_what_it_is() -> None:
    for name in SETUPTOOLS["packages"]:
        parts = name.split(".")[1:]
        folder = ROOT.joinpath(*parts) if parts and parts[0] in ELSEWHERE else ROOT.joinpath("refpeft", *parts)
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))), name


@pytest.mark.parametrize("name", ELSEWHERE)
def test_two_packages_live_beside_refpeft_and_are_linked_into_it(name: str) -> None:
    link = ROOT / "refpeft" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ELSEWHERE[name].resolve()
    assert SETUPTOOLS["package-dir"][f"refpeft.{name}"] == name


def test_types_are_published() -> None:
    assert (ROOT / "refpeft" / "py.typed").read_bytes() == b""
    assert "py.typed" in SETUPTOOLS["package-data"]["refpeft"]


def test_the_version_is_said_once() -> None:
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "refpeft.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", refpeft.__version__)


def test_every_name_is_found_when_it_is_first_used() -> None:
    listed = [name for names in refpeft.HOME.values() for name in names]
    assert sorted(listed) == sorted(refpeft.__all__)
    assert set(refpeft.__all__) <= set(dir(refpeft))
    for name in refpeft.__all__:
        namespace: dict[str, object] = {}
        exec(f"from refpeft import {name}", namespace)
        assert namespace[name] is getattr(refpeft, name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from refpeft import nothing")


def test_the_command_starts_without_numpy() -> None:
    code = "import sys, refpeft.cli; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def imported(path: Path) -> set[str]:
    """The modules that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            names.add(node.module or "")
    return names


def test_the_specification_has_files() -> None:
    assert {"ops.py", "model.py", "lora.py"} <= {path.name for path in SPECIFICATION}


@pytest.mark.parametrize("path", SPECIFICATION, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_specification_imports_numpy_and_scipy_and_nothing_else(path: Path) -> None:
    """It reads no files either: what loads them is refpeft.checkpoint, named in refpeft/__init__.py alone."""
    roots = {name.partition(".")[0] for name in imported(path)}
    assert roots <= {"numpy", "scipy", "refpeft", *sys.stdlib_module_names}
    assert not roots & {"os", "io", "pathlib", "shutil", "subprocess", "pickle", "json"}
    if path.name not in ("__init__.py", "__main__.py"):
        assert not any(name.startswith(tuple(f"refpeft.{outside}" for outside in OUTSIDE)) for name in imported(path))
