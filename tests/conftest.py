"""Shared by all tests: nothing may outlive a test."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def _shared_memory() -> set[str]:
    try:
        return set(os.listdir("/dev/shm"))
    except FileNotFoundError:
        return set()


def _is_ours(process: psutil.Process) -> bool:
    """Of lightllmd wherever it hangs in the tree: an orphan is no descendant of the tests any more."""
    words = process.info["cmdline"] or []
    return any(word == "lightllmd" or word.startswith("lightllmd.") for word in words)


def _strangers(before: set[int]) -> list[psutil.Process]:
    """Living processes that began during a test; children of a daemon that was there before it don't count."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE or not (process.pid in mine or _is_ours(process)):
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            ancestors = {parent.pid for parent in process.parents()} - {os.getpid()}
            if process.pid not in before and not (ancestors & before):
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, /dev/shm file or unix socket file remains after a test."""
    shm = _shared_memory()
    before = {process.pid for process in _strangers(set())}
    yield
    deadline = time.monotonic() + 5
    while (left := _strangers(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"processes left behind: {left}"
    assert not _shared_memory() - shm, "shared memory left behind"
    if "tmp_path" in request.fixturenames:
        tmp_path: Path = request.getfixturevalue("tmp_path")
        sockets = [path for path in tmp_path.rglob("*") if path.is_socket()]
        assert not sockets, f"sockets left behind: {sockets}"
