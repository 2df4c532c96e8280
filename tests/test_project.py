"""pyproject.toml says what is there."""

import tomllib
from pathlib import Path

import refpeft

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_is_listed_and_there_is_no_other() -> None:
    # glob does not follow symlinks, so what refpeft/export and refpeft/conformance point to is walked on its own
    tops = {"refpeft": "refpeft", "refpeft.export": "export", "refpeft.conformance": "conformance"}
    there = {
        ".".join([name, *init.parent.relative_to(ROOT / top).parts])
        for name, top in tops.items()
        for init in (ROOT / top).glob("**/__init__.py")
    }
    assert there == set(SETUPTOOLS["packages"])


def test_the_symlinks_and_the_mapping_say_the_same() -> None:
    for package, folder in SETUPTOOLS["package-dir"].items():
        link = ROOT / package.replace(".", "/")
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_every_data_file_of_a_package_is_shipped() -> None:
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).resolve().glob(pattern)
    }
    shipped |= {path for folder in shipped if folder.is_dir() for path in folder.glob("**/*")}
    for folder in ("refpeft", "export", "conformance"):
        data = {p for p in (ROOT / folder).resolve().glob("**/*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert data <= shipped, f"not shipped: {data - shipped}"


def test_the_changelog_knows_this_version() -> None:
    assert f"## {refpeft.__version__}" in (ROOT / "CHANGELOG.md").read_text()
