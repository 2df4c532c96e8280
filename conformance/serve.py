"""A target of ours as a program, for libraries that live in an environment of their own.

    python -m refpeft.conformance.serve TARGET

speaks the protocol of `program:` (`refpeft.conformance.targets.program`); `refpeft check --python` starts it.
What a library prints goes to stderr: standard output belongs to the answers.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refpeft.cli.errors import sentence
from refpeft.conformance.case import Case, write
from refpeft.conformance.targets import Skip, Target, open_target

Reply = Mapping[str, Any]


def serve(name: str) -> None:
    """One answer for each line, until the input ends or says so."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        target: Target | None = None
        for line in sys.stdin:
            message = json.loads(line)
            if "stop" in message:
                break
            reply: Reply
            try:
                target = target or open_target(name)
                reply = dict(target.info()) if "start" in message else answer(target, message)
            except (ValueError, ImportError) as error:
                reply = failed(error, sentence(error))
            except Exception as error:  # whatever a target throws is an answer
                reply = failed(error, str(error))
            print(json.dumps(reply), file=answers, flush=True)


def answer(target: Target, message: Mapping[str, Any]) -> Reply:
    try:
        found = target.run(Case.read(message["run"]))
    except Skip as skip:
        return {"skip": str(skip)}
    write(Path(message["out"]), found)
    return {"ok": True}


def failed(error: Exception, text: str) -> Reply:
    return {"error": text, "type": type(error).__name__}


if __name__ == "__main__":
    serve(sys.argv[1])
