"""The borders between the rooms: who may import whom, and who stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers")


def test_borders_of_pyproject_are_kept() -> None:
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--config",
        str(ROOT / "pyproject.toml"),
        "--no-cache",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_room_has_a_border() -> None:
    rooms = {path.parent.name for path in (ROOT / "lightllmd").glob("*/__init__.py")}
    text = (ROOT / "pyproject.toml").read_text()
    assert [room for room in sorted(rooms) if f'source_modules = ["lightllmd.{room}"]' not in text] == [
        "ipc",
        "observe",
    ]


@pytest.mark.parametrize(
    "module",
    [
        "lightllmd.__main__",
        "lightllmd.supervisor.main",
        "lightllmd.config",
        "lightllmd.api.app",
        "lightllmd.api.__main__",
        "lightllmd.weights.headers",
        "lightllmd.probe.__main__",
        "lightllmd.engine.worker",
        "lightllmd.engine.scheduling.scheduler",
        "lightllmd.engine.runners.fake",
        "lightllmctl.__main__",
    ],
)
def test_a_fresh_interpreter_imports_it_without_torch(module: str) -> None:
    probe = f"import sys, {module}; print(sorted({set(HEAVY)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


def test_kernels_is_no_top_level_package() -> None:
    """transformers looks for a package named kernels, and would take ours for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def imported(path: Path) -> set[str]:
    """Absolute names of what a file imports, relative imports resolved as far as their package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_kernels_import_architecture_and_errors_only() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        ours = {name for name in imported(path) if name.split(".")[0] in ("lightllmd", "lightllmctl")}
        allowed = ("lightllmd.architecture", "lightllmd.errors", "lightllmd.kernels")
        assert all(name.startswith(allowed) for name in ours), (path, ours)


def test_nothing_imports_kernels_by_its_folders_name() -> None:
    for folder in ("lightllmd", "lightllmctl", "kernels", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {name for name in imported(path) if name.split(".")[0] == "kernels"}, path
