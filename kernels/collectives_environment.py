"""What the environment of a process with several GPUs' collectives has to say before torch opens a group."""

from __future__ import annotations

import os

# Nothing here multicasts over NVLink: a group's sums are the same bits on each rank without it, and a program that
# ends in the midst of it can take a host's GPUs out of service.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
# A rank that dies ends its group, and the supervisor ends the others' processes: torch's watchdog has nothing to find
# out, to wait for or to write about. It neither aborts communicators by itself nor keeps a record of collectives.
NO_WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_FR_BUFFER_SIZE": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_DESYNC_DEBUG": "0",
}


def settle() -> None:
    """Sets it in this process: multicast is off whatever the caller says, the rest where the caller says nothing."""
    os.environ.update(NO_MULTICAST)
    for name, value in NO_WATCHDOG.items():
        os.environ.setdefault(name, value)
