"""The linears of a CPU with quantised weights that it and this build of torch have kernels for. The others are
`dequantised_linear`'s."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightllmd.kernels.cpu.int4 import Int4Linears
from lightllmd.kernels.cpu.int8 import W8A8Linear, W8A16Linear
from lightllmd.kernels.linear import Linear


def cpu_linears(dtype: torch.dtype) -> dict[str, Callable[..., Linear]]:
    """By the names of their schemes, for a model that computes in `dtype`."""
    found: dict[str, Callable[..., Linear]] = {}
    if W8A8Linear.supported():
        found["w8a8"] = W8A8Linear
    if W8A16Linear.supports(dtype):
        found["w8a16"] = W8A16Linear
    if Int4Linears.supported():
        found["w4a16"] = Int4Linears(dtype)
    return found
