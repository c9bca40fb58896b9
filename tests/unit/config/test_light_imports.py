"""The supervisor imports the configuration, and the probe must be quick: neither pulls in anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "numpy", "gguf", "pydantic", "fastapi", "tokenizers", "safetensors"}


@pytest.mark.parametrize(
    "module",
    [
        "lightllmd.config.cli",
        "lightllmd.config.resolve",
        "lightllmd.config.reference",
        "lightllmd.weights.headers",
        "lightllmd.probe.__main__",
    ],
)
def test_nothing_heavy_is_imported(module: str) -> None:
    code = f"import sys, {module}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_an_import_of_the_configuration_stays_small() -> None:
    code = "import psutil, lightllmd.config.cli, lightllmd.config.resolve; print(psutil.Process().memory_info().rss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 40_000_000
