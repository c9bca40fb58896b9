"""Tests whose ranks are forked processes, in a process that has run nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from forked_ranks import FRESH

TESTS = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes can't use CUDA")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", ["kernels/test_collectives_kernels.py", "engine/test_device_ranks.py"])
def test_ranks_that_are_forked_processes_compute_as_one(file: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        str(TESTS / file),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment | {FRESH: "1"}, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
