"""What families make of a config, and that nothing else knows them."""

from __future__ import annotations

import ast
from pathlib import Path

from lightllmd.architecture.families import FAMILIES

ROOT = Path(__file__).parents[3]


def compared_with(path: Path) -> set[str]:
    """Strings that the code of a file compares something with."""
    compares = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
    constants = [side.value for node in compares for side in ast.walk(node) if isinstance(side, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def test_no_code_outside_the_families_compares_a_model_type() -> None:
    apart = {ROOT / "lightllmd/architecture/families", ROOT / "lightllmd/text"}  # tokenizers are named llama too
    files = [path for folder in ("lightllmd", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in files if path.parent not in apart and compared_with(path) & FAMILIES.keys()] == []
