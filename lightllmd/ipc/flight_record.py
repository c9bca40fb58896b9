"""Anonymous shared memory in which an engine notes what it is doing, so that its death can be explained.

The supervisor makes the memory (a memfd: no name, nothing to leak) and hands the descriptor to the child; the
engine writes before each step whose membership changed; the supervisor reads when the process is dead or has been
sent SIGKILL, which it survives.
"""

from __future__ import annotations

import mmap
import os

import msgspec

_LOOKS = 10
SIZE = 1 << 18  # bytes: room for some 25,000 request numbers


class Flight(msgspec.Struct):
    """The last step that was begun."""

    step: int = 0
    kind: str = "idle"  # "prefill" | "decode" | "idle"
    rows: int = 0
    tokens: int = 0  # tokens fed in this step
    unproven: list[int] = []  # requests admitted that have produced no token since their (re)admission
    quarantined: int = 0  # the suspect that runs alone in it, see Scheduler; 0: none


def create() -> int:
    """A fresh record; the descriptor is the supervisor's and inheritable on demand (pass_fds). Raises OSError where
    memory has no room for it: taken later, by a write to the mapping, it would end the engine by SIGBUS."""
    fd = os.memfd_create("lightllmd-flight", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, SIZE)
    except OSError:
        os.close(fd)
        raise
    return fd


class FlightRecorder:
    """The engine's end."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SIZE)
        os.close(fd)

    def write(self, flight: Flight) -> None:
        """Replaces the record. Where not all of `unproven` has room, the newest 20,000 requests stay."""
        body = msgspec.msgpack.encode(flight)
        if len(body) > SIZE - 4:
            flight.unproven = flight.unproven[-20_000:]
            body = msgspec.msgpack.encode(flight)
        # Length 0 while the body changes: a death in between reads as "unknown", never as garbage.
        self._map[0:4] = bytes(4)
        self._map[4 : 4 + len(body)] = body
        self._map[0:4] = len(body).to_bytes(4, "little")


def read(fd: int) -> Flight:
    """The record of a process that is dead, or has just been killed. An unwritten or half-written one reads as an idle
    step 0."""
    body = _body(fd)
    for _ in range(_LOOKS):  # a process that was killed may write for some microseconds more
        before, body = body, _body(fd)
        if before == body:
            break
    return msgspec.msgpack.decode(body, type=Flight) if body else Flight()


def _body(fd: int) -> bytes:
    return os.pread(fd, int.from_bytes(os.pread(fd, 4, 0), "little"), 4)
