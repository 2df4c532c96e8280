"""The experiments run at a small size, hold what they assert, and find it out if something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EXPERIMENTS = {  # program → what its tables name
    "digits": ("full", "BitFit", "LoRA, r = 16"),
    "methods_on_text": ("lora", "said", "trainable_tokens", "standard error"),
    "prefix_mlp": ("MLP", "direct", "to the bit"),
    "prompt_length": ("class labels", "vote", "after training"),
}
WRONG = {  # program → a mistake in the library, and what is then said
    "digits": (
        "from refpeft.methods import lora; lora.kaiming = lambda rng, shape: rng.uniform(-1, 1, shape) * 0",
        "LoRA of rank 4 is not close to full fine-tuning",
    ),
    "methods_on_text": (
        "from refpeft import train; true = train.update;"
        "train.update = lambda plan, model, state, grads: true(plan, model, state, {n: -g for n, g in grads.items()})",
        "did not fall",
    ),
    "prefix_mlp": (
        "from refpeft.methods import prefix_tuning as p; true = p.flat;"
        "p.flat = lambda a: true(a).replace(params={n: v * 1.001 for n, v in true(a).params.items()})",
        "without its MLP the prefix computes something else",
    ),
    "prompt_length": (
        "import refpeft; refpeft.vote = lambda labels: (labels[0] + 1) % 7",
        "the vote is not the answer of most members",
    ),
}


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_runs_and_draws(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in EXPERIMENTS[name]:
        assert word in done.stdout
    (picture,) = tmp_path.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_library_is_found_out(name: str, tmp_path: Path) -> None:
    mistake, said = WRONG[name]
    run = (
        f"import runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r})\n{mistake}\n"
        f"sys.argv = [{name!r}, '--quick', '--out', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(EXAMPLES / f'{name}.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    assert said in done.stderr
