"""The supervisor's link to one child: a socket pair, on which each message follows its length.

Both ends are non-blocking. `send` never waits: what the peer has not read yet waits here, so that no message is lost
and none is too large for a socket's buffer. Heartbeats may be left out meanwhile; the next one tells as much.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from lightllmd.ipc import messages

T = TypeVar("T")
LARGEST = 256 << 20  # bytes of a message; a plan, which holds a model's config.json, is the largest
_BUFFER = 4 << 20  # bytes asked of the kernel for each direction; net.core.wmem_max may allow far less
_CHUNK = 1 << 18
_LENGTH = 4  # bytes, big-endian, before each message


class Channel(Generic[T]):
    """One end. `T` is what this end receives."""

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], T]) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self.sock = sock
        self._decode = decode
        self._outbox = bytearray()
        self._inbox = bytearray()
        self.closed = False  # the peer is gone

    def fileno(self) -> int:
        """Of the socket, for a selector."""
        return self.sock.fileno()

    @property
    def pending(self) -> bool:
        """Something waits for the peer: call `flush` when the socket is writable."""
        return bool(self._outbox)

    def send(self, message: Any, *, droppable: bool = False) -> bool:
        """Sends now or later; False when it is dropped: the peer is gone, or it is `droppable` and something waits.
        Raises ValueError for a message that is larger than LARGEST."""
        if not self.flush() or (droppable and self._outbox):
            return False
        body = messages.encode(message)
        if len(body) > LARGEST:
            raise ValueError(f"{type(message).__name__} has {len(body)} bytes: at most {LARGEST}")
        self._outbox += len(body).to_bytes(_LENGTH)
        self._outbox += body
        return self.flush()

    def flush(self) -> bool:
        """Sends as much of what waits as the peer takes; False when it is gone."""
        try:
            while self._outbox:
                del self._outbox[: self.sock.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()
            return False
        return True

    def receive(self) -> Iterator[T]:
        """Every message that is there now. Sets `closed` at the end of file.

        Raises msgspec.DecodeError for a message that can't be decoded; those after it come with the next call.
        """
        yield from self._messages()
        while not self.closed:
            try:
                chunk = self.sock.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            self._inbox += chunk
            yield from self._messages()
            if not chunk:
                self.closed = True

    def _messages(self) -> Iterator[T]:
        """What is whole in the inbox."""
        while len(self._inbox) >= _LENGTH:
            end = _LENGTH + int.from_bytes(self._inbox[:_LENGTH])
            if end - _LENGTH > LARGEST:
                self.closed = True  # no peer of ours
                return
            if len(self._inbox) < end:
                return
            body = bytes(self._inbox[_LENGTH:end])
            del self._inbox[:end]
            yield self._decode(body)

    def close(self) -> None:
        """Drops what still waits for the peer."""
        self.closed = True
        self.sock.close()


def pair() -> tuple[Channel[messages.Up], socket.socket]:
    """The supervisor's end and the raw socket that the child inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        theirs.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    return Channel(ours, messages.decode_up), theirs


def inherited(fd: int) -> Channel[messages.Down]:
    """The child's end, from the descriptor number it was given."""
    return Channel(socket.socket(fileno=fd), messages.decode_down)
