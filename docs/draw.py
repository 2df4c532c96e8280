"""Draw what the README shows, from runs of the suite here and now.

make docs        or        python docs/draw.py [TARGET…]

matrix.svg is HF peft, statement by statement; who.svg all implementations that are installed here or in environments of
their own (`refpeft targets --install NAME`), side by side. With names only these are asked; of the others the runs that
are in out/runs are taken as they are.
"""

import subprocess
import sys
from pathlib import Path

from refpeft.conformance.targets.libraries import LIBRARIES, version

HERE = Path(__file__).parent
RUNS = HERE.parent / "out" / "runs"
FIRST = ("spec", "peft", "onnxruntime")


def main(names: list[str]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    installed = [*FIRST, *(name for name in LIBRARIES if version(name) is not None)]
    codes = [check(name) for name in installed if name in names or not names]
    runs = [str(file) for name in installed if (file := RUNS / f"{name}.jsonl").is_file()]
    if len(runs) > 1:
        codes.append(refpeft("report", *runs, "--svg", str(HERE / "who.svg"), "--html", str(RUNS / "who.html")))
    if 2 in codes:
        sys.exit("Not well: something could not run, see above.")
    print("All is well: the pictures show what was found." if not any(codes) else "Not as expected; see above.")
    sys.exit(max(codes, default=0))


def check(name: str) -> int:
    more = ["--svg", str(HERE / "matrix.svg")] if name == "peft" else []
    return refpeft("check", name, "--json", str(RUNS / f"{name}.jsonl"), *more)


def refpeft(*command: str) -> int:
    print("$ refpeft " + " ".join(command), flush=True)
    return subprocess.run([sys.executable, "-m", "refpeft", *command], check=False).returncode


if __name__ == "__main__":
    main(sys.argv[1:])
