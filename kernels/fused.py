"""`dispatch.Kernels` of Triton kernels and cuBLAS, for rows read through the request->slot table.

Nothing here waits for the device or asks it for a length, so a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels import skinny
from lightllmd.kernels.activation import gated
from lightllmd.kernels.embed import enter
from lightllmd.kernels.fused_attention import FusedAttention
from lightllmd.kernels.layout import GroupedBatch, TableBatch
from lightllmd.kernels.linear import DenseLinear, Linear
from lightllmd.kernels.norm import rms_norm

# Products of so many rows are computed in pieces: cuBLAS chooses better tiles for those (TFLOP/s of an 8B model's, at
# length on an H100: 719 at 2048 rows, 644 at 4096, 701 at 8192, 726 at 16384).
PIECE, PIECED = 2048, range(3072, 12288)


class FusedKernels:
    """`decode_kernel` is one of the documented mode names, or "auto" for what is fastest for a shape."""

    def __init__(self, device: torch.device, dtype: torch.dtype, decode_kernel: str = "auto") -> None:
        self.device, self.dtype = device, dtype
        # Programmatic dependent launch begins with Hopper; the interpreter does not know it.
        self._overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.attention = FusedAttention(device, decode_kernel)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return DenseLinear(weight, bias)

    def enter(self, batch: GroupedBatch | TableBatch, embedding: Tensor) -> Tensor:
        assert isinstance(batch, TableBatch)
        x = embedding.new_empty(len(batch.tokens), embedding.shape[1])
        enter(batch.tokens, batch.rows, batch.positions, batch.slots, batch.last, batch.table, embedding, x)
        return x

    def normed_product(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        weight, bias = _parts(linear)
        if not self._streams(x, weight):
            return _product(self._normed(x, norm, eps), weight, bias)
        out = x.new_empty(len(x), len(weight))
        self._stream(x, weight, out, norm, eps, bias=bias)
        return out

    def add_product(self, a: Tensor, linear: Linear, x: Tensor) -> Tensor:
        weight, bias = _parts(linear)
        if self._streams(a, weight):
            self._stream(a, weight, x, bias=bias, residual=x)
            return x
        if bias is not None:
            x.add_(bias)
        for part, into in zip(_pieces(a), _pieces(x), strict=True):
            into.addmm_(part, weight.t())
        return x

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float, linear: Linear, activation: str) -> Tensor:
        weight, bias = _parts(linear)
        out = x.new_empty(len(x), len(weight) // 2)
        if self._streams(x, weight, gated=True):
            self._stream(x, weight, out, norm, eps, bias=bias, activation=activation)
        else:
            gated(_product(self._normed(x, norm, eps), weight, bias), activation, out)
        return out

    def logits(self, hidden: Tensor, norm: Tensor, eps: float, linear: Linear, rows: Tensor) -> Tensor:
        """All of them are fp32 sums: the products store what they accumulate."""
        if not self._streams(hidden, rows):
            return _wide_product(self._normed(hidden, norm, eps), rows)
        out = hidden.new_empty(len(hidden), len(rows), dtype=torch.float32)
        self._stream(hidden, rows, out, norm, eps)
        return out

    def _streams(self, x: Tensor, weight: Tensor, gated: bool = False) -> bool:
        """Whether our product is faster than cuBLAS's."""
        return skinny.prefers(len(x), *weight.shape, self.dtype, gated)

    def _stream(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        norm: Tensor | None = None,
        eps: float = 0.0,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        """Our product, with the norm before it inside or apart."""
        rows = len(x)
        if norm is not None and not skinny.fuses_norm(rows, self.dtype):
            x, norm = self._normed(x, norm, eps), None
        skinny.linear(
            x,
            weight,
            out,
            norm=norm,
            eps=eps,
            bias=bias,
            residual=residual,
            activation=activation,
            pdl=self._overlaps and skinny.overlaps(rows, len(weight)),
        )

    def _normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        rms_norm(x, norm, eps, out)
        return out


def _parts(linear: Linear) -> tuple[Tensor, Tensor | None]:
    assert isinstance(linear, DenseLinear)
    return linear.weight, linear.bias


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(PIECE) if PIECED.start < len(x) < PIECED.stop else (x,)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """cuBLAS's ``x @ weight.T + bias``."""
    parts = _pieces(x)
    if len(parts) == 1:
        return functional.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    for part, into in zip(parts, _pieces(out), strict=True):
        if bias is None:
            torch.mm(part, weight.t(), out=into)
        else:
            torch.addmm(bias, part, weight.t(), out=into)
    return out


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32, whatever the operands are."""
    if x.dtype is torch.float32:
        return functional.linear(x, weight)
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float())
