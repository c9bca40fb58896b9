"""Signals that would end a process by default and mean nothing to ours."""

from __future__ import annotations

import signal

# A terminal that hangs up, timers and user signals that were meant for others, real-time ones. Those of a fault, of a
# resource limit, of job control, and SIGTERM, SIGINT, SIGQUIT are none of these.
MEANINGLESS = (
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGPIPE,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPWR,
    signal.SIGSTKFLT,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)


def ignore_meaningless() -> None:
    """For this process, and for what it starts, as far as that sets none of them itself."""
    for number in MEANINGLESS:
        signal.signal(number, signal.SIG_IGN)
