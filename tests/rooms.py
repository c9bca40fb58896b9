"""The product's modules as syntax trees, for tests that hold what is true of all rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"lightllmd.kernels": "kernels", "lightllmd": "lightllmd", "lightllmctl": "lightllmctl"}  # of packages


@dataclass(frozen=True)
class Module:
    """One file of the product."""

    name: str  # dotted, as it is imported
    path: Path  # within the checkout
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """Its folder below `lightllmd` ("" for the modules there), or "lightllmctl"."""
        top, *below = self.name.split(".")
        if top == "lightllmctl":
            return top
        return below[0] if below and (len(below) > 1 or self.path.name == "__init__.py") else ""


@cache
def modules() -> tuple[Module, ...]:
    """All of the product, in the order of their names."""
    return tuple(sorted(_modules(), key=lambda module: module.name))


def _modules() -> Iterator[Module]:
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            below = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in below if part != "__init__")))
            yield Module(name, path.relative_to(ROOT), path.read_text())
