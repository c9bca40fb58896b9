"""Which version of the operations a device gets. What makes kernels for a GPU is imported only for one."""

from __future__ import annotations

import torch

from lightllmd.kernels.dispatch import Kernels


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """torch's own operations, on any device."""
    from lightllmd.kernels.eager import EagerKernels

    return EagerKernels(device, dtype)


def fused_kernels(device: torch.device, decode_kernel: str = "auto") -> Kernels:
    """Triton's, on a GPU (or, for tests, in Triton's interpreter)."""
    from lightllmd.kernels.fused import FusedKernels

    return FusedKernels(device, decode_kernel)
