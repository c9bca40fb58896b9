"""Linears of torch's own operations: rows of the weight on any device, or the form that oneDNN reads fastest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.eager_ops import gated, rms_norm, soft_cap_
from lightllmd.kernels.linear import DenseHead, Linear, Norm

# oneDNN chooses its packed layout for a number of rows; at run time any number works. Measured on an AVX-512 CPU:
# a layout for 64 is as fast as the best at 1 to 256 rows.
PACKED_FOR_ROWS = 64
# The logits computed again in fp32: more than any close race for the next token has runners.
CLOSE = 32


class EagerLinear(Linear):
    """A matmul that may add a residual, with all else in calls of its own."""

    def _fused(self, x: Tensor, norm: Norm | None, activation: str | None, residual: Tensor | None) -> Tensor:
        if norm is not None:
            x = rms_norm(x, norm.weight, norm.eps, norm.offset)
        out = self._matmul(x, residual)
        return out if activation is None else gated(out, activation)

    def _post_normed(self, out: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
        out = rms_norm(out, norm.weight, norm.eps, norm.offset)
        return out if residual is None else out.add_(residual)

    @abstractmethod
    def _matmul(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """``x [T, in]`` -> ``x @ weight.T + bias + residual``, ``[T, out]``, in new memory."""


class DenseLinear(EagerLinear):
    """torch's own matmul with a row-major weight ``[out, in]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes over a weight ``[out, in]`` and its bias ``[out]``."""
        super().__init__(len(weight), weight=weight, bias=bias)
        self.weight, self.bias = weight, bias

    def _matmul(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = functional.linear(x, self.weight, self.bias)
        return out if residual is None else out.add_(residual)


class PackedLinear(EagerLinear):
    """oneDNN's matmul with a weight that it has blocked once, with the residual added inside it.

    All matmuls of SmolLM2 at one row, on a CPU with AVX-512: 1.4 times (bf16) and 2.3 times (fp32) the speed of
    `DenseLinear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes over a weight ``[out, in]``, which may be let go of, and its bias ``[out]``."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        super().__init__(len(weight), weight=packed, bias=bias)
        self.weight, self.bias = packed, bias
        self._plain = torch.ops.mkldnn._linear_pointwise.default
        self._added = torch.ops.mkldnn._linear_pointwise.binary

    def _matmul(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return self._plain(x, self.weight, self.bias, "none", [], "")
        return self._added(x, residual, self.weight, self.bias, "add")

    @staticmethod
    def supports(dtype: torch.dtype) -> bool:
        """Whether this CPU and this build of torch have it for `dtype`."""
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return False
        if dtype is torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return dtype is torch.float32


class EagerHead(DenseHead):
    """The highest `CLOSE` logits of each row are computed again in fp32, which needs the weight's rows.

    A second form of a tied weight may be kept beside its rows; that of a head of its own would double its memory.
    """

    def __init__(
        self,
        form: Callable[[Tensor], EagerLinear],
        rows: Tensor,
        norm: Norm,
        *,
        tied: bool,
        soft_cap: float | None = None,
    ) -> None:
        """`form` makes what multiplies with the rows where they are tied."""
        super().__init__(rows, norm, tied=tied, soft_cap=soft_cap)
        self._linear = form(rows) if tied else DenseLinear(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Head.logits`."""
        x = rms_norm(hidden, self._norm.weight, self._norm.eps, self._norm.offset)
        logits = self._linear(x).float()
        if x.dtype is not torch.float32:
            close = logits.topk(min(CLOSE, logits.shape[-1])).indices
            exact = torch.einsum("rh,rch->rc", x.float(), self._rows[close].float())
            logits.scatter_(-1, close, exact)
        return logits if self._soft_cap is None else soft_cap_(logits, self._soft_cap)
