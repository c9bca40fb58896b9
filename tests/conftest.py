"""Shared by all tests: nothing may outlive a test."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import interpreter
import lateness
import work_sharing

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other workers have the other cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job's; children would inherit it and not hear ^C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anybody imports one


def _shared_memory() -> set[str]:
    try:
        return set(os.listdir("/dev/shm"))
    except FileNotFoundError:
        return set()


_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
_started = 0  # processes, by this one


def _count_starts(event: str, _: tuple[object, ...]) -> None:
    global _started
    _started += event in _STARTS


sys.addaudithook(_count_starts)
os.environ["LIGHTLLMD_TEST_RUN"] = uuid.uuid4().hex  # inherited by all that the tests start, orphans included


def _ours() -> dict[int, psutil.Process]:
    """Living processes of this test run, wherever they hang in the tree."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = process.environ().get("LIGHTLLMD_TEST_RUN")
            if mark == os.environ["LIGHTLLMD_TEST_RUN"] and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    lateness.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    work_sharing.share_compiling(config)
    lateness.begin(config)


def pytest_collection_finish() -> None:
    interpreter.hasten()
    gc.collect()
    gc.freeze()  # what was imported lives to the end; a runner that closes collects, and so do hundreds of tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU no test of one is collected."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    items.sort(key=lambda item: work_sharing.place(item.nodeid.partition("::")[0]))
    if lateness.drawn is not None:
        lateness.drawn.shuffle(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    config.option.loadscopereorder = False  # the order is that of the items
    return work_sharing.scheduler(config, log)


def _left(before: set[int]) -> list[psutil.Process]:
    """Those that began since; the children of a daemon that was there before are its own business."""
    left = []
    for pid, process in _ours().items():
        with contextlib.suppress(psutil.Error):
            if pid not in before and not {parent.pid for parent in process.parents()} & (before - {os.getpid()}):
                left.append(process)
    return left


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, /dev/shm file or unix socket file remains after a test."""
    # Asked for now, so that it is torn down after this fixture.
    tmp_path: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    shm = _shared_memory()
    started, before = _started, {os.getpid(), *_ours()} if _started else {os.getpid()}
    yield
    left: list[psutil.Process] = []
    files: set[str] = set()

    def nothing() -> bool:
        left[:] = _left(before) if _started > started else []
        files.clear()
        files.update(_shared_memory() - shm)  # other processes of the machine have their own there for a moment
        return not left and not files

    deadline = time.monotonic() + 30
    while not nothing() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"processes left behind: {left}"
    assert not files, f"shared memory left behind: {files}"
    if tmp_path is not None:
        sockets = [path for path in tmp_path.rglob("*") if path.is_socket()]
        assert not sockets, f"sockets left behind: {sockets}"
