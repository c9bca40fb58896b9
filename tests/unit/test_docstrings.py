"""Every public definition says what it is: a class, a function, a method or a property without a docstring fails.

Public: no name on the way to it begins with an underscore. Fields need none (a comment beside them says unit and
owner), nor does what overrides a documented definition of a base class that is the product's own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rooms import Module, modules

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def classes() -> dict[str, ast.ClassDef]:
    """The product's classes at the top of a module, by their full names."""
    return {
        f"{module.name}.{node.name}": node
        for module in modules()
        for node in module.tree.body
        if isinstance(node, ast.ClassDef)
    }


def imported_names(tree: ast.Module) -> dict[str, str]:
    """What `from … import …` binds, with the full name of each."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


class Definitions:
    """The public definitions of one module."""

    def __init__(self, module: Module, known: dict[str, ast.ClassDef]) -> None:
        self._module, self._known = module, known
        self._names = imported_names(module.tree)

    def missing(self) -> list[str]:
        """Where those without a docstring stand."""
        parts = self._module.name.split(".")
        if any(part.startswith("_") for part in parts):
            return []
        return [f"{self._module.path}:{node.lineno} {node.name}" for node in self._missing(self._module.tree.body)]

    def _missing(self, body: list[ast.stmt], within: ast.ClassDef | None = None) -> Iterator[Definition]:
        for node in body:
            if not isinstance(node, Definition) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None and not (within and self._inherits(within, node.name)):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from self._missing(node.body, node)

    def _inherits(self, owner: ast.ClassDef, name: str) -> bool:
        for base in owner.bases:
            text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            full = self._names.get(text, f"{self._module.name}.{text}")
            known = self._known.get(full)
            if known is None:
                continue
            documented = {node.name for node in known.body if isinstance(node, Definition) and ast.get_docstring(node)}
            if name in documented or self._inherits(known, name):
                return True
        return False


def test_every_public_definition_has_a_docstring() -> None:
    known = classes()
    assert [line for module in modules() for line in Definitions(module, known).missing()] == []
