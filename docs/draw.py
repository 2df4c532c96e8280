"""Draw what the README shows, from a run of the suite here and now.

make docs        or        python docs/draw.py
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    picture = HERE / "matrix.svg"
    command = ["check", "peft", "--svg", str(picture)]
    print("$ refpeft " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, "-m", "refpeft", *command], check=False).returncode
    if code == 2:
        sys.exit("Not well: the check could not run, see above.")
    print(f"All is well: {picture} shows what was found." if code == 0 else f"Not as expected; {picture} shows where.")
    sys.exit(code)


if __name__ == "__main__":
    main()
