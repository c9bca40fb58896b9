"""Collectives of ranks on CPUs, through gloo.

Parts are gathered and summed in the order of the ranks, so that the sum of a token is the same bits on every rank and
in every step, whatever else is in it: gloo's own all-reduce adds each piece of a message in another order. Between two
ranks that sends as many bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightllmd.kernels.collectives import Group


class GlooGroup(Group):
    """Of a process group of torch.distributed that has gloo. Where another rank is gone it raises RuntimeError."""

    def __init__(self, processes: Any) -> None:
        """`processes`: a `torch.distributed.ProcessGroup`, or `ProcessGroupGloo`."""
        self._processes = processes
        self.rank, self.ranks = processes.rank(), processes.size()

    def sum_(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        total = self._summed(x)
        if residual is not None:
            total += residual
        return total.to(x.dtype)

    def sum_small(self, x: Tensor) -> Tensor:
        return self._summed(x)

    def max_(self, x: Tensor) -> Tensor:
        return self._gathered(x).amax(0)

    def gather_columns(self, part: Tensor, columns: int) -> Tensor:
        return self._gathered(part).transpose(0, 1).flatten(1)[:, :columns].contiguous()

    def _summed(self, x: Tensor) -> Tensor:
        """In fp32, in memory of its own."""
        first, *others = self._gathered(x)
        total = first.to(torch.float32, copy=True)
        for part in others:
            total += part
        return total

    def _gathered(self, x: Tensor) -> Tensor:
        """``[ranks, *x.shape]``."""
        parts = x.new_empty((self.ranks, *x.shape))
        if x.numel():
            self._processes._allgather_base(parts.flatten(0, 1), x.contiguous()).wait()
        return parts
