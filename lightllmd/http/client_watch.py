"""What a connection learns of its client from the kernel: how fast it reads, and whether it is still there."""

from __future__ import annotations

import asyncio
import fcntl
import select
import struct
import termios
from collections.abc import Callable

from lightllmd.http.bounds import Bounds

_FIRST_PROBE = 1.0  # seconds from the second byte of the status line that is sent ahead; twice as long to each other
_BROKEN = select.POLLERR | select.POLLHUP


class ReadingPace:
    """How fast the client's host takes what is sent to it."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.written = 0  # bytes that the connection gave to its transport
        self._since = 0.0  # loop time from which the pace is measured; 0: it keeps up
        self._taken = 0  # bytes that its host had then

    def too_slow(self, transport: asyncio.Transport, now: float) -> bool:
        """Whether it was less than min_rate, over write_timeout. To be called again and again. `now`: loop time."""
        backlog = transport.get_write_buffer_size()
        if not backlog:
            self._since = 0.0
            return False
        # Our buffer moves in steps of a third of the kernel's, which holds megabytes: a slow reader's pace shows there.
        bounds, taken = self._bounds, self.written - backlog - _unacknowledged(transport)
        if not self._since:
            self._since, self._taken = now, taken
        elif now - self._since >= bounds.write_timeout:
            if taken - self._taken < bounds.min_rate * bounds.write_timeout:
                return True
            self._since, self._taken = now, taken
        return False


class Presence:
    """Whether the client is still there. It may have closed its sending side, or both: then its host answers what we
    send with a reset."""

    def __init__(self) -> None:
        self._next_probe = 0.0  # loop time
        self._pause = _FIRST_PROBE

    def begin(self, now: float) -> None:
        """The first byte that may be answered so is sent."""
        self._next_probe = now + self._pause

    def gone(self, transport: asyncio.Transport, now: float, probe: Callable[[], bool]) -> bool:
        """`probe` sends such a byte, now and then; False: there is none to send. `now`: loop time."""
        poll = select.poll()
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        events = sum(events for _, events in poll.poll(0))
        if events & _BROKEN:
            return True
        if events and now >= self._next_probe and probe():
            self._pause *= 2
            self._next_probe = now + self._pause
        return False


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes in the kernel's buffer that the peer's kernel has not acknowledged."""
    sock = transport.get_extra_info("socket")
    return struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
