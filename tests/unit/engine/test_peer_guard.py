"""A rank whose main thread waits where no Python code runs, as in a collective, ends when it is told to, and when
another rank has ended."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

import pytest

from lightllmd import errors
from lightllmd.engine.ranks.guard import PeerGuard, end_process

PEER = 3


def stuck_rank() -> tuple[int, socket.socket]:
    """Its pid, and the other rank's end of its connection. Its main thread waits for a lock that it holds itself, which
    no signal interrupts."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        ours.close()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
        PeerGuard({PEER: theirs}, end_process).start(terminates=True)
        lock, lib = ctypes.create_string_buffer(128), ctypes.CDLL(None)
        os.write(told, b"x")
        lib.pthread_mutex_lock(lock)
        lib.pthread_mutex_lock(lock)
        os._exit(1)
    theirs.close()
    assert os.read(ready, 1) == b"x"
    for fd in (ready, told):
        os.close(fd)
    return pid, ours


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ("SIGTERM", errors.EXIT_OK),
        ("farewell", errors.EXIT_OK),
        ("death", errors.EXIT_RANK_GONE),
    ],
)
def test_a_rank_that_is_stuck_ends_by_itself(event: str, code: int) -> None:
    pid, peer = stuck_rank()
    if event == "SIGTERM":
        os.kill(pid, signal.SIGTERM)
    elif event == "farewell":
        other = PeerGuard({0: peer}, end_process)
        other.farewell()
        other.start(terminates=False)
        other.close()
    else:
        peer.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    peer.close()


def test_a_failure_of_a_rank_that_another_ones_end_explains_is_told_as_that() -> None:
    """gloo raises something of its own when the other end of a connection is gone."""
    peer, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    guard = PeerGuard({PEER: ours}, lambda rank, farewell: None)
    with pytest.raises(RuntimeError, match="mine"), guard.blaming():
        raise RuntimeError("mine")
    guard.start(terminates=False)
    guard.check()
    peer.close()
    with pytest.raises(errors.RankGone, match=f"rank {PEER} has ended"), guard.blaming():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(errors.OutOfMemory), guard.blaming():
        raise errors.OutOfMemory("its own")
    with pytest.raises(errors.RankGone):
        guard.check()
    guard.close()
