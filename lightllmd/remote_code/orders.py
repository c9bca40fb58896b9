"""What a code host is asked and answers: MessagePack behind a length, so that no code crosses the border."""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

HEAD = struct.Struct("<Q")  # the length of the message that follows
MOST = 1 << 30  # bytes of an answer
LIGHT, HEAVY = b"l", b"h"  # what a process that forks helpers is told with the socket of a new one


class Order(msgspec.Struct, frozen=True):
    """The first thing that a host is told."""

    task: str  # a name of code_host.tasks.TASKS
    directory: str  # the checkpoint's
    memory: int  # bytes of data that it may have
    arguments: dict[str, Any] = {}


class Answered(msgspec.Struct, frozen=True):
    """What became of it."""

    result: Any = None
    error: str = ""  # not empty: why there is no result


def send(link: socket.socket, message: msgspec.Struct) -> None:
    """Raises OSError."""
    body = msgspec.msgpack.encode(message)
    link.sendall(HEAD.pack(len(body)) + body)


def receive(link: socket.socket, *, most: int = MOST) -> bytes:
    """The body of one message. Raises EOFError where the other end is closed, OSError, TimeoutError."""
    (size,) = HEAD.unpack(_exactly(link, HEAD.size))
    if size > most:
        raise OSError(f"a message of {size} bytes, at most {most}")
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = link.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return bytes(data)
