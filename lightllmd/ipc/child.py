"""What every child process does first: tie its life to its parent's, make SIGABRT print stacks, open the channel."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import select
import signal
import sys

from lightllmd.ipc import channel, messages

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when the parent's main thread ends. Call from the thread that stays.

    Asked after the signal is armed, so a parent that died before is noticed as well.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def adopt(arguments: list[str]) -> channel.Channel[messages.Down]:
    """Takes ``[channel_fd, parent_pid]`` from the command line; returns the channel to the supervisor.

    SIGINT is ignored (a terminal's ^C is the supervisor's to handle); SIGTERM keeps its default unless the child
    sets a handler; SIGABRT prints every thread's stack to stderr and ends the process.
    """
    fd, parent = int(arguments[0]), int(arguments[1])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(file=sys.stderr, all_threads=True)
    os.set_inheritable(fd, False)
    return channel.inherited(fd)


def first_message(link: channel.Channel[messages.Down]) -> messages.Down:
    """Blocks for the configuration; ends the process when the supervisor is gone."""
    while True:
        select.select([link], [], [])
        for message in link.receive():
            return message
        if link.closed:
            sys.exit(0)
