"""Modules that are alike, by name: each is imported when it is first asked for."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any


class Modules(Mapping[str, Any]):
    """Those of a package with these names, in this order."""

    def __init__(self, package: str, names: Sequence[str]) -> None:
        self.package, self.names = package, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return import_module(f"{self.package}.{name}")

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
