"""Shared by all tests: nothing may outlive a test."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def _descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def _shared_memory() -> set[str]:
    try:
        return set(os.listdir("/dev/shm"))
    except FileNotFoundError:
        return set()


def _lightllmd_processes() -> set[int]:
    """Processes of ours wherever they hang: an orphan is no descendant any more."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if (
            "lightllmd.engine" in line
            or "lightllmd.api" in line
            or "-m lightllmd" in line
            or "lightllmd.weights.probe" in line
        ):
            found.add(process.info["pid"])
    return found


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, /dev/shm file or unix socket file remains after a test (module-scoped daemons are in `before`)."""
    before, shm = _descendants() | _lightllmd_processes(), _shared_memory()
    yield
    deadline = time.monotonic() + 5
    while (left := (_descendants() | _lightllmd_processes()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, (
        f"processes left behind: {[psutil.Process(pid).cmdline() for pid in left if psutil.pid_exists(pid)]}"
    )
    assert not _shared_memory() - shm, "shared memory left behind"
    if "tmp_path" in request.fixturenames:
        tmp_path: Path = request.getfixturevalue("tmp_path")
        sockets = [path for path in tmp_path.rglob("*") if path.is_socket()]
        assert not sockets, f"sockets left behind: {sockets}"
