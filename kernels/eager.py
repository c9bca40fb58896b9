"""The operations as few torch calls as possible, on any device. Shapes and meaning: `reference`.

What the decode step costs on a CPU beside its products is the number of calls, so each takes one to four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.eager_attention import attention
from lightllmd.kernels.eager_ops import gated, rms_norm
from lightllmd.kernels.layout import GroupedBatch, TableBatch
from lightllmd.kernels.linear import DenseLinear, Linear, PackedLinear

# The logits computed again in fp32: more than any close race for the next token has runners.
CLOSE = 32


class EagerKernels:
    """`dispatch.Kernels` of torch's own operations over rows gathered in groups."""

    attention = staticmethod(attention)

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._linear = PackedLinear if device.type == "cpu" and PackedLinear.supports(dtype) else DenseLinear

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._linear(weight, bias)

    def enter(self, batch: GroupedBatch | TableBatch, embedding: Tensor) -> Tensor:
        return functional.embedding(batch.tokens, embedding)

    def normed_product(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        return linear(rms_norm(x, norm, eps))

    def add_product(self, a: Tensor, linear: Linear, x: Tensor) -> Tensor:
        return linear(a, x)

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float, linear: Linear, activation: str) -> Tensor:
        return gated(linear(rms_norm(x, norm, eps)), activation)

    def logits(self, hidden: Tensor, norm: Tensor, eps: float, linear: Linear, rows: Tensor) -> Tensor:
        """The highest `CLOSE` of each row are computed again in fp32, which costs the rows that they take."""
        x = rms_norm(hidden, norm, eps)
        logits = linear(x).float()
        if x.dtype is not torch.float32:
            close = logits.topk(min(CLOSE, logits.shape[-1])).indices
            exact = torch.einsum("rh,rch->rc", x.float(), rows[close].float())
            logits.scatter_(-1, close, exact)
        return logits
