"""Which version of the operations a device gets. What makes kernels for a GPU is imported only for one."""

from __future__ import annotations

import torch

from lightllmd.kernels.collectives import ALONE, Group
from lightllmd.kernels.dispatch import Kernels


def kernels_for(device: torch.device, dtype: torch.dtype, group: Group = ALONE) -> Kernels:
    """torch's own operations, on any device, of one rank of `group`."""
    from lightllmd.kernels.eager import EagerKernels

    return EagerKernels(device, dtype, group)


def fused_kernels(device: torch.device, decode_kernel: str = "auto", group: Group = ALONE) -> Kernels:
    """Triton's, on a GPU (or, for tests, in Triton's interpreter), of one rank of `group`."""
    from lightllmd.kernels.fused import FusedKernels

    return FusedKernels(device, decode_kernel, group)
