"""What the supervisor finds on the simulated host: a loop without time, listeners, systemd, programs to start."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

from lightllmd.supervisor.context import Commands
from lightllmd.supervisor.host.notify import Notifier


class Loop(asyncio.BaseEventLoop):
    """Runs what is ready and never waits; `now` is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._selector = self  # asyncio's own loop asks it for events, and how long it may wait
        self.readers: dict[int, Callable[[], object]] = {}
        self.signals: dict[int, Callable[[], object]] = {}
        self.threads: list[Callable[[], None]] = []  # what threads are doing; called, it is done

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None or timeout > 0:
            self.stop()
        return []

    def _process_events(self, events: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...

    def add_reader(self, fd: int, callback: Callable[..., object], *arguments: Any) -> None:
        self.readers[fd] = partial(callback, *arguments)

    def remove_reader(self, fd: int) -> bool:
        return self.readers.pop(fd, None) is not None

    def remove_writer(self, fd: int) -> bool:
        return False

    def add_signal_handler(self, number: int, callback: Callable[..., object], *arguments: Any) -> None:
        self.signals[number] = partial(callback, *arguments)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, work: Callable[..., Any], *arguments: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()

        def end() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(work(*arguments))
            except Exception as failure:
                future.set_exception(failure)

        self.threads.append(end)
        return future


class Listener:
    """Stands for a listening socket."""

    family = socket.AF_INET

    def __init__(self, known: list[Listener], port: int) -> None:
        self.port, self.closed = port, False
        known.append(self)

    def fileno(self) -> int:
        return 1_000_000 + self.port

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def close(self) -> None:
        self.closed = True


class SimulatedCommands(Commands):
    def probe(self) -> list[str]:
        return ["probe"]

    def api(self, channel_fd: int) -> list[str]:
        return ["api", str(channel_fd)]

    def engine(
        self, channel_fd: int, flight_fd: int, early: Sequence[str] = (), context_on: str | None = None
    ) -> list[str]:
        return ["engine", str(channel_fd), *early, *([context_on] if context_on else [])]

    def read_ahead(self, files: Sequence[str]) -> list[str]:
        return ["reader"]

    def push(self, channel_fd: int) -> list[str]:
        return ["push", str(channel_fd)]


class Systemd(Notifier):
    """What systemd would be told."""

    def __init__(self) -> None:
        super().__init__({}, 1)
        self.watchdog_interval = 1.0
        self.said: dict[str, str | int] = {}  # the last of each
        self.stored: dict[str, int] = {}  # descriptors in its store, by name

    @property
    def active(self) -> bool:
        return True

    def send(self, *, fds: Sequence[int] = (), **assignments: str | int) -> bool:
        self.said |= assignments
        if "FDSTORE" in assignments:
            self.stored[str(assignments["FDNAME"])] = fds[0]
        if "FDSTOREREMOVE" in assignments:
            del self.stored[str(assignments["FDNAME"])]
        return True


class NoControlServer:
    def __init__(self, supervisor: Any) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...
