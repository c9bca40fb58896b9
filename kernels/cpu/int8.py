"""Linears of a CPU with weights of 8 bits, a scale for each output: torch's matmul of few bf16 rows with integers, and
oneDNN's of integers alone.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.schemes import Scheme
from lightllmd.kernels.eager_linear import EagerLinear
from lightllmd.kernels.linear import ScaledInputs, Unfinished
from lightllmd.kernels.quantised import LEVELS, SMALLEST_INPUT, QuantisedMatrix

ZERO = 128  # what stands for 0 among oneDNN's inputs, which are unsigned
# Up to so many rows torch's matmul of bf16 rows with integers is faster than one with the integers made bf16 before;
# all matmuls of SmolLM2 on an AVX-512 CPU take 0.8 (1 row) and 1.6 (8 rows) of the time that a bf16 weight takes.
FEW_ROWS = 8
WHOLE_VECTORS = 32  # of which the inputs are a multiple, since that matmul has no code for a rest


class W8A16Linear(EagerLinear):
    """Of a model in bf16 or fp32, whose inputs are multiplied as they are."""

    def __init__(self, weight: QuantisedMatrix, bias: Tensor | None = None) -> None:
        """Takes over a weight and its bias ``[out]``."""
        rows, columns = weight.shape
        self.weight, self.scale, self.bias = weight.values.contiguous(), weight.scales.float().flatten(), bias
        self._few = FEW_ROWS if rows % 16 == columns % WHOLE_VECTORS == 0 else 0
        self._ones = torch.ones(rows, dtype=torch.bfloat16)  # scales have to be in bf16 there, which ours are not
        super().__init__(rows, weight=self.weight, scale=self.scale, bias=bias)

    def _matmul(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if x.dtype is torch.bfloat16 and len(x) <= self._few:
            out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.weight, self._ones)
            if residual is not None and self.bias is None:
                return residual.addcmul_(out, self.scale)  # in fp32; of many rows torch is slow at two dtypes
        else:
            out = functional.linear(x, self.weight.to(x.dtype))  # bf16 has all integers of 8 bits
        return _rounded(out.float().mul_(self.scale), self.bias, residual, x.dtype)

    @staticmethod
    def takes(scheme: Scheme) -> bool:
        """Whether it can store a weight so."""
        return scheme.values == "int8" and not scheme.inputs and _by_output(scheme)

    @staticmethod
    @cache
    def supports(dtype: torch.dtype) -> bool:
        """Whether this build of torch has it for a model in `dtype`. In fp16, which a CPU is slow at, sums of integers
        would be too large."""
        if dtype is torch.float32:
            return True
        values = torch.arange(16 * 32).remainder(255).sub(127).view(16, 32).to(torch.int8)
        try:
            linear = W8A16Linear(QuantisedMatrix(Scheme("w8a16"), values, torch.full((16, 1), 0.5)))
            out = linear(torch.eye(32, dtype=dtype)[:FEW_ROWS])
        except (AttributeError, RuntimeError):
            return False
        return dtype is torch.bfloat16 and torch.equal(out, values.T[:FEW_ROWS] / 2)


class W8A8Linear(EagerLinear):
    """Inputs are rounded to 8 bits, with a scale for each token or one of a calibration; sums of integers are exact."""

    def __init__(self, weight: QuantisedMatrix, bias: Tensor | None = None) -> None:
        """Takes over a weight and its bias ``[out]``."""
        rows = weight.shape[0]
        self.weight = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self.scale, self.bias, self.input_scale = weight.scales.float().flatten(), bias, weight.input_scale
        self._zeros = torch.zeros(rows, dtype=torch.int32)  # oneDNN takes one for each output
        super().__init__(rows, weight=self.weight, scale=self.scale, bias=bias, input_scale=self.input_scale)

    def _taken(self, x: Unfinished) -> Tensor | Unfinished:
        return x if isinstance(x, ScaledInputs) else x.tensor()

    def _matmul(self, x: Tensor | ScaledInputs, residual: Tensor | None) -> Tensor:
        largest = None
        if isinstance(x, ScaledInputs):
            x, largest = x.x, x.largest
        values, scale = self.inputs(x, largest)
        return _rounded(self.products(values).mul_(scale), self.bias, residual, x.dtype)

    def inputs(self, x: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x [T, in]`` -> `quantised.quantised_inputs` plus `ZERO`, uint8, and fp32 scales ``[T, 1]``. `largest`: fp32
        ``[T, 1]``, of more than is here, given away."""
        largest = (x.abs().amax(1, True).float() if largest is None else largest).clamp_min_(SMALLEST_INPUT)
        if self.input_scale is not None:
            steps = torch.div(x.float(), self.input_scale).round_().clamp_(-ZERO, ZERO - 1)
            return _unsigned(steps), torch.where(largest.isfinite(), self.input_scale, largest)
        inverse = torch.full_like(largest, LEVELS["int8"]).div_(largest)
        return _unsigned(torch.mul(x, inverse).round_()), largest.div_(LEVELS["int8"])

    def products(self, values: Tensor) -> Tensor:
        """``values [T, in]`` uint8 -> fp32 ``[T, out]``, each the exact sum times its output's scale."""
        operands = (1.0, ZERO, self.weight, self.scale, self._zeros, None, 1.0, 0)
        # It reads the inputs row after row, whatever their strides say.
        return torch.ops.onednn.qlinear_pointwise.default(values.contiguous(), *operands, torch.float32, "none", [], "")

    @staticmethod
    def takes(scheme: Scheme) -> bool:
        """Whether it can store a weight so."""
        return scheme.values == scheme.inputs == "int8" and _by_output(scheme)

    @staticmethod
    @cache
    def supported() -> bool:
        """Whether this CPU and this build of torch multiply such integers, without saturation: pairs of products are
        summed in 16 bits where a CPU has no instruction for it (VNNI, AMX)."""
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return False
        values = torch.full((16, 64), 127, dtype=torch.int8)
        try:
            linear = W8A8Linear(QuantisedMatrix(Scheme("w8a8"), values, torch.ones(16, 1)))
            out = linear.products(torch.full((3, 64), 255, dtype=torch.uint8))
        except RuntimeError:
            return False
        return bool((out == 64 * 127 * (255 - ZERO)).all())


def _unsigned(steps: Tensor) -> Tensor:
    """Whole numbers from -128 to 127, plus `ZERO`: by way of int8, which torch is fast at."""
    return steps.to(torch.int8).view(torch.uint8).add_(ZERO)


def _rounded(out: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """fp32 ``out + bias + residual``, rounded once."""
    if bias is not None:
        out.add_(bias.float())
    if residual is not None:
        out.add_(residual.float())
    return out.to(dtype)


def _by_output(scheme: Scheme) -> bool:
    """One scale for each output, and inputs in their order."""
    return scheme.symmetric and not scheme.group and scheme.rows == 1 and not scheme.ordered
