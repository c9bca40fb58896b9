"""What the parts of the supervisor share: settings, clock, books, and the way into the single-writer loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Plan
from lightllmd.config.tls import TlsPair
from lightllmd.ipc.messages import Tls
from lightllmd.ipc.quota import Quota
from lightllmd.supervisor.children.hang_rule import RunningClock
from lightllmd.supervisor.host.fd_store import FdStore
from lightllmd.supervisor.host.file_threads import FileThreads
from lightllmd.supervisor.host.runtime_directory import RuntimeDirectory
from lightllmd.supervisor.journal.logs import EventBook, LogBook


class ShortLivedChild(Protocol):
    """A child that ends by itself."""

    def reap(self, pid: int) -> bool:
        """Reaps it if that is `pid`."""


def _nowhere(event: object) -> None:
    raise RuntimeError(f"no supervisor runs: {event}")


def _unreported(doing: str, fault: BaseException) -> None:
    raise fault


# What takes an engine long to import. None of it touches a device, nor imports prometheus_client, which has to be
# configured before.
GPU_IMPORTS = ("lightllmd.engine.runners.gpu", "lightllmd.kernels.fused")
CPU_IMPORTS = ("lightllmd.engine.runners.cpu", "lightllmd.kernels.eager", "lightllmd.weights.gguf")


@dataclass(frozen=True)
class Commands:
    """How the children are started; tests put stand-ins here."""

    python: str = sys.executable

    def probe(self) -> list[str]:
        """Reads a request from stdin and prints the facts that a plan is made from."""
        return [self.python, "-m", "lightllmd.probe"]

    def api(self, channel_fd: int) -> list[str]:
        """An api worker; `channel_fd` is its end of the channel."""
        return [self.python, "-m", "lightllmd.api", str(channel_fd), str(os.getpid())]

    def engine(
        self, channel_fd: int, flight_fd: int, early: Sequence[str] = (), context_on: str | None = None
    ) -> list[str]:
        """Before it's configured it imports the modules `early` and makes a context on the device `context_on`."""
        fixed = [self.python, "-m", "lightllmd.engine", str(channel_fd), str(os.getpid()), str(flight_fd)]
        return [*fixed, *(["--context", context_on] if context_on else []), *early]

    def read_ahead(self, files: Sequence[str]) -> list[str]:
        """Brings files into the page cache and ends; may be killed at any time."""
        return [self.python, "-m", "lightllmd.weights.read_ahead", *files]

    def push(self, channel_fd: int) -> list[str]:
        """Pushes metrics to a gateway."""
        return [self.python, "-m", "lightllmd.push", str(channel_fd), str(os.getpid())]

    def visual(self, channel_fd: int) -> list[str]:
        """Sees images."""
        return [self.python, "-m", "lightllmd.visual", str(channel_fd), str(os.getpid())]

    def early(self, plan: Plan) -> Sequence[str]:
        """What a spare engine of this plan imports; nothing: a spare would save too little to be kept."""
        if plan.config.engine.backend == "fake":
            return ()
        return GPU_IMPORTS if plan.device.kind == "cuda" else CPU_IMPORTS


@dataclass
class Context:
    """One for the daemon's life. Belongs to the loop's thread."""

    config: Config
    clock: RunningClock
    log: LogBook
    events: EventBook
    runtime: RuntimeDirectory
    commands: Commands
    listeners: list[socket.socket]
    fd_store: FdStore
    activated: bool = False  # the listeners are a .socket unit's: host and port don't count
    journal: bool = False  # stderr is systemd's journal
    post: Callable[[object], None] = _nowhere  # puts an event into the supervisor's queue; the only way in
    report_fault: Callable[[str, BaseException], None] = _unreported  # makes a crash report of an unforeseen exception
    file_threads: FileThreads = field(default_factory=FileThreads)  # where files are read
    random: random.Random = field(default_factory=random.Random)
    quota: Quota = field(default_factory=Quota)  # what API keys have used of their limits
    image_secret: bytes = field(default_factory=lambda: os.urandom(32))  # see `ImageSpan.key`
    tls: TlsPair | None = None  # what HTTPS is served with; None: HTTP is
    plan: bytes = b""  # the plan in force, encoded; empty before it is made
    revision: int = 1  # and its number
    background_tasks: set[asyncio.Task[Any]] = field(default_factory=set)  # that run
    short_lived: set[ShortLivedChild] = field(default_factory=set)  # children that belong to no worker
    generations: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # over all revisions

    def tls_message(self, broken: bool = False) -> Tls | None:
        """What an api worker is told to serve HTTPS with; None: it serves HTTP. `broken`: see `Tls`."""
        pair = self.tls
        return None if pair is None else Tls(pair.certificate, pair.key, pair.client_ca, pair.expires, broken)
