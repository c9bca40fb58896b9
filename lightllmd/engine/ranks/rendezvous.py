"""Where the ranks' torch.distributed meets: a TCP port that rank 0 listens on. No torch."""

from __future__ import annotations

import errno
import logging
import socket

import msgspec

from lightllmd.errors import SystemFailure

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


class Rendezvous(msgspec.Struct, frozen=True):
    """Address of the key-value store of a group's rank 0."""

    host: str
    port: int


def listen(port: int, host: str = LOOPBACK) -> socket.socket:
    """A listening socket on `port`, or on a free one where another process has that, which is told in the log: two
    generations may be alive at once. Raises SystemFailure."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last generation may linger
    try:
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as taken:
            if taken.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            listener.close()
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.bind((host, 0))
            listener.listen(128)
            free = listener.getsockname()[1]
            log.info("nccl_port %d can't be had (%s): the ranks meet at %d", port, taken.strerror, free)
    except OSError as refused:
        listener.close()
        raise SystemFailure(f"can't listen on {host}:{port} for the ranks: {refused}") from refused
    return listener
