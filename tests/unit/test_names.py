"""A name stands for one thing: no two modules define public classes of the same name."""

from __future__ import annotations

import ast
from collections import defaultdict

from rooms import modules


def test_no_public_class_is_named_twice() -> None:
    places = defaultdict(list)
    for module in modules():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module.name)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert twice == {}
