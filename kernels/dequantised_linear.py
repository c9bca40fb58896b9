"""Linears of any scheme on any device, by torch's own operations: the weight is made dense for each matmul.

Right everywhere and fast nowhere: what a device has until it has kernels for a scheme.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.schemes import SCHEMES
from lightllmd.kernels.eager_linear import EagerLinear
from lightllmd.kernels.linear import ScaledInputs, Unfinished
from lightllmd.kernels.quantised import QuantisedMatrix, quantised_inputs
from lightllmd.kernels.schemes import ANY


class DequantisedLinear(EagerLinear):
    """Of a weight in any scheme."""

    def __init__(self, weight: QuantisedMatrix, bias: Tensor | None = None) -> None:
        """Takes over a weight and its bias ``[out]``."""
        self.scheme, self._columns = weight.scheme, weight.shape[1]
        packed = pack_nibbles(weight.values) if weight.scheme.values == "uint4" else weight.values
        self.weight, self.scale, self.zero, self.order = packed, weight.scales, weight.zeros, weight.order
        self.input_scale = weight.input_scale
        held = {"weight": self.weight, "scale": self.scale, "zero": self.zero, "order": self.order, "bias": bias}
        super().__init__(len(packed), **held, input_scale=self.input_scale)
        self.bias = bias

    def _taken(self, x: Unfinished) -> Tensor | Unfinished:
        return x if isinstance(x, ScaledInputs) else x.tensor()

    def _matmul(self, x: Tensor | ScaledInputs, residual: Tensor | None) -> Tensor:
        largest = None
        if isinstance(x, ScaledInputs):
            x, largest = x.x, x.largest
        if self.scheme.inputs:
            values, scales = quantised_inputs(x, self.scheme, self.input_scale, largest)
            rounded = QuantisedMatrix(self.scheme, values, scales)
            out = functional.linear(rounded.dense(torch.float32), self._dense(torch.float32)).to(x.dtype)
            out = out if self.bias is None else out.add_(self.bias)
        else:
            out = functional.linear(x, self._dense(x.dtype), self.bias)
        return out if residual is None else out.add_(residual)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        packed = self.scheme.values == "uint4"
        values = unpack_nibbles(self.weight, self._columns) if packed else self.weight
        return QuantisedMatrix(self.scheme, values, self.scale, self.zero, self.order).dense(dtype)


DEQUANTISED = {name: DequantisedLinear for name in (ANY, *SCHEMES) if name != "dense"}


def pack_nibbles(values: Tensor) -> Tensor:
    """``[N, K]`` uint8 of 0 to 15 -> ``[N, ceil(K / 2)]`` uint8: the even column of a pair in the low half."""
    pairs = functional.pad(values, (0, values.shape[1] % 2)).contiguous().view(torch.int16)
    return (pairs | pairs >> 4).to(torch.uint8)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """``[N, columns]``, from what `pack_nibbles` made."""
    pairs = packed.to(torch.int16)
    return (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)[:, :columns]
