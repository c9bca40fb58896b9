"""Collectives of GPUs of one host, each of which can write to the others' memory (NVLink): kernels of our own for all
that a decode step sends, NCCL for the largest messages. All can be captured in CUDA graphs.

Symmetric memory is torch's (`torch.distributed._symmetric_memory`), which 2.11 and 2.13 have alike: `empty_strided_p2p`
allocates without the pool that `empty` takes memory from, `rendezvous` maps it into all ranks. Its signals and barriers
are not used: they count on the host's side of a launch, or multicast.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightllmd.architecture import collectives_memory
from lightllmd.architecture.collectives_memory import PROGRAMS, MessageLimits, Regions, limits_of
from lightllmd.errors import EngineError
from lightllmd.kernels import collectives_environment
from lightllmd.kernels.collectives import Group
from lightllmd.kernels.collectives_one_shot import Mail, one_shot
from lightllmd.kernels.collectives_one_shot import takes as fits_letters
from lightllmd.kernels.collectives_two_shot import ShareExchange, gather, two_shot
from lightllmd.kernels.collectives_two_shot import takes as fits_shares
from lightllmd.kernels.fused_linear import overlaps


class DeviceGroup(Group):
    """One rank's view. Every rank makes it at the same time, and launches the same calls on its stream in the same
    order, eagerly or in graphs. A rank that waits in a kernel for one that has died waits until its process is ended,
    which frees the device at once; by itself it gives up after minutes (`collectives_signals.PATIENCE`)."""

    def __init__(
        self, processes: dist.ProcessGroup, device: torch.device, largest: int, limits: MessageLimits | None = None
    ) -> None:
        """`processes`: has NCCL, and one device for each rank. `device`: this rank's, with its index, which is the
        current one. `largest`: see `collectives_memory.largest_message`; the same on all ranks. `limits`:
        other ones than `collectives_memory` has. Raises EngineError where the devices can't reach each other's
        memory."""
        self.rank, self.ranks = processes.rank(), processes.size()
        self._processes, self._device = processes, device
        self._limits = limits or limits_of(self.ranks, largest)
        self._overlaps = overlaps(device)
        collectives_environment.settle()
        regions = Regions.of(self.ranks, self._limits)
        memories = self._symmetric(regions.bytes)

        def each(begin: int, end: int) -> tuple[Tensor, ...]:
            return tuple(memory[begin:end] for memory in memories)

        boxes = tuple(box.view(torch.int32) for box in each(0, regions.flags))
        calls = torch.zeros(regions.mail_programs, dtype=torch.int32, device=device)
        self._mail = Mail(boxes, calls, self.rank)
        self._exchange = ShareExchange(
            each(regions.parts, regions.results),
            each(regions.results, regions.bytes),
            tuple(flags.view(torch.int32)[: 2 * PROGRAMS * self.ranks] for flags in each(regions.flags, regions.parts)),
            torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
            self.rank,
            collectives_memory.BLOCK,
        )
        self._meet()

    def _meet(self) -> None:
        """All ranks have zeroed their memory. Makes NCCL ready, too."""
        torch.cuda.synchronize(self._device)
        dist.barrier(self._processes, device_ids=[self._device.index])

    def _symmetric(self, size: int) -> list[Tensor]:
        """Zeroed bytes of this rank's own memory, and those of the others, by rank: uint8 ``[size]``."""
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed import _symmetric_memory

        try:
            if _symmetric_memory.get_backend(self._device) != "CUDA":
                _symmetric_memory.set_backend("CUDA")
            own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self._device)
            own.zero_()
            shared = _symmetric_memory.rendezvous(own, self._processes.group_name)
            self._kept = own, shared
            return [shared.get_buffer(rank, (size,), torch.uint8) for rank in range(self.ranks)]
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank}: the GPUs can't write to each other's memory: {error}") from error

    def sum_(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """By size in one shot, in two, or by NCCL, whose sum is rounded before the residual is added."""
        out = x if residual is None else residual
        size = x.numel() * x.element_size()
        if size == 0:
            return out
        whole = residual is None or residual.is_contiguous()
        if size <= self._limits.one_shot and fits_letters(x) and whole:
            one_shot(x, residual, out, self._mail, pdl=self._overlaps)
        elif size <= self._limits.two_shot and fits_shares(x) and whole:
            two_shot(x, residual, out, self._exchange)
        else:
            x = self._summed_by_nccl(x.contiguous())
            return x if residual is None else residual.add_(x)
        return out

    def _summed_by_nccl(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self._processes)
        return x

    def sum_small(self, x: Tensor) -> Tensor:
        return self._small(x, torch.empty_like(x, memory_format=torch.contiguous_format), largest=False)

    def max_(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        return self._small(x, x, largest=True)

    def _small(self, x: Tensor, out: Tensor, largest: bool) -> Tensor:
        """Into contiguous `out`, which may be `x`: fp32, in as many shots as it takes."""
        at_once = self._limits.one_shot // 4
        for part, into in zip(x.reshape(-1).split(at_once), out.view(-1).split(at_once), strict=True):
            one_shot(part, None, into, self._mail, largest=largest, pdl=self._overlaps)
        return out

    def gather_columns(self, part: Tensor, columns: int) -> Tensor:
        out = part.new_empty(len(part), columns)
        gather(part, out, self._exchange)
        return out

    def warm(self, hidden: int, columns: int, dtype: torch.dtype) -> None:
        """Runs each kernel once, so that none is compiled or loaded while a graph is captured or a request waits.
        `hidden`: of a row of `sum_`; `columns`: of all that `gather_columns` returns."""
        item = dtype.itemsize
        for size in (1, self._limits.one_shot + 1, self._limits.two_shot + 1):
            rows = max(1, -(-size // (hidden * item)))
            x = torch.zeros((rows, hidden), dtype=dtype, device=self._device)
            self.sum_(x)
            self.sum_(x, torch.zeros_like(x))
        scales = torch.zeros((1, 1), device=self._device)
        self.max_(scales)
        self.sum_small(scales)
        self.gather_columns(torch.zeros((1, -(-columns // self.ranks)), device=self._device), columns)
        torch.cuda.synchronize(self._device)
