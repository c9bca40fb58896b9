"""What the CPU is like and what is free of host memory: through /proc, /sys and the process's own limits."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil

from lightllmd.config.plan import DeviceFacts


def cpu_facts(threads: int, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> DeviceFacts:
    """The CPU's, and the memory that the process's control groups leave it. `threads` is passed on."""
    memory = psutil.virtual_memory()
    limits = list(cgroup_memory(proc, sys))
    flags, name = _cpu_info(proc)
    return DeviceFacts(
        kind="cpu",
        name=name,
        count=1,
        memory_total=min([memory.total, *(limit for limit, _ in limits)]),
        memory_free=_least_free(memory.available, limits),
        fast_dtypes=cpu_fast_dtypes(flags),
        cpu_threads=threads,
    )


def free_memory() -> int:
    """Bytes of host memory that this process can still have: what the kernel, and its control groups, leave it."""
    return _least_free(psutil.virtual_memory().available, list(cgroup_memory()))


def _least_free(available: int, limits: list[tuple[int, int]]) -> int:
    return max(0, min([available, *(limit - used for limit, used in limits)]))


def cpu_fast_dtypes(flags: set[str]) -> list[str]:
    """The dtypes that this instruction set multiplies at full speed, best first (x86 and Arm names)."""
    fast = []
    if flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}:
        fast.append("bfloat16")
    if flags & {"avx512_fp16", "amx_fp16", "asimdhp"}:
        fast.append("float16")
    return [*fast, "float32"]


def _cpu_info(proc: Path) -> tuple[set[str], str]:
    """(flags, name) of the first processor."""
    try:
        text = (proc / "cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        text = ""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set((entries.get("flags") or entries.get("Features") or "").split())
    return flags, entries.get("model name") or platform.processor() or platform.machine()


def usable_cores(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> int:
    """Physical cores within the process's affinity, and no more than its cgroup's CPU quota."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, min([len(cores), *cgroup_cpus(proc, sys)]))


# --- control groups --------------------------------------------------------------------------------------------------


def _groups(proc: Path, sys: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and its ancestors, of version 2 and of version 1's `controller`."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0":
            root = sys / "fs/cgroup"
        elif controller in controllers.split(","):
            root = sys / "fs/cgroup" / controller
        else:
            continue
        folder = root / group.lstrip("/")
        while True:
            if folder.is_dir():
                yield folder
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def cgroup_memory(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each group that limits memory; page cache that can be dropped is not used."""
    for folder in _groups(proc, sys, "memory"):
        limit = _read_number(folder / "memory.max") or _read_number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= 1 << 60:  # version 1 says "none" with a huge number
            continue
        used = _read_number(folder / "memory.current") or _read_number(folder / "memory.usage_in_bytes") or 0
        yield limit, max(0, used - _droppable(folder))


def _droppable(folder: Path) -> int:
    try:
        text = (folder / "memory.stat").read_text()
    except OSError:
        return 0
    entries = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    return int(entries.get("total_inactive_file") or entries.get("inactive_file") or 0)


def cgroup_cpus(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Iterator[int]:
    """CPUs' worth of time that each group with a quota may use, rounded up."""
    for folder in _groups(proc, sys, "cpu"):
        try:
            quota, period = (int(word) for word in (folder / "cpu.max").read_text().split())
        except (OSError, ValueError):
            quota = _read_number(folder / "cpu.cfs_quota_us") or 0
            period = _read_number(folder / "cpu.cfs_period_us") or 0
        if quota > 0 and period > 0:
            yield math.ceil(quota / period)
