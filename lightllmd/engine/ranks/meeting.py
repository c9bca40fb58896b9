"""How the ranks of one host find each other: at a Unix socket beside the engine's endpoint, where rank 0 hands each of
the others the descriptors of the ring.

The socket has mode 0600 from its first moment and is removed as soon as all have come. Both ends ask the kernel for
the other's user. The connection stays: its end tells each side that the other has ended.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence

import msgspec

from lightllmd.engine.ranks.rendezvous import Rendezvous
from lightllmd.errors import SystemFailure
from lightllmd.ipc.waiting import wait_ready

log = logging.getLogger(__name__)

_LONGEST = 4096  # bytes of either message
_AGAIN = 0.02  # seconds until a rank looks again whether rank 0 is there
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Join(msgspec.Struct):
    """What a rank says of itself."""

    generation: int
    rank: int


class Joined(msgspec.Struct):
    """Rank 0's answer. With it come the descriptors of the ring: its memory, the reader's eventfd, the writer's."""

    ranks: int
    rendezvous: Rendezvous | None  # None: the back end has no collectives


class Meeting:
    """Rank 0's end, from the bound socket until `close`."""

    def __init__(self, path: str, generation: int, ranks: int) -> None:
        """Raises SystemFailure."""
        self._path, self._generation, self._ranks = path, generation, ranks
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        old = os.umask(0o177)
        try:
            self._listener.bind(path)
            self._listener.listen(ranks)
        except OSError as refused:
            self._listener.close()
            raise SystemFailure(f"can't listen on {path}: {refused}") from refused
        finally:
            os.umask(old)
        self._waiting: list[socket.socket] = []  # they have not said yet which rank they are

    def gather(
        self, fds_of: Callable[[int], Sequence[int]], rendezvous: Rendezvous | None, beat: Callable[[], None]
    ) -> dict[int, socket.socket]:
        """The connections of ranks 1 … ranks - 1, each of which was given ``fds_of(rank)``. Calls `beat` while it
        waits. The socket is gone then."""
        joined: dict[int, socket.socket] = {}
        while len(joined) < self._ranks - 1:
            wait_ready([self._listener, *self._waiting], _AGAIN)
            self._accept()
            for connection in list(self._waiting):
                rank = self._heard(connection)
                if rank is None:
                    continue
                self._waiting.remove(connection)
                if not 0 < rank < self._ranks or rank in joined:
                    log.warning("a process that says it is rank %d is refused", rank)
                    connection.close()
                    continue
                answer = msgspec.msgpack.encode(Joined(self._ranks, rendezvous))
                try:
                    socket.send_fds(connection, [answer], list(fds_of(rank)))
                except OSError:
                    connection.close()  # it died, or will come again
                    continue
                joined[rank] = connection
            beat()
        self.close()
        return dict(sorted(joined.items()))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # none is there; one that came is gone again
                return
            connection.setblocking(False)
            user = _user_of(connection)
            if user != os.geteuid():
                log.warning("a process of user %d is refused at %s", user, self._path)
                connection.close()
            else:
                self._waiting.append(connection)

    def _heard(self, connection: socket.socket) -> int | None:
        """The rank that it says it is, -1 if that is none of this generation; None: nothing yet."""
        try:
            message = connection.recv(_LONGEST)
        except BlockingIOError:
            return None
        except OSError:
            return -1
        try:
            join = msgspec.msgpack.decode(message, type=Join)
        except msgspec.DecodeError:
            return -1
        return join.rank if join.generation == self._generation else -1

    def close(self) -> None:
        """Removes the socket; a second call does nothing."""
        if self._listener.fileno() >= 0:
            self._listener.close()
            os.unlink(self._path)
        for connection in self._waiting:
            connection.close()
        self._waiting.clear()


def join(
    path: str, generation: int, rank: int, wait: Callable[[float], None]
) -> tuple[Joined, socket.socket, list[int]]:
    """A rank's way in: rank 0's answer, the connection that stays, the descriptors. ``wait(seconds)`` is called until
    rank 0 is there, and has answered. Raises SystemFailure."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connected = False
    try:
        while not connected:
            try:
                connection.connect(path)
                connected = True
            except (FileNotFoundError, ConnectionRefusedError):
                wait(_AGAIN)
        if _user_of(connection) != os.geteuid():
            raise SystemFailure(f"{path} is another user's")
        connection.send(msgspec.msgpack.encode(Join(generation, rank)))
        connection.setblocking(False)
        while not wait_ready([connection], _AGAIN):
            wait(0)
        message, fds, _, _ = socket.recv_fds(connection, _LONGEST, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            raise SystemFailure(f"rank 0 of generation {generation} turns rank {rank} away, or has ended")
        return msgspec.msgpack.decode(message, type=Joined), connection, fds
    except OSError as refused:
        connection.close()
        raise SystemFailure(f"can't reach rank 0 at {path}: {refused}") from refused
    except BaseException:
        connection.close()
        raise


def _user_of(connection: socket.socket) -> int:
    """Of the process at the other end, when it connected or listened."""
    got = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(got)[1]
    return user
