"""Every kernel compiles for an H100 with its default tiles, fits into shared memory and keeps its numbers in registers.

A new kernel: one more function below that calls its wrapper, and its entries in `CASES`. This file is also read by
`compiling.py`, where Triton compiles instead of interpreting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have on an H100


def norms(dtype: torch.dtype) -> None:
    from lightllmd.kernels.norm import add_rms_norm, rms_norm

    x, weight = torch.empty(2, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
    rms_norm(x, weight, 1e-5, x)
    add_rms_norm(x, x.clone(), weight, 1e-5, x)


CASES: dict[str, Callable[[], None]] = {
    "norms bf16": partial(norms, torch.bfloat16),
}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compiling.py")), __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_default_tiles_fit(case: str, compiled: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in compiled if kernel["case"] == case]
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["spilled"] == 0, kernel
