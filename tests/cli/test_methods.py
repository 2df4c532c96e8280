"""`refpeft methods`: all that a docstring says is shown, within the width of the terminal."""

import re

import pytest
from typer.testing import CliRunner

import refpeft
from refpeft.cli import app
from refpeft.cli.methods import authors, broken
from refpeft.conformance.docs import doc


def shown(width: int, *arguments: str) -> str:
    found = CliRunner().invoke(app, ["methods", *arguments], env={"COLUMNS": str(width)})
    assert found.exit_code == 0
    assert all(len(line) <= width for line in found.stdout.splitlines())
    return found.stdout


def words(text: str) -> list[str]:
    return [word.rstrip(":") for word in text.split()]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("method", refpeft.METHODS)
def test_a_method_is_shown_whole(method: str, width: int) -> None:
    """Every word of its docstring, every field of its config, every key of its checkpoints, shared or not."""
    module = refpeft.METHODS[method]
    text = shown(width, method)
    assert set(words(module.__doc__ or "")) - set(words(text)) == set()
    assert set(module.Config.__dataclass_fields__) - set(words(text)) == set()
    keys = [key for pair in module.KEYS.values() for key in pair if key]
    keys += [key for name, key in getattr(module, "SHARED", {}).items() if "." not in name]
    assert [key for key in keys if key not in text] == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_all_methods_are_listed(width: int) -> None:
    """Each with its formula, its paper and the number of its claims."""
    text = shown(width)
    for method, module in refpeft.METHODS.items():
        line, *more = re.search(rf"^{method} .*\n(?: +.*\n)*", text, re.M)[0].splitlines()  # type: ignore[index]
        claims = len(re.findall(r"^    [A-Z]+\d+  ", module.__doc__ or "", re.M))
        assert line.split()[-1] == str(claims)
        formula = re.split(r" {5,}", doc(method).formulae.strip().splitlines()[0])[0]
        assert set(formula.split()) - {word for part in (line, *more) for word in part.split()} == set()


@pytest.mark.parametrize(
    ("paper", "short"),
    [
        ("Lee, Tang & Lin 2019, arXiv 1911.03090, §3", "Lee et al. 2019"),
        ("Li & Liang 2021, arXiv 2101.00190", "Li & Liang 2021"),
        ("The baseline of Hu et al. 2021, arXiv 2106.09685, §5.1", "Hu et al. 2021"),
        ("HF peft, TRAINABLE_TOKENS (there is no paper)", "HF peft"),
    ],
)
def test_papers_are_named_in_short(paper: str, short: str) -> None:
    assert authors(paper) == short


def test_formulae_are_broken_between_equations() -> None:
    assert broken("a = b + c,   d = e,   f = g", 20) == ["a = b + c,   d = e,", "f = g"]
    assert broken("a = b + c + d + e + f", 12) == ["a = b + c +", "d + e + f"]
