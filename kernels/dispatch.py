"""The operations that models are made of, and which version of them a device gets."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightllmd.kernels.layout import GroupedBatch, Heads, TableBatch
from lightllmd.kernels.linear import Linear


class Kernels(Protocol):
    """The operations of one device and dtype, as large as their fastest versions fuse them. x is the residual stream
    ``[T, hidden]``; its buffer is given away, so a version may compute in place."""

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Takes over a weight ``[out, in]`` and its bias."""

    def enter(self, batch: GroupedBatch | TableBatch, embedding: Tensor) -> Tensor:
        """The embedded tokens of a step ``[T, hidden]``."""

    def normed_product(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        """``linear(rms_norm(x))``; x stays as it is."""

    def attention(
        self,
        qkv: Tensor,
        cache: Tensor,
        batch: GroupedBatch | TableBatch,
        heads: Heads,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """``qkv [T, (H + 2K) D]``, given away -> ``[T, H D]``: norms of the heads if there are any, rotation, keys and
        values into the cache, causal attention of each token over its row; ``[R, H D]`` of the `wanted` [R] if any
        are named."""

    def add_product(self, a: Tensor, linear: Linear, x: Tensor) -> Tensor:
        """``x + linear(a)``."""

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float, linear: Linear, activation: str) -> Tensor:
        """``act(gate) * up`` of ``linear(rms_norm(x)) = [gate, up]``; x stays as it is."""

    def logits(self, hidden: Tensor, norm: Tensor, eps: float, linear: Linear, rows: Tensor) -> Tensor:
        """fp32 ``[R, vocab]``, of ``hidden [R, hidden]``; `rows` is the weight of `linear` in rows.

        A 16-bit product is rounded when it is stored: around 25, where the best logits of real models lie, bf16 knows
        only every eighth, so that the best two often tie. The best of each row are therefore those of fp32 sums.
        """


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """torch's own operations, on any device."""
    from lightllmd.kernels.eager import EagerKernels

    return EagerKernels(device, dtype)


def fused_kernels(device: torch.device, dtype: torch.dtype, decode_kernel: str = "auto") -> Kernels:
    """Triton's, on a GPU (or, for tests, in Triton's interpreter)."""
    from lightllmd.kernels.fused import FusedKernels

    return FusedKernels(device, dtype, decode_kernel)
