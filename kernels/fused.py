"""`dispatch.Kernels` of Triton kernels and cuBLAS, for rows read through the request->slot table.

Nothing here waits for the device or asks it for a length, so a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.kernels.collectives import ALONE, Group
from lightllmd.kernels.dequantised_linear import DEQUANTISED
from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.embed import embed
from lightllmd.kernels.fused_attention import FusedAttention
from lightllmd.kernels.fused_linear import FusedDenseHead, FusedDenseLinear
from lightllmd.kernels.layout import Batch, TableRows
from lightllmd.kernels.linear import Embedding, Norm
from lightllmd.kernels.norm import rms_norm
from lightllmd.kernels.packed.linear import FusedPackedLinears
from lightllmd.kernels.w8a8.linear import W8A8


class FusedEmbedding(Embedding):
    """Of a batch of `TableRows`: its slots join the table in the same launch."""

    def __init__(self, weight: Tensor, scale: float | None, first: int | None) -> None:
        """`first`: the token of the first row where others have no row."""
        super().__init__(weight)
        # As transformers has it: rounded to the dtype, as the result is.
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=weight.dtype))
        self._first = first

    def __call__(self, batch: Batch[TableRows]) -> Tensor:
        x = self.weight.new_empty(len(batch.tokens), self.weight.shape[1])
        where = (batch.tokens, batch.rows, batch.positions, batch.slots, batch.metadata.last, batch.metadata.table)
        embed(*where, self.weight, x, self._scale, self._first)
        return x


class FusedKernels(Kernels):
    """`decode_kernel` is one of the documented mode names, or "auto" for what is fastest for a shape."""

    def __init__(self, device: torch.device, decode_kernel: str = "auto", group: Group = ALONE) -> None:
        attention = FusedAttention(device, decode_kernel)
        packed = FusedPackedLinears(device)
        linears = {**DEQUANTISED, **W8A8, "dense": FusedDenseLinear, "w4a16": packed, "w8a16": packed}
        super().__init__(linears, {"dense": FusedDenseHead}, FusedEmbedding, attention, group)

    def normalise_(self, x: Tensor, norm: Norm) -> None:
        rms_norm(x, norm, x)
