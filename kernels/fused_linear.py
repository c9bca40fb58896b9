"""Linears of a GPU: matmuls of few rows stream the weight through kernels of our own, larger ones are cuBLAS's."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels import skinny
from lightllmd.kernels.activation import gated, soft_cap_
from lightllmd.kernels.cards import card_of
from lightllmd.kernels.linear import DenseHead, Linear, Norm
from lightllmd.kernels.norm import rms_norm

# Matmuls of so many rows are computed in chunks of rows: cuBLAS chooses better tiles for those (TFLOP/s of an 8B
# model's, at length on an H100: 719 at 2048 rows, 644 at 4096, 701 at 8192, 726 at 16384).
CHUNK, CHUNKED = 2048, range(3072, 12288)


class FusedLinear(Linear):
    """Normalises what it has made in a launch of its own."""

    def _post_normed(self, out: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
        into = out if residual is None else residual
        rms_norm(out, norm, into, residual)
        return into


class FusedDenseLinear(FusedLinear):
    """Of a row-major weight ``[out, in]`` in the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes over a weight ``[out, in]`` and its bias ``[out]``."""
        super().__init__(len(weight), weight=weight, bias=bias)
        self.weight, self.bias = weight, bias
        self._card = card_of(weight.device)
        self._overlaps = overlaps(weight.device)

    def _fused(self, x: Tensor, norm: Norm | None, activation: str | None, residual: Tensor | None) -> Tensor:
        rows, gates = len(x), activation is not None
        if skinny.prefers(rows, *self.weight.shape, x.dtype, gates, self._card.kind):
            columns = self.out_features // 2 if gates else self.out_features
            out = x.new_empty(rows, columns) if residual is None else residual
            _stream(x, self.weight, out, self._overlaps, norm, self.bias, residual, activation)
            return out
        if norm is not None:
            x = normed(x, norm)
        if residual is not None:
            return add_matmul(x, self.weight, self.bias, residual)
        out = matmul(x, self.weight, self.bias)
        if activation is None:
            return out
        activated = x.new_empty(rows, self.out_features // 2)
        gated(out, activation, activated)
        return activated


class FusedDenseHead(DenseHead):
    """All logits are fp32 sums, since the matmuls store what they accumulate."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Head.logits`."""
        rows = self._rows
        if skinny.prefers(len(hidden), *rows.shape, hidden.dtype, False, card_of(rows.device).kind):
            logits = hidden.new_empty(len(hidden), len(rows), dtype=torch.float32)
            _stream(hidden, rows, logits, self._overlaps, self._norm)
        else:
            logits = _wide_matmul(normed(hidden, self._norm), rows)
        return logits if self._soft_cap is None else soft_cap_(logits, self._soft_cap)

    @cached_property
    def _overlaps(self) -> bool:
        return overlaps(self._rows.device)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """``norm(x)`` ``[T, hidden]`` in memory of its own."""
    out = torch.empty_like(x)
    rms_norm(x, norm, out)
    return out


def _stream(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    overlaps: bool,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> None:
    """`skinny.linear`, with the norm inside it or in a launch of its own. `overlaps`: the device has programmatic
    dependent launch."""
    rows = len(x)
    if norm is not None and not skinny.fuses_norm(rows, x.dtype):
        x, norm = normed(x, norm), None
    pdl = overlaps and skinny.overlaps(rows, len(weight))
    skinny.linear(x, weight, out, norm=norm, bias=bias, residual=residual, activation=activation, pdl=pdl)


def overlaps(device: torch.device) -> bool:
    """Programmatic dependent launch begins with Hopper; the interpreter does not know it."""
    return device.type == "cuda" and card_of(device).overlaps


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(CHUNK) if CHUNKED.start < len(x) < CHUNKED.stop else (x,)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """cuBLAS's ``x @ weight.T + bias``, in new memory where `out` is not given."""
    parts = _chunks(x)
    if out is None:
        if len(parts) == 1:
            return functional.linear(x, weight, bias)
        out = x.new_empty(len(x), len(weight))
    for part, into in zip(parts, _chunks(out), strict=True):
        if bias is None:
            torch.mm(part, weight.t(), out=into)
        else:
            torch.addmm(bias, part, weight.t(), out=into)
    return out


def add_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """cuBLAS's ``residual += x @ weight.T + bias``."""
    if bias is not None:
        residual.add_(bias)
    for part, into in zip(_chunks(x), _chunks(residual), strict=True):
        into.addmm_(part, weight.t())
    return residual


def _wide_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32, whatever the operands are."""
    if x.dtype is torch.float32:
        return functional.linear(x, weight)
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float())
