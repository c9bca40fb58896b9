"""The supervisor's link to one child: a SOCK_SEQPACKET socketpair, one message per packet.

Both ends are non-blocking. `send` never waits: a peer that doesn't read loses heartbeats, never blocks us.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from lightllmd.ipc import messages

T = TypeVar("T")
_BUFFER = 4 << 20  # bytes; a plan with a large config.json is the largest message
_MAX_PACKET = 2 << 20


class Channel(Generic[T]):
    """One end. `T` is what this end receives."""

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], T]) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self.sock = sock
        self._decode = decode
        self.closed = False  # the peer is gone

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Any) -> bool:
        """Sends or drops; False when dropped (buffer full, or the peer is gone)."""
        try:
            self.sock.send(messages.encode(message))
        except (BlockingIOError, BrokenPipeError, ConnectionResetError, OSError):
            return False
        return True

    def receive(self) -> Iterator[T]:
        """Every message that is there now. Sets `closed` at the end of file."""
        while True:
            try:
                packet = self.sock.recv(_MAX_PACKET)
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                return
            if not packet:
                self.closed = True
                return
            yield self._decode(packet)

    def close(self) -> None:
        self.closed = True
        self.sock.close()


def pair() -> tuple[Channel[messages.Up], socket.socket]:
    """The supervisor's end and the raw socket that the child inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        theirs.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    return Channel(ours, messages.decode_up), theirs


def inherited(fd: int) -> Channel[messages.Down]:
    """The child's end, from the descriptor number it was given."""
    return Channel(socket.socket(fileno=fd), messages.decode_down)
