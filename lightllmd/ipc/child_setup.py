"""What every child process does first: tie its life to its parent's, make SIGABRT print stacks, open the channel."""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import os
import resource
import signal
import sys

from lightllmd.ipc import channel, messages
from lightllmd.ipc.signals import ignore_meaningless
from lightllmd.ipc.waiting import wait_ready

PR_SET_PDEATHSIG = 1
# The channel's place among a child's descriptors. The kernel lets go of a dying process's files from the highest
# down, and of a GPU's slowly: on an H100 with 60 GB allocated the supervisor reads the end of file 0.5 ms after a
# SIGKILL here, 65 ms after it at number 3, while the pidfd tells of the death after 220 ms.
CHANNEL_FD = 1000


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when the parent's main thread ends. Call from the thread that stays.

    Asked after the signal is armed, so a parent that died before is noticed as well.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def adopt(arguments: list[str]) -> channel.Channel[messages.Down]:
    """Takes ``[channel_fd, parent_pid]`` from the command line; returns the channel to the supervisor.

    SIGINT and SIGQUIT are ignored (a terminal's keys are the supervisor's to handle), as are those that mean nothing;
    SIGTERM keeps its default unless the child sets a handler; SIGABRT prints every thread's stack to stderr and ends
    the process.
    """
    fd, parent = int(arguments[0]), int(arguments[1])
    die_with_parent(parent)
    ignore_meaningless()
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable(file=sys.stderr, all_threads=True)
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _up_to_limit(CHANNEL_FD))
    os.close(fd)
    return channel.inherited(high)


def _up_to_limit(fd: int) -> int:
    """`fd`, or what RLIMIT_NOFILE leaves of it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return fd if soft == resource.RLIM_INFINITY else max(3, min(fd, soft - 16))


def first_message(link: channel.Channel[messages.Down]) -> messages.Down:
    """Blocks for the configuration; ends the process when the supervisor is gone."""
    while True:
        wait_ready([link])
        for message in link.receive():
            return message
        if link.closed:
            sys.exit(0)
