"""The scripts of the findings about HF peft show what their pages say, in the release that these name."""

import contextlib
import io
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "findings"
Lines = list[str]


def number(line: str) -> float:
    """That of a tensor of one number."""
    found = re.search(r"tensor\(([^,)]+)", line)
    assert found
    return float(found[1])


SHOWN: dict[str, Callable[[Lines], bool]] = {  # what the script of a page prints, or how it ends
    "peft-adalora-ranknum": lambda said: (
        "ranknum" not in said[0] and "ranknum" in said[1] and 1 < float(said[2].split()[0]) < 1.5 and "False" in said[2]
    ),
    "peft-configs-accepted": lambda said: len(said) == 2 and all(line.count("lora_") == 2 for line in said),
    "peft-delete-active": lambda said: said == ["['bar'] foo", "KeyError: 'foo'"],
    "peft-delete-modules-to-save": lambda said: said[0] == "['foo']" and number(said[1]) > 0.1 and number(said[2]) == 0,
    "peft-disable-prompt": lambda said: said[-1].startswith("UnboundLocalError: cannot access local variable"),
    "peft-hotswap": lambda said: said == ["tensor(True)", "tensor(False)"],
    "peft-ia3-defaults": lambda said: (
        said == ["ValueError: `feedforward_modules` should be a subset of `target_modules`"]
    ),
    "peft-ia3-second-adapter": lambda said: said == ["[1, 32]"],
    "peft-ia3-unmerge": lambda said: 1e-9 < number(said[0]) < 1e-7 and number(said[1]) == 1,
    "peft-loha-scale": lambda said: 1e-9 < number(said[0]) < 1e-7,
    "peft-oft-cayley": lambda said: said == ["True 11.421", "False -11.421"],
    "peft-oft-two": lambda said: number(said[0]) > 1e-2,
    "peft-oft-unmerge": lambda said: 1e-9 < number(said[0]) < 1e-7,
    "peft-prefix-of-classifiers": lambda said: said[-1].startswith(
        "ValueError: Model does not support past key values"
    ),
    "peft-prompt-before-padding": lambda said: number(said[0]) > 1e-3,
    "peft-prompt-loaded-in-float32": lambda said: "torch.float32" in said[0] and 0 < number(said[0]) < 1e-6,
    "peft-saved-patterns": lambda said: said == ["{'q': 8, 'z.q': 16}", "[4.0, 2.0] [2.0, 2.0]"],
    "peft-trainable-tokens-bias": lambda said: number(said[0]) > 0.1 and number(said[1]) == 0,
    "peft-trainable-tokens-second-adapter": lambda said: (
        said[0] == "['lm_head.base_layer']" and said[-1].startswith("ValueError: TrainableTokensLayer wraps an unknown")
    ),
    "peft-vera-second-rank": lambda said: said[-1].startswith("RuntimeError: The size of tensor a (2) must match"),
    "peft-weighted-float32": lambda said: 1e-9 < number(said[0]) < 1e-6,
    "peft-weighted-rslora": lambda said: abs(number(said[0]) - 2) < 1e-4,
}


def here() -> Lines:
    """The pages about the release that is installed: another one may have mended it."""
    try:
        installed = f"peft {metadata.version('peft')}"
    except metadata.PackageNotFoundError:
        return list(SHOWN)
    return [page for page in SHOWN if installed in (FOLDER / f"{page}.md").read_text(encoding="utf-8")]


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", here())
def test_the_script_shows_it(page: str) -> None:
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(script, page, "exec"), {})
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    assert SHOWN[page](out.getvalue().splitlines()), out.getvalue()
