"""One export of ours as a whole process, which imports nothing else: what others' is measured against.

python bench/ours.py MODEL OUT '{"form": "unmerged", "graph": "fast"}' [ADAPTER]
"""

import json
import sys
from pathlib import Path


def main(folder: str, out: str, options: str, adapter: str | None = None) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import refpeft
    from refpeft.export import export

    model = refpeft.load(folder)
    tuned = None if adapter is None else refpeft.load_adapter(adapter, model)
    export(model, tuned, out, verify=False, decode=True, source=folder, **json.loads(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
