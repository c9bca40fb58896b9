"""How a worker ended, in words and in what follows from it."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from lightllmd import errors
from lightllmd.ipc.messages import Failed

# Signals that a process brings upon itself; any other came from outside.
FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}

# kind of Failed (or the exit code that means the same) -> exit code of the daemon if it never came to serve
PERMANENT = {
    "config": errors.EXIT_CONFIG,
    "weights": errors.EXIT_CONFIG,
    "device": errors.EXIT_NO_DEVICE,
    "memory": errors.EXIT_FAILED,
}
_KIND_OF_CODE = {
    errors.EXIT_CONFIG: "config",
    errors.EXIT_NO_DEVICE: "device",
    errors.EXIT_OUT_OF_MEMORY: "memory",
    errors.EXIT_RANK_GONE: "rank",
}
_WORDS = {
    "config": "configuration error",
    "weights": "unusable weights",
    "device": "no usable device",
    "memory": "out of memory",
}


@dataclass(frozen=True)
class Ending:
    """How a process ended, and what the restart policy and quarantine need to know of that."""

    cause: str
    self_inflicted: bool  # a fault of its own, neither a kill nor a hang
    outside: bool = False  # certainly caused from outside, so no request can be
    exit_code: int | None = None  # permanent: not tried again with the same plan; the daemon's exit code then
    changed: bool = False  # the model's files are others: tried again, since they may be put back
    follows: bool = False  # from the end of another rank of its generation

    @property
    def permanent(self) -> bool:
        """Whether the same plan would fail the same way."""
        return self.exit_code is not None


def signal_name(number: int) -> str:
    """Such as "SIGSEGV"; "signal 40" for one that has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # real-time signals have no names


def classify(
    returncode: int,
    *,
    failed: Failed | None = None,
    hung: str | None = None,
    held: bool = False,
    asked: str | None = None,
    memory_ran_out: bool = False,
) -> Ending:
    """`returncode` as subprocess gives it (negative: a signal).

    `failed`: the last word of the worker; `hung`: why the supervisor ended it; `held`: it didn't hang by itself, such
    as one that was stopped; `asked`: what it was asked to end for; `memory_ran_out`: the kernel has just killed for
    want of memory.
    """
    if hung:
        by = signal_name(-returncode) if returncode < 0 else f"exit {returncode}"
        return Ending(f"hung: {hung}; ended by {by}", False, outside=held)
    if asked:
        return Ending(asked, False, outside=True)
    kind = failed.kind if failed else _KIND_OF_CODE.get(returncode, "error")
    if kind in PERMANENT:
        detail = f": {failed.message}" if failed else f" (exit {returncode})"
        return Ending(_WORDS[kind] + detail, True, exit_code=PERMANENT[kind])
    if failed and kind == "changed":
        return Ending(failed.message, False, outside=True, changed=True)
    if kind == "rank":
        return Ending(failed.message if failed else "another rank is gone", False, follows=True)
    if failed:
        return Ending(failed.message, True)
    if returncode < 0:
        name, fault = signal_name(-returncode), -returncode in FAULTS
        if -returncode == signal.SIGKILL and memory_ran_out:
            return Ending(f"killed by {name}: the kernel killed for want of memory", False)
        return Ending(f"killed by {name}", fault, outside=not fault)
    return Ending(f"ended by itself with exit {returncode}", True)
