"""The operations as few torch calls as possible, on any device. Shapes and meaning: `reference`.

What the decode step costs on a CPU beside its matmuls is the number of calls, so each takes one to four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.eager_attention import attention
from lightllmd.kernels.eager_linear import DenseLinear, EagerHead, EagerLinear, PackedLinear
from lightllmd.kernels.eager_ops import rms_norm
from lightllmd.kernels.layout import Batch, GatheredRows
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.schemes import WHOLE, Shard, built


class EagerKernels:
    """`dispatch.Kernels` of torch's own operations over rows gathered in groups."""

    attention = staticmethod(attention)

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        packs = device.type == "cpu" and PackedLinear.supports(dtype)
        self._linears: dict[str, type[EagerLinear]] = {"dense": PackedLinear if packs else DenseLinear}

    def linear(
        self, role: str, weight: Tensor, bias: Tensor | None, scheme: str = "dense", shard: Shard = WHOLE
    ) -> EagerLinear:
        """See `dispatch.Kernels`."""
        return built(role, scheme, shard, self._linears)(weight, bias)

    def normalise_(self, x: Tensor, norm: Norm) -> None:
        """See `dispatch.Kernels`."""
        x.copy_(rms_norm(x, norm.weight, norm.eps, norm.offset))

    def embedding(self, weight: Tensor, scale: float | None = None) -> EagerEmbedding:
        """See `dispatch.Kernels`."""
        return EagerEmbedding(weight, scale)

    def head(
        self,
        weight: Tensor,
        norm: Norm,
        *,
        tied: bool,
        soft_cap: float | None = None,
        scheme: str = "dense",
        shard: Shard = WHOLE,
    ) -> EagerHead:
        """See `dispatch.Kernels`."""
        return EagerHead(built("head", scheme, shard, self._linears), weight, norm, tied=tied, soft_cap=soft_cap)


class EagerEmbedding:
    """`linear.Embedding` of a batch of `GatheredRows`."""

    def __init__(self, weight: Tensor, scale: float | None) -> None:
        self.weight = weight
        # As transformers has it: rounded to the dtype, so that the product of both is.
        self._scale = None if scale is None else torch.tensor(scale, dtype=weight.dtype, device=weight.device)

    def __call__(self, batch: Batch[GatheredRows]) -> Tensor:
        """See `linear.Embedding`."""
        x = functional.embedding(batch.tokens, self.weight)
        return x if self._scale is None else x.mul_(self._scale)

    def tensors(self) -> dict[str, Tensor]:
        """See `linear.Embedding`."""
        return {"weight": self.weight}
