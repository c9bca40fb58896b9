"""Linears of a GPU whose weights and inputs have 8 bits: int8 or fp8.

Matmuls of few rows stream the weight through kernels of our own, and one token is rounded inside them; larger ones are
cuBLAS's where it has the scales of the scheme, or tiles of our own. Inputs are rounded in one launch with the norm
before them, or with the activation that the linear before left to this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.errors import EngineError
from lightllmd.kernels.fused_linear import FusedLinear, overlaps
from lightllmd.kernels.linear import Norm, ScaledInputs, Unfinished
from lightllmd.kernels.quantised import QuantisedMatrix
from lightllmd.kernels.w8a8.matmul import Weight8, linear
from lightllmd.kernels.w8a8.rounded_rows import GatedProduct, QuantisedRows, quantise_rows
from lightllmd.kernels.w8a8.tiles import copies, prefers_cublas, rounds_inside, supports
from lightllmd.kernels.w8a8.tiles import overlaps as rows_overlap

# Whether fp8 sums stay in the tensor cores' own accumulators, of 14 bits or so, for a whole row. Promoting them to fp32
# costs cuBLAS a fifth of its rate; the rounding of the inputs is an order of magnitude coarser.
FAST_SUMS = True


class FusedW8A8Linear(FusedLinear):
    """Of a weight in a scheme that rounds its inputs, to 8 bits as the weight is."""

    def __init__(self, weight: QuantisedMatrix, bias: Tensor | None = None) -> None:
        """Takes over a weight and its bias ``[out]``. Raises EngineError on a card without fp8."""
        scheme, device = weight.scheme, weight.values.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < scheme.capability:
            needed = ".".join(map(str, scheme.capability))
            raise EngineError(f"weights stored as {scheme.name!r} need a GPU of compute capability {needed} or higher")
        scales = weight.scales.t().contiguous()  # [G, N]: those of a tile lie together
        self._overlaps = overlaps(device)
        copied = self._overlaps and copies(weight.shape[1])
        self.weight = Weight8(scheme, weight.values, scales, weight.input_scale, bias, copied)
        super().__init__(
            len(weight.values), weight=weight.values, scale=scales, input_scale=weight.input_scale, bias=bias
        )

    takes = staticmethod(supports)

    def _taken(self, x: Unfinished) -> Tensor | Unfinished:
        return x if isinstance(x, GatedProduct | ScaledInputs) else x.tensor()

    def _fused(
        self, x: Tensor | Unfinished, norm: Norm | None, activation: str | None, residual: Tensor | None
    ) -> Tensor | Unfinished:
        source, largest = (x.x, x.largest) if isinstance(x, ScaledInputs) else (x, None)
        source = source.gate_up if isinstance(source, GatedProduct) else source
        assert isinstance(source, Tensor)
        rows, columns = source.shape[0], self.weight.values.shape[1]
        pdl = self._overlaps and rows_overlap(rows)
        inputs: Tensor | QuantisedRows = source
        if not isinstance(x, Tensor) or not rounds_inside(rows, columns, self.weight.scheme.values == "int8"):
            gates = x.activation if isinstance(x, GatedProduct) else None
            given = {"norm": norm, "activation": gates, "static": self.weight.input_scale, "largest": largest}
            inputs, norm = quantise_rows(source, self.weight.scheme, pdl=pdl, **given), None
        if isinstance(inputs, QuantisedRows) and self._on_cublas(rows, source.dtype):
            out = self._cublas(inputs, source.dtype)
            if activation is not None:
                return GatedProduct(out, activation)
            return out if residual is None else residual.add_(out)
        made = self.out_features if activation is None else self.out_features // 2
        out = source.new_empty(rows, made) if residual is None else residual
        linear(inputs, self.weight, out, norm=norm, residual=residual, activation=activation, pdl=pdl)
        return out

    def _on_cublas(self, rows: int, dtype: torch.dtype) -> bool:
        return prefers_cublas(rows, *self.weight.values.shape, dtype, self.weight.scheme)

    def _cublas(self, inputs: QuantisedRows, dtype: torch.dtype) -> Tensor:
        """``inputs @ weight.T + bias``, ``[T, out]``."""
        return torch._scaled_mm(
            inputs.values,
            self.weight.values.t(),
            scale_a=inputs.scales.view(-1, 1),
            scale_b=self.weight.scales,
            bias=self.weight.bias,
            out_dtype=dtype,
            use_fast_accum=FAST_SUMS,
        )


W8A8 = dict.fromkeys(("w8a8", "fp8", "fp8_block"), FusedW8A8Linear)
