"""How ranks of other hosts find rank 0: at a TCP port that it listens on, `nccl_port` of its host.

Each of them makes two connections. One carries the steps (`stream.py`). On the other nothing more is said: its end
tells each side that the other one has ended, or that the link has been cut. A client that reaches the port may
join, as with torch.distributed's: the network between the hosts has to be trusted.
"""

from __future__ import annotations

import logging
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from lightllmd.engine.ranks.stream import watch_link
from lightllmd.errors import SystemFailure
from lightllmd.ipc.waiting import wait_ready

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
_LONGEST = 4096  # bytes of a message
_VISITORS = 64  # connections at a time that have not said what they are
_AGAIN = 0.2  # seconds until a rank looks again whether rank 0 is there
_LOOK = 0.02  # seconds between two looks at what is waited for


class HostJoin(msgspec.Struct):
    """What a rank says on each of its connections."""

    rank: int
    ranks: int
    settings: str  # a digest of what all have to have in common
    process: str  # the same on both connections
    carries: Literal["steps", "life"]


class HostJoined(msgspec.Struct):
    """Rank 0's answer, on the connection for the steps, when all have come."""

    generation: int
    store_port: int | None  # of torch.distributed, at the same address; None: the back end has no collectives
    refused: str = ""  # why it can't join


Kind = TypeVar("Kind", HostJoin, HostJoined)


class _Visitor:
    """One connection, until it has said what it is."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        watch_link(connection)
        self.connection = connection
        self._bytes = bytearray()

    def hear(self, kind: type[Kind]) -> Kind | None:
        """Its message; None: not yet. Raises OSError where it has ended, or says something else."""
        try:
            while len(self._bytes) < _LENGTH.size or len(self._bytes) < self._size:
                if not (chunk := self.connection.recv(self._missing)):
                    raise ConnectionResetError("closed")
                self._bytes += chunk
        except BlockingIOError:
            return None
        try:
            return msgspec.msgpack.decode(self._bytes[_LENGTH.size :], type=kind)
        except msgspec.DecodeError as wrong:
            raise OSError(f"not understood: {wrong}") from None

    @property
    def _size(self) -> int:
        size: int = _LENGTH.unpack_from(self._bytes)[0] + _LENGTH.size
        if size > _LONGEST:
            raise OSError(f"a message of {size} bytes")
        return size

    @property
    def _missing(self) -> int:
        return (_LENGTH.size if len(self._bytes) < _LENGTH.size else self._size) - len(self._bytes)


def say(connection: socket.socket, message: HostJoin | HostJoined) -> None:
    """Either side's only message: it is small, the kernel takes it whole. Raises OSError."""
    body = msgspec.msgpack.encode(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


class HostMeeting:
    """Rank 0's end, from the listening socket, which is its own, until `close`."""

    def __init__(self, listener: socket.socket, generation: int, ranks: int, remote: range, settings: str) -> None:
        """`remote`: those of the `ranks` that other hosts have."""
        listener.setblocking(False)
        self._listener, self._generation, self._ranks = listener, generation, ranks
        self._remote, self._settings = remote, settings
        self._visitors: list[_Visitor] = []
        self._here: dict[tuple[int, str], dict[str, socket.socket]] = {}  # by rank and process, what each carries

    @property
    def here(self) -> set[int]:
        """Ranks that have come and not left again."""
        return set(self._complete())

    def gather(
        self, store_port: int | None, beat: Callable[[], None]
    ) -> tuple[dict[int, socket.socket], dict[int, socket.socket]]:
        """The connections of all remote ranks: those that carry steps, and those that only end. Calls `beat` while it
        waits."""
        while True:
            complete = self._complete()
            if len(complete) == len(self._remote):
                break
            open_ones = [connection for both in self._here.values() for connection in both.values()]
            waited = [self._listener, *(visitor.connection for visitor in self._visitors), *open_ones]
            wait_ready(waited, _LOOK)
            self._accept()
            self._hear()
            self._drop_ended()
            beat()
        for both in complete.values():
            say(both["steps"], HostJoined(self._generation, store_port))
        steps = {rank: both["steps"] for rank, both in sorted(complete.items())}
        life = {rank: both["life"] for rank, both in sorted(complete.items())}
        self._here = {who: both for who, both in self._here.items() if both not in complete.values()}
        self.close()
        return steps, life

    def _complete(self) -> dict[int, dict[str, socket.socket]]:
        return {rank: both for (rank, _), both in self._here.items() if len(both) == 2}

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # none is there; one that came is gone again
                return
            self._visitors.append(_Visitor(connection))
            if len(self._visitors) > _VISITORS:  # the oldest has said nothing for long
                self._visitors.pop(0).connection.close()

    def _hear(self) -> None:
        for visitor in list(self._visitors):
            try:
                join = visitor.hear(HostJoin)
            except OSError as gone:
                log.warning("a connection to the port of the ranks is dropped: %s", gone)
                join = None
                visitor.connection.close()
                self._visitors.remove(visitor)
            if join is None:
                continue
            self._visitors.remove(visitor)
            if refused := self._fault(join):
                log.error("rank %d is refused: %s", join.rank, refused)
                if join.carries == "steps":
                    say(visitor.connection, HostJoined(self._generation, None, refused))
                visitor.connection.close()
                continue
            self._here.setdefault((join.rank, join.process), {})[join.carries] = visitor.connection

    def _fault(self, join: HostJoin) -> str:
        """Why it may not join; empty: it may."""
        if join.ranks != self._ranks:
            return f"tp is {join.ranks} there and {self._ranks} here"
        if join.rank not in self._remote:
            return f"rank {join.rank} is none of {self._remote[0]} to {self._remote[-1]}, which other hosts have"
        if join.settings != self._settings:
            return "its settings, its model's files or its version of lightllmd differ from rank 0's"
        return ""

    def _drop_ended(self) -> None:
        """Those that went before all had come."""
        for who, both in list(self._here.items()):
            for connection in both.values():
                try:
                    ended = connection.recv(1, socket.MSG_PEEK) == b""
                except BlockingIOError:
                    continue
                except OSError:
                    ended = True
                if ended:
                    log.warning("rank %d has left again before all had come", who[0])
                    for each in both.values():
                        each.close()
                    del self._here[who]
                    break

    def close(self) -> None:
        """Of the listening socket, and of connections that were not handed out; a second call does nothing."""
        self._listener.close()
        for connection in [visitor.connection for visitor in self._visitors]:
            connection.close()
        for both in self._here.values():
            for connection in both.values():
                connection.close()
        self._visitors.clear()
        self._here.clear()


def join_host(
    address: tuple[str, int], rank: int, ranks: int, settings: str, wait: Callable[[float], None]
) -> tuple[HostJoined, socket.socket, socket.socket]:
    """A rank's way in: rank 0's answer, the connection that carries steps, the one that only ends. ``wait(seconds)`` is
    called until rank 0 is there and all have come; it may take for ever. Raises SystemFailure where rank 0 refuses it,
    or has ended."""
    process = secrets.token_hex(8)
    steps = _connected(address, wait)
    try:
        life = _connected(address, wait)
    except BaseException:
        steps.close()
        raise
    where = f"{address[0]}:{address[1]}"
    try:
        say(steps, HostJoin(rank, ranks, settings, process, "steps"))
        say(life, HostJoin(rank, ranks, settings, process, "life"))
        visitor, joined = _Visitor(steps), None
        while joined is None:
            wait_ready([steps], _LOOK)
            joined = visitor.hear(HostJoined)
            wait(0)
        if joined.refused:
            raise SystemFailure(f"rank 0 at {where} refuses rank {rank}: {joined.refused}")
        watch_link(life)
        return joined, steps, life
    except OSError as refused:
        steps.close()
        life.close()
        raise SystemFailure(f"rank 0 at {where} has ended, or can't be reached any more: {refused}") from refused
    except BaseException:
        steps.close()
        life.close()
        raise


def _connected(address: tuple[str, int], wait: Callable[[float], None]) -> socket.socket:
    """Tries as long as it takes: rank 0's host may have to start first, and its name to be known."""
    while True:
        try:
            connection = socket.create_connection(address, timeout=2)
            connection.settimeout(None)
            return connection
        except OSError:
            wait(_AGAIN)
