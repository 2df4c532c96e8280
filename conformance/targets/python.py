"""python:package.module:object, a target in this process: an object with info() and run(case), or what makes one."""

import importlib
import sys
from typing import Any

from refpeft.conformance.case import Case
from refpeft.conformance.targets.base import Arrays, Info


class Python:
    def __init__(self, target: Any) -> None:
        self.target = target

    def info(self) -> Info:
        info: Info = self.target.info()
        return info

    def run(self, case: Case) -> Arrays:
        return dict(self.target.run(case))

    def close(self) -> None:
        if hasattr(self.target, "close"):
            self.target.close()


def load(place: str) -> Python:
    """The target at package.module:object; a class or function is called for it."""
    module, colon, path = place.partition(":")
    if not colon or not path:
        raise ValueError(f"python:{place}: expected python:package.module:object")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that one stands in, as with `python -m`
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module + ".").startswith(error.name + "."):
            raise ValueError(f"python:{place}: there is no module {error.name!r}") from None
        raise
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"python:{place}: {name!r} is not in {module!r}")
        found = getattr(found, name)
    makes = isinstance(found, type) or (callable(found) and not hasattr(found, "run"))
    target = found() if makes else found
    missing = [name for name in ("info", "run") if not callable(getattr(target, name, None))]
    if missing:
        raise ValueError(
            f"python:{place}: expected an object with info() and run(case), found one without {missing[0]}()"
        )
    return Python(target)
