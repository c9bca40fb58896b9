"""``pytest --late SEED``: everything is late now and then, by a drawn time, and the tests run in a drawn order.

What a busy machine does once in a thousand runs happens here in each: event loops and threads of this process pause,
a scripted engine emits several tokens at once or none, processes that the tests start are stopped for up to a third of
a second. A test that fails so without being wrong in what it says of the product has assumed that something is on time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import thread as pool
from pathlib import Path
from typing import Any

import pytest

_MOST = 0.3  # seconds for which a process is stopped: less than any deadline of a heartbeat in the tests


class Lateness:
    """What is drawn, by kind; one for the process, None unless asked for."""

    def __init__(self, seed: int) -> None:
        self._drawn = random.Random(seed)
        self._order = random.Random(seed)  # each worker of xdist has to draw the same
        self._kill = os.kill
        self._lock = threading.Lock()  # of who stops and continues which process
        self._held: int | None = None  # the process that is stopped by this class

    def pause(self, chance: float, most: float) -> None:
        if self._drawn.random() < chance:
            time.sleep(self._drawn.random() ** 2 * most)

    def tokens(self) -> int:
        """Of each row that a scripted engine emits in its next message."""
        return self._drawn.choice((0, 0, 1, 1, 1, 2, 3, 5))

    def shuffle(self, items: list[pytest.Item]) -> None:
        """Files and the tests of each; a file stays together, since it has fixtures of its own."""
        files: dict[str, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.nodeid.partition("::")[0], []).append(item)
        groups = list(files.values())
        self._order.shuffle(groups)
        for group in groups:
            self._order.shuffle(group)
        items[:] = [item for group in groups for item in group]

    def begin(self) -> None:
        self._delay(asyncio.base_events.BaseEventLoop, "_run_once", before=(0.05, 0.03), after=(0.001, 1.0))
        self._delay(pool._WorkItem, "run", before=(0.2, 0.03), after=(0.2, 0.03))
        self._delay_threads()
        os.kill = self._kill_of_a_test
        threading.Thread(target=self._stop_processes, daemon=True, name="lateness").start()

    def _delay(self, owner: Any, name: str, before: tuple[float, float], after: tuple[float, float]) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def late(*arguments: Any) -> Any:
            self.pause(*before)
            try:
                return original(*arguments)
            finally:
                self.pause(*after)

        setattr(owner, name, late)

    def _delay_threads(self) -> None:
        start = threading.Thread.start

        def late_start(thread: threading.Thread) -> None:
            run = thread.run

            def late() -> None:
                self.pause(0.3, 0.05)
                run()
                self.pause(0.3, 0.05)

            thread.run = late  # type: ignore[method-assign]
            start(thread)

        threading.Thread.start = late_start  # type: ignore[method-assign]

    # --- processes -------------------------------------------------------------------------------------------------

    def _kill_of_a_test(self, pid: int, number: int) -> None:
        """A process that a test stops is not continued by this class."""
        with self._lock:
            if pid == self._held and number in (signal.SIGSTOP, signal.SIGCONT):
                self._held = None
            self._kill(pid, number)

    def _stop_processes(self) -> None:
        while True:
            time.sleep(self._drawn.random() * 0.1)
            found = _descendants(os.getpid())
            if found:
                self._stop(self._drawn.choice(found))

    def _stop(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            with self._lock:
                if _state(pid) not in ("R", "S", "D"):
                    return
                self._kill(pid, signal.SIGSTOP)
                self._held = pid
            time.sleep(self._drawn.random() ** 3 * _MOST)
            with self._lock:
                if self._held == pid:
                    self._held = None
                    self._kill(pid, signal.SIGCONT)


def _descendants(pid: int) -> list[int]:
    """But for what enters or is a machine of its own: its systemd counts seconds, and ``nsenter`` stops itself with
    what it runs, and is not continued with it."""
    found, seen = [], [pid]
    while seen:
        parent = seen.pop()
        if _name(parent) in ("unshare", "nsenter"):
            continue
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                seen += map(int, children.read_text().split())
        found.append(parent)
    return found[1:]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


drawn: Lateness | None = None  # set while tests run with --late


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--late", type=int, metavar="SEED", help="everything is late now and then, tests are shuffled")


def begin(config: pytest.Config) -> None:
    global drawn
    if config.getoption("late") is not None:
        drawn = Lateness(config.getoption("late"))
        drawn.begin()
