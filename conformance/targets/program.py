"""program:CMD, a target in any language: a process that reads one JSON object a line and answers each with one line.

    → {"start": "1"}                                the version of the specification
    ← {"name": …, "version": …, "levels": […], "methods": […], "dtypes": […], "features": […]}
    → {"run": "case.safetensors", "out": "out.safetensors"}
    ← {"ok": true}                                  the arrays are in the file `out`
      {"skip": "reason"}                            or it cannot be asked that
      {"error": "what went wrong", "type": …}       or it failed; the type is the kind of error, and may be left out
    → {"stop": true}                                and the program ends

What the program writes to stderr is shown with its failures. A program that dies, hangs or answers with something
else has failed that case; it is started anew for the next one.
"""

import atexit
import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from refpeft import SPEC_VERSION
from refpeft.conformance.case import Case, read
from refpeft.conformance.targets.base import Arrays, Info, Skip

TIMEOUT = 60.0  # seconds for one answer
TAIL = 5  # lines of stderr that are shown


class ProgramError(Exception):
    """The program answered {"error": …}; `kind` is the type that it gave, if any."""

    def __init__(self, text: str, kind: str = "ProgramError") -> None:
        super().__init__(text)
        self.kind = kind


class ProgramDied(Exception):  # noqa: N818 - the kind of the result, error:ProgramDied
    """The program ended instead of answering."""


class ProgramHung(Exception):  # noqa: N818
    """The program did not answer in time."""


class BadAnswer(Exception):  # noqa: N818
    """The program's answer is not what the protocol says."""


FAILURES = (ProgramError, ProgramDied, ProgramHung, BadAnswer)


class Program:
    def __init__(self, command: str, timeout: float = TIMEOUT) -> None:
        self.command = command
        self.timeout = timeout
        self.folder = tempfile.TemporaryDirectory(prefix="refpeft-")
        self.process: Process | None = None
        self.declared: Info | None = None
        atexit.register(self.close)

    def info(self) -> Info:
        if self.declared is None:
            try:
                self.declared = self.ask({"start": SPEC_VERSION})
            except FAILURES as error:
                raise ValueError(f"program {self.command!r} did not start: {error}") from None
        return self.declared

    def run(self, case: Case) -> Arrays:
        folder = Path(self.folder.name)
        question, answer = folder / "case.safetensors", folder / "out.safetensors"
        answer.unlink(missing_ok=True)
        case.save(question)
        if self.process is None:
            self.ask({"start": SPEC_VERSION})
        reply = self.ask({"run": str(question), "out": str(answer)})
        if "skip" in reply:
            raise Skip(str(reply["skip"]))
        if not reply.get("ok"):
            raise BadAnswer(f"expected ok, skip or error in the answer, found {json.dumps(reply)[:80]}")
        if not answer.is_file():
            raise BadAnswer("the program answered ok but wrote no file of arrays")
        try:
            return read(answer)[0]
        except ValueError as error:
            raise BadAnswer(f"the arrays it wrote: {str(error).removeprefix(f'{answer}: ')}") from None

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One line there, one line back. After a failure that it did not report itself, the process is ended."""
        process = self.process = self.process or Process(self.command)
        try:
            reply = process.ask(message, self.timeout)
        except BaseException:
            self.stop()
            raise
        if "error" in reply:
            raise ProgramError(str(reply["error"]), str(reply.get("type", "ProgramError")))
        return reply

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None

    def close(self) -> None:
        self.stop()
        self.folder.cleanup()
        atexit.unregister(self.close)


class Process:
    """A running program, its answers in a queue (so that waiting for one can end), the end of its stderr kept."""

    def __init__(self, command: str) -> None:
        pipe = subprocess.PIPE
        words = shlex.split(command)
        try:
            self.popen = subprocess.Popen(
                words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", errors="replace",
                start_new_session=True,  # Ctrl-C is for us; we end the program
            )  # fmt: skip
        except OSError as error:
            raise ValueError(f"cannot start program {command!r}: {error.strerror}") from None
        self.answers: queue.Queue[str] = queue.Queue()
        self.said: deque[str] = deque(maxlen=TAIL)
        assert self.popen.stdout
        assert self.popen.stderr
        self.threads = [
            threading.Thread(target=forward, args=(self.popen.stdout, self.answers.put), daemon=True),
            threading.Thread(target=forward, args=(self.popen.stderr, self.said.append), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def ask(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        assert self.popen.stdin
        with contextlib.suppress(BrokenPipeError):  # it died, as the missing answer will tell
            self.popen.stdin.write(json.dumps(message) + "\n")
            self.popen.stdin.flush()
        try:
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            raise ProgramHung(f"no answer within {timeout:g} s{self.tail()}") from None
        if not line:
            code = self.popen.wait()
            raise ProgramDied(f"the program ended with exit code {code}{self.tail()}")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            reply = None
        if not isinstance(reply, dict):
            raise BadAnswer(f"expected a JSON object on one line, found {line.strip()[:80]!r}{self.tail()}")
        return reply

    def tail(self) -> str:
        """The end of what it wrote to stderr, once it is silent."""
        self.threads[1].join(timeout=0.2)
        said = " | ".join(line.strip() for line in self.said if line.strip())
        return f"; on stderr: {said}" if said else ""

    def stop(self) -> None:
        """Ask it to end; end it, with what it has started, if it does not."""
        assert self.popen.stdin
        with contextlib.suppress(OSError):
            self.popen.stdin.write('{"stop": true}\n')
            self.popen.stdin.close()
        try:
            self.popen.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        for thread in self.threads:
            thread.join(timeout=1)


def forward(stream: IO[str], put: Any) -> None:
    """Every line, then "" for the end."""
    with stream:
        for line in stream:
            put(line)
    put("")
