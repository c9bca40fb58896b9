"""``python -m lightllmd.code_host LINK_FD``: the guard of one code host.

It runs no code of a checkpoint: it forks the host that does, adopts whatever that forks and loses, and when the host or
the link's other end is gone it kills all of them and ends. The host's exit status is passed on, a signal as 128 + n.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable

_SWEEP = 1.0  # seconds between two looks for processes that the host lost
_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS = 1000  # of killing, at most: something may fork as fast as it is killed
_GIVEN_UP = 124


def main() -> int:
    link = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _let_go)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    scratch = tempfile.mkdtemp(prefix="lightllmd-code-")
    try:
        guard = os.getpid()
        host = os.fork()
        if host == 0:
            _become_host(link, guard, scratch)
        return _watch(link, host)
    except _Released:
        return _GIVEN_UP
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_all()
        shutil.rmtree(scratch, ignore_errors=True)


class _Released(Exception):
    """SIGTERM came."""


def _let_go(*_: object) -> None:
    raise _Released


def _become_host(link: socket.socket, guard: int, scratch: str) -> None:
    """Never returns."""
    try:
        from lightllmd.code_host.host import serve

        serve(link, guard, scratch)
    finally:
        os._exit(1)


def _watch(link: socket.socket, host: int) -> int:
    """Until the host has ended, whose status is returned, or the link's other end is closed."""
    pidfd = os.pidfd_open(host)
    watch = select.poll()
    watch.register(link, select.POLLRDHUP)
    watch.register(pidfd, select.POLLIN)
    while not (events := watch.poll(_SWEEP * 1000)):
        _kill(child for child in _children() if child != host)
    if any(fd == pidfd for fd, _ in events):
        code = os.waitstatus_to_exitcode(os.waitpid(host, 0)[1])
        return code if code >= 0 else 128 - code
    return _GIVEN_UP


def _children() -> list[int]:
    """Our own; those of a dead child become ours."""
    own, found = os.getpid(), []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # "pid (name) state ppid …", and the name may hold anything
                if int(file.read().rpartition(b")")[2].split()[1]) == own:
                    found.append(int(name))
    return found


def _kill(children: Iterable[int]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _kill_all() -> None:
    for _ in range(_ROUNDS):
        if not (children := _children()):
            return
        _kill(children)
        time.sleep(0)


if __name__ == "__main__":
    sys.exit(main())
