"""Which models transformers has, read out of its source: importing it takes seconds."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


@cache
def causal_language_models() -> dict[str, str]:
    """Classes by model type; empty where transformers keeps them in a form that isn't known here."""
    spec = importlib.util.find_spec("transformers")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder, "models", "auto", "modeling_auto.py")
        if path.is_file():
            for node in ast.parse(path.read_bytes()).body:
                if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == [TABLE]:
                    return dict(_pairs(node.value))
    return {}


def _pairs(table: ast.expr) -> list[tuple[str, str]]:
    """All pairs of texts that are written in an expression."""
    pairs = [node.elts for node in ast.walk(table) if isinstance(node, ast.Tuple) and len(node.elts) == 2]
    return [
        (str(kind.value), str(name.value))
        for kind, name in pairs
        if isinstance(kind, ast.Constant) and isinstance(name, ast.Constant)
    ]
