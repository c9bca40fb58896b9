"""What /proc says of the host's memory and of a worker."""

from __future__ import annotations

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int | None:
    """Bytes that a new process can have without swapping; None where the kernel doesn't say."""
    try:
        with open("/proc/meminfo", "rb") as meminfo:
            for line in meminfo:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def resident(pid: int) -> int:
    """Bytes of a process's resident set; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def memory_kills() -> int:
    """Processes that the kernel has killed for want of memory since it booted; 0 where it doesn't say."""
    try:
        with open("/proc/vmstat", "rb") as vmstat:
            return next((int(line.split()[1]) for line in vmstat if line.startswith(b"oom_kill ")), 0)
    except OSError:
        return 0


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP or its like holds the process. One that a debugger holds (state t) is not meant."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False
