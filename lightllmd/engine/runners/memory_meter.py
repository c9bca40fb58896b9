"""What loading and the steps really took, to be shown beside the plan's budget. Measures, decides nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


class MemoryMeter:
    """Bytes of this process on its device: resident memory on a CPU, torch's allocator on a GPU.

    KV cache pages of a CPU become resident as slots are first used, so `used` grows towards the budget.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process(os.getpid())
        self.before = self.used()
        self.loaded = 0  # weights and tables, set by `mark_loaded`
        self.worst_step = 0  # most that a step took beyond what it found
        self.graphs = 0  # with all that compiling and loading kernels took
        self.group = 0  # what the ranks exchange messages in, and NCCL's buffers: not torch's allocator's
        self.asleep: int | None = None  # set by `mark_asleep`
        self._free_when_loaded = 0

    def used(self) -> int:
        """Bytes now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return int(self._process.memory_info().rss)

    @contextmanager
    def opening_group(self) -> Iterator[None]:
        """Around what opens the group of ranks, on a GPU."""
        before, reserved = torch.cuda.mem_get_info(self.device)[0], self.used()
        yield
        torch.cuda.empty_cache()
        self.group = before - torch.cuda.mem_get_info(self.device)[0] - (self.used() - reserved)

    def mark_loaded(self) -> None:
        """Weights and tables are there."""
        self.loaded, self.asleep = self.used() - self.before, None
        if self.device.type == "cuda":
            self._free_when_loaded = torch.cuda.mem_get_info(self.device)[0]

    def begin_step(self) -> int:
        """Returns what `end_step` is told."""
        return self.used()

    def end_step(self, begun: int) -> None:
        """`begun`: bytes in use when the step began."""
        self.worst_step = max(self.worst_step, self.used() - begun)

    def mark_graphs(self) -> None:
        """The graphs were captured, and kept the memory that they compute in."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            self.graphs = self._free_when_loaded - torch.cuda.mem_get_info(self.device)[0]
            torch.cuda.reset_peak_memory_stats(self.device)

    def mark_worst_steps(self) -> None:
        """All admissible steps of the worst kinds have run since `mark_graphs`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.worst_step = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)

    def mark_asleep(self) -> None:
        """All that can be given back was. Of a GPU this is what all processes have there: where no other has any, the
        process's context with the kernels that it loaded, and a spare engine's."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            self.asleep = total - free
        else:
            self.asleep = self.used()

    def stats(self) -> dict[str, float]:
        """For heartbeat and log: names, bytes."""
        stats = {
            "memory_loaded": float(self.loaded),
            "memory_worst_step": float(self.worst_step),
            "memory_used": float(self.used()),
        }
        if self.device.type == "cuda":
            stats["memory_graphs"] = float(self.graphs)
        if self.group:
            stats["memory_group"] = float(self.group)
        if self.asleep is not None:
            stats["memory_asleep"] = float(self.asleep)
        return stats
