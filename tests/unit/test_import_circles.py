"""No module needs itself: not when it is imported, not for its types, not in a function that imports late."""

from __future__ import annotations

import ast

from rooms import Module, modules


def imports(module: Module, known: set[str]) -> set[str]:
    """The modules of the product that it imports anywhere; the packages that it lies in are there before it is."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in full.values()}
    return {name for name in found & known if not module.name.startswith(f"{name}.")}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of modules of which each needs every other."""
    needs = {}
    for start in graph:
        reached: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - reached
            reached |= new
            ahead.extend(new)
        needs[start] = reached
    return {
        frozenset(other for other in reached if module in needs[other])
        for module, reached in needs.items()
        if module in reached
    }


def test_a_circle_is_found_and_what_leads_to_it_is_not_taken_for_one() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == {frozenset("bc")}


def test_no_import_circle_in_the_product() -> None:
    known = {module.name for module in modules()}
    found = circles({module.name: imports(module, known) for module in modules()})
    assert sorted(sorted(circle) for circle in found) == []
