"""The ranks of a group as forked processes that share memory, as GPUs of one host do: kernels of the collectives run in
Triton's interpreter and really wait for each other."""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lightllmd.kernels.collectives_device import DeviceGroup

FRESH = "LIGHTLLMD_FRESH_PROCESS"  # set in the process that `test_forked_ranks` starts
# What a process that has run other tests leaves to the ones that it forks (threads of OpenMP that are not there, a
# patched interpreter) is nothing to wait for a peer with.
IN_FRESH_PROCESS = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes can't use CUDA"),
    pytest.mark.skipif(FRESH not in os.environ, reason="test_forked_ranks.py runs it in a fresh process"),
]
SECONDS = 120  # that ranks may take; a rank that waits in vain would take for ever


def shared(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that forked processes write to as well."""
    count = int(np.prod(shape))
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def in_ranks(ranks: int, work: Callable[[int], None]) -> None:
    """`work` of each rank at the same time."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank,)) for rank in range(ranks)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
            if process.exitcode != 0:
                break
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.join()


class ForkedGroup(DeviceGroup):
    """A rank's view. What would go to NCCL is counted, and is the sum where all ranks have the same."""

    by_nccl = 0

    def __init__(self, rank: int, memories: list[Tensor], largest: int) -> None:
        """`memories`: `shared` ones, of each rank, uint8."""
        self._memories = memories
        processes = SimpleNamespace(rank=lambda: rank, size=lambda: len(memories))
        super().__init__(cast(Any, processes), torch.device("cpu"), largest)

    def _symmetric(self, size: int) -> list[Tensor]:
        return [memory[:size] for memory in self._memories]

    def _meet(self) -> None:
        pass  # the memory is zeros

    def _summed_by_nccl(self, x: Tensor) -> Tensor:
        self.by_nccl += 1
        return x.mul_(self.ranks)
