"""What a process that decodes an image may do from now on: compute, take so much memory, and write to what is open.

Limits of the kernel that nothing of this process can lift: memory, CPU time, the size of what is written, no further
descriptor (so no file, no connection), no further process. A seccomp filter beside them leaves the system calls alone
that computing needs, so that code which takes the process over can't trace or signal others of the same user.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_PAGE = os.sysconf("SC_PAGE_SIZE")

# Opcodes of classic BPF, and what seccomp hands to it (linux/seccomp.h).
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # the latter: EPERM
# System calls by machine: AUDIT_ARCH, prlimit64 (for the process itself alone), and those that are allowed.
_CALLS = {
    "x86_64": (
        0xC000003E,
        302,
        {
            "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
            "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18,
            "readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39,
            "exit": 60, "ftruncate": 77, "gettimeofday": 96, "sysinfo": 99, "sigaltstack": 131, "gettid": 186,
            "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228,
            "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "getrandom": 318, "rseq": 334,
        },
    ),
    "aarch64": (
        0xC00000B7,
        261,
        {
            "ftruncate": 46, "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
            "pread64": 67, "pwrite64": 68, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98,
            "nanosleep": 101, "clock_gettime": 113, "clock_nanosleep": 115, "sched_getaffinity": 123,
            "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
            "rt_sigprocmask": 135, "rt_sigreturn": 139, "gettimeofday": 169, "getpid": 172, "gettid": 178,
            "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
            "getrandom": 278, "rseq": 293,
        },
    ),
}  # fmt: skip


def address_space() -> int:
    """Bytes of it that this process has taken."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * _PAGE


def confine(*, memory: int, most_memory: int, cpu_seconds: int, written: int) -> None:
    """For good. `memory`: bytes of address space, which `allow_memory` raises up to `most_memory`. `written`: bytes of
    one file."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, written)
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)
    _limit(resource.RLIMIT_AS, memory, most_memory)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_NOFILE, 0)
    _filter_calls()


def allow_memory(memory: int) -> None:
    """Up to so many bytes of address space, as far as `confine` lets it."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    """As asked, or what the present limit leaves of it."""
    _, most = resource.getrlimit(kind)
    wanted = soft if hard is None else hard
    hard = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(kind, (min(soft, hard), hard))


def _filter_calls() -> bool:
    """False where this kernel or machine has no such filter: the limits stay."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return False
    architecture, own_limits, calls = known
    program = b"".join(_program(architecture, own_limits, sorted(calls.values())))
    lines = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None, use_errno=True)
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines)))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, described, 0, 0) == 0


def _program(architecture: int, own_limits: int, calls: list[int]) -> Iterable[bytes]:
    """The instructions: 16 bits of opcode, two jumps of 8 bits, 32 bits of operand."""

    def line(code: int, operand: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("HBBI", code, then, otherwise, operand)

    yield line(_LOAD, _ARCHITECTURE)
    yield line(_EQUAL, architecture, then=1)
    yield line(_RETURN, _REFUSE)
    yield line(_LOAD, _NUMBER)
    for number in calls:
        yield line(_EQUAL, number, otherwise=1)
        yield line(_RETURN, _ALLOW)
    yield line(_EQUAL, own_limits, otherwise=5)
    yield line(_LOAD, _FIRST_ARGUMENT)
    yield line(_EQUAL, 0, otherwise=3)
    yield line(_LOAD, _FIRST_ARGUMENT + 4)
    yield line(_EQUAL, 0, otherwise=1)
    yield line(_RETURN, _ALLOW)
    yield line(_RETURN, _REFUSE)
