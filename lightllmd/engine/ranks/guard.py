"""Notices the end of another rank, whatever this one does: its main thread may wait in a collective for a rank that is
gone, where Python's signal handlers don't run either."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

from lightllmd.errors import EXIT_OK, EXIT_RANK_GONE, LightllmdError, RankGone

log = logging.getLogger(__name__)

_FAREWELL = b"end"
_NOTICED = 0.5  # seconds in which the end of a process that a collective has noticed is noticed here
GRACE = 1.0  # seconds that the main thread has to act on SIGTERM


class PeerGuard:
    """A thread that watches the connections to other ranks. Once one has ended, `on_gone` is called there with its
    number and whether it said farewell."""

    def __init__(self, connections: Mapping[int, socket.socket], on_gone: Callable[[int, bool], None]) -> None:
        self._connections = dict(connections)
        self._on_gone = on_gone
        self._first: int | None = None  # the rank that ended first
        self._noticed = threading.Event()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._signals, self._wakeup = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def start(self, *, terminates: bool) -> None:
        """`terminates`: SIGTERM, whose handler the main thread has set and calls this, ends the process GRACE later
        should that thread not come to it."""
        if terminates:
            for end in (self._signals, self._wakeup):
                end.setblocking(False)
            signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    @property
    def gone(self) -> bool:
        """Another rank has ended."""
        return self._noticed.is_set()

    def check(self) -> None:
        """Raises RankGone once another rank has ended."""
        if self.gone:
            raise RankGone(f"rank {self._first} has ended")

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Around what may fail because another rank is gone: RankGone is raised then, whatever the failure looks
        like here."""
        try:
            yield
        except LightllmdError:
            raise
        except Exception:
            if self._noticed.wait(_NOTICED):
                self.check()
            raise

    def farewell(self) -> None:
        """This rank ends in good order, which the others are told."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(_FAREWELL, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Ends the thread, and the connections."""
        os.eventfd_write(self._stop, 1)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        for connection in (*self._connections.values(), self._signals, self._wakeup):
            connection.close()
        os.close(self._stop)

    # --- in the thread -----------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        poll = select.poll()
        ranks = {connection.fileno(): rank for rank, connection in self._connections.items()}
        for fd in (*ranks, self._stop, self._signals.fileno()):
            poll.register(fd, select.POLLIN)
        end: float | None = None  # monotonic seconds
        while True:
            left = None if end is None else max(0.0, end - time.monotonic()) * 1000
            for fd, _ in poll.poll(left):
                if fd == self._stop:
                    return
                if fd in ranks:
                    poll.unregister(fd)
                    self._ended(ranks[fd])
                elif signal.SIGTERM in self._signals.recv(256):
                    end = time.monotonic() + GRACE
            if end is not None and time.monotonic() >= end:
                os._exit(EXIT_OK)

    def _ended(self, rank: int) -> None:
        try:
            farewell = self._connections[rank].recv(16, socket.MSG_DONTWAIT) == _FAREWELL
        except OSError:
            farewell = False
        if self._first is None:
            self._first = rank
        self._noticed.set()
        self._on_gone(rank, farewell)


def end_process(rank: int, farewell: bool) -> NoReturn:
    """`on_gone` of a process that has nothing to do without its group."""
    if farewell:
        os._exit(EXIT_OK)
    log.error("rank %d has ended, so this one does", rank)
    os._exit(EXIT_RANK_GONE)
