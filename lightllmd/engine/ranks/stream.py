"""The ring's place between hosts: messages from rank 0 to ranks of other hosts, through a TCP connection to each.

Both ends have the methods of the ring's. A message is its length (8 bytes, little-endian) and its body. What a reader
tells comes back on the same connection in records of 16 bytes: which of its numbers, and the value.

A link that is cut says nothing. So the kernel is told to give a connection up whose other end has not answered for
`SILENCE` seconds, whatever the processes are at: they see its end then as they would see that of a process.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence

from lightllmd.errors import SystemFailure
from lightllmd.ipc.waiting import wait_ready

SILENCE = 4  # seconds; a restart of a switch's port is longer, a lost packet's second try is shorter
NOTES = 6  # as many as the ring has
_LENGTH = struct.Struct("<Q")
_RECORD = struct.Struct("<qq")
_READ, _HANDLED, _NOTE = 0, 1, 2  # numbers of records
_PATIENCE = 0.05  # seconds until who waits looks again at what may have ended the waiting
_CHUNK = 1 << 20  # bytes that are taken in at a time
_HEARD_EVERY = 64  # messages: what readers tell meanwhile fits into what the kernel keeps


def watch_link(connection: socket.socket) -> None:
    """From now on its end is seen within about SILENCE of the link's, idle or not."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)


class StreamWriter:
    """Rank 0's end of all connections. Owns them."""

    def __init__(self, connections: Mapping[int, socket.socket]) -> None:
        """By rank, in their order."""
        self._readers = [_Reader(connection) for _, connection in sorted(connections.items())]
        self.messages = 0  # written so far

    def write(self, body: bytes, wait: Callable[[], None]) -> None:
        """Sends it to all readers. While the slowest one leaves no room, `wait` is called at least every 50 ms; what it
        raises ends the writing, and the streams can't be used then. Raises SystemFailure where a connection has ended
        and `wait` has no better reason to raise."""
        if self.messages % _HEARD_EVERY == 0:
            for reader in self._readers:
                reader.hear()
        frame = _LENGTH.pack(len(body)) + body
        rest = [reader.send(memoryview(frame)) for reader in self._readers]
        while any(rest):
            blocked = [reader.connection for reader, left in zip(self._readers, rest, strict=True) if left]
            wait_ready([], _PATIENCE, writing=blocked)
            wait()
            rest = [reader.send(left) if left else left for reader, left in zip(self._readers, rest, strict=True)]
        self.messages += 1

    def wait_until_read(self, wait: Callable[[], None]) -> None:
        """Until all readers have taken all that was written."""
        self._wait(_READ, wait)

    def wait_until_handled(self, wait: Callable[[], None]) -> None:
        """Until all readers have done what all messages ask for."""
        self._wait(_HANDLED, wait)

    def _wait(self, number: int, wait: Callable[[], None]) -> None:
        while True:
            for reader in self._readers:
                reader.hear()
            if all(reader.told.get(number, 0) >= self.messages for reader in self._readers):
                return
            wait()
            wait_ready([reader.connection for reader in self._readers], _PATIENCE)

    def notes(self, note: int) -> list[int]:
        """What each reader noted under that number, 0 … NOTES - 1; 0 before it does."""
        for reader in self._readers:
            reader.hear()
        return [reader.told.get(_NOTE + note, 0) for reader in self._readers]

    def close(self) -> None:
        """Ends the connections."""
        for reader in self._readers:
            reader.connection.close()


class _Reader:
    """What the writer knows of one reader."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.told: dict[int, int] = {}  # the newest value of each number
        self._heard = bytearray()
        self._ended = 0.0  # monotonic seconds since which the connection is known to have ended; 0: it has not

    def send(self, rest: memoryview) -> memoryview:
        """What the connection takes no more of now."""
        try:
            while rest:
                rest = rest[self.connection.send(rest) :]
        except BlockingIOError:
            pass
        except OSError as gone:
            self._end(gone)
        return rest

    def hear(self) -> None:
        """Takes in what it told."""
        try:
            while chunk := self.connection.recv(_CHUNK):
                self._heard += chunk
                whole = len(self._heard) // _RECORD.size * _RECORD.size
                self.told.update(_RECORD.iter_unpack(self._heard[:whole]))
                del self._heard[:whole]
        except BlockingIOError:
            return
        except OSError as gone:
            self._end(gone)
        else:
            self._end(None)

    def _end(self, gone: OSError | None) -> None:
        """Who watches the ranks knows why, within moments; else this one says so."""
        now = time.monotonic()
        self._ended = self._ended or now
        if now > self._ended + 1:
            raise SystemFailure(f"the connection to another host's rank has ended: {gone or 'closed there'}")
        time.sleep(_PATIENCE / 10)


class StreamReader:
    """The end of a rank of another host. Owns the connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self.wake = connection.fileno()  # readable when there is something to take
        self._bytes = bytearray()
        self._read = self._handled = 0
        self._unsaid: dict[int, int] = {}  # the newest value of each number that is not on its way yet
        self._unsent = b""  # the rest of records that have begun

    def take(self) -> bytes | None:
        """The next message if it is there as a whole."""
        body = self._next()
        if body is None and self._receive():
            body = self._next()
        if body is not None:
            self._read += 1
            self._tell({_READ: self._read})
        return body

    def _next(self) -> bytes | None:
        if len(self._bytes) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._bytes)[0]
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_LENGTH.size : end])
        del self._bytes[:end]
        return body

    def _receive(self) -> bool:
        """Whether anything came. Of an end nothing is said here: who watches the ranks ends this one."""
        try:
            chunk = self._connection.recv(_CHUNK)
        except OSError:
            return False
        self._bytes += chunk
        return bool(chunk)

    def sleeps(self) -> bool:
        """Before waiting for `wake` to be readable: True: nothing has come since the last `take`."""
        self._tell({})
        return not self._receive()

    def handled(self) -> None:
        """One more message is done."""
        self._handled += 1
        self._tell({_HANDLED: self._handled})

    def note(self, first: int, values: Sequence[int]) -> None:
        """For `StreamWriter.notes`: under the numbers from `first` on."""
        self._tell({_NOTE + number: value for number, value in enumerate(values, first)})

    def _tell(self, records: Mapping[int, int]) -> None:
        """Waits for nothing: what finds no room goes later."""
        self._unsaid.update(records)
        try:
            while self._unsent or self._unsaid:
                if not self._unsent:
                    self._unsent = b"".join(_RECORD.pack(*record) for record in self._unsaid.items())
                    self._unsaid.clear()
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except OSError:
            pass

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()
