"""`dispatch.Kernels` of Triton kernels and cuBLAS, for rows read through the request->slot table.

Nothing here waits for the device or asks it for a length, so a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.kernels.embed import embed
from lightllmd.kernels.fused_attention import FusedAttention
from lightllmd.kernels.fused_linear import FusedDenseHead, FusedDenseLinear
from lightllmd.kernels.layout import Batch, TableRows
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.norm import rms_norm
from lightllmd.kernels.schemes import WHOLE, Shard, built

LINEARS = {"dense": FusedDenseLinear}
HEADS = {"dense": FusedDenseHead}


class FusedKernels:
    """`decode_kernel` is one of the documented mode names, or "auto" for what is fastest for a shape."""

    def __init__(self, device: torch.device, dtype: torch.dtype, decode_kernel: str = "auto") -> None:
        self.attention = FusedAttention(device, decode_kernel)

    def linear(
        self, role: str, weight: Tensor, bias: Tensor | None, scheme: str = "dense", shard: Shard = WHOLE
    ) -> FusedDenseLinear:
        """See `dispatch.Kernels`."""
        return built(role, scheme, shard, LINEARS)(weight, bias)

    def normalise_(self, x: Tensor, norm: Norm) -> None:
        """See `dispatch.Kernels`."""
        rms_norm(x, norm, x)

    def embedding(self, weight: Tensor, scale: float | None = None) -> FusedEmbedding:
        """See `dispatch.Kernels`."""
        return FusedEmbedding(weight, scale)

    def head(
        self,
        weight: Tensor,
        norm: Norm,
        *,
        tied: bool,
        soft_cap: float | None = None,
        scheme: str = "dense",
        shard: Shard = WHOLE,
    ) -> FusedDenseHead:
        """See `dispatch.Kernels`."""
        return built("head", scheme, shard, HEADS)(weight, norm, tied=tied, soft_cap=soft_cap)


class FusedEmbedding:
    """`linear.Embedding` of a batch of `TableRows`: its slots join the table in the same launch."""

    def __init__(self, weight: Tensor, scale: float | None) -> None:
        self.weight = weight
        # As transformers has it: rounded to the dtype, so that the product of both is.
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=weight.dtype))

    def __call__(self, batch: Batch[TableRows]) -> Tensor:
        """See `linear.Embedding`."""
        x = self.weight.new_empty(len(batch.tokens), self.weight.shape[1])
        where = (batch.tokens, batch.rows, batch.positions, batch.slots, batch.metadata.last, batch.metadata.table)
        embed(*where, self.weight, x, self._scale)
        return x

    def tensors(self) -> dict[str, Tensor]:
        """See `linear.Embedding`."""
        return {"weight": self.weight}
