"""What a piece of work may not leave in this process. What ends by itself gets the time that a loaded machine needs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator

import psutil

from harness import wait_for


@contextlib.contextmanager
def no_new_threads() -> Iterator[None]:
    """Those that were there before may end meanwhile; one that is joined has left the list a moment later."""
    before = set(threading.enumerate())
    yield
    wait_for(lambda: set(threading.enumerate()) <= before, what=f"no thread but {before}")


@contextlib.contextmanager
def no_new_descriptors() -> Iterator[None]:
    before = descriptors()
    yield
    wait_for(lambda: descriptors() <= before, what=f"no more than {before} open files")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_ended(processes: Iterable[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(list(processes), timeout=60)
    assert not alive, f"still alive: {alive}"
