"""No orphans: whatever loses its parent below us becomes our child, and is reaped here."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """A grandchild whose parent dies is then ours instead of init's (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap_orphans(reap_known: Callable[[int], bool]) -> list[int]:
    """Reaps every dead child that has no owner here; returns their pids.

    WNOWAIT looks before it takes: a child with an owner is left to `reap_known(pid)`, which reaps it, keeps its
    status, and answers True; else the status would be stolen from subprocess.Popen.
    """
    orphans: list[int] = []
    while True:
        try:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return orphans
        if dead is None:
            return orphans
        if not reap_known(dead.si_pid):
            os.waitpid(dead.si_pid, os.WNOHANG)
            orphans.append(dead.si_pid)


def kill_group(leader: int) -> None:
    """SIGKILL for what is left of a child's process group (every child leads its own)."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
