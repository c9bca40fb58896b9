"""Linears of a GPU whose weights have 4 or 8 bits and whose inputs have 16: the schemes w4a16 and w8a16."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.architecture import gpu_storage
from lightllmd.kernels.activation import gated
from lightllmd.kernels.cards import card_of
from lightllmd.kernels.dequantised_linear import DequantisedLinear
from lightllmd.kernels.fused_linear import FusedLinear, add_matmul, matmul, normed
from lightllmd.kernels.linear import Linear, Norm
from lightllmd.kernels.packed import tiles as packed_tiles
from lightllmd.kernels.packed.dense import dense
from lightllmd.kernels.packed.layout import pack, packs
from lightllmd.kernels.packed.matmul import PackedWeight, multiply
from lightllmd.kernels.packed.tiles import PackedTile
from lightllmd.kernels.quantised import QuantisedMatrix

ARRIVALS = 1024  # programs that may share the inputs of their tiles in one launch


class FusedPackedLinear(FusedLinear):
    """Of a weight in whole blocks (`layout`). Scales and zeros lie with a group's rows side by side."""

    def __init__(self, weight: QuantisedMatrix, bias: Tensor | None, arrived: Tensor) -> None:
        """Takes over a weight and its bias ``[out]``. `arrived`: ``[ARRIVALS]`` int32 zeros, shared by linears that
        run one after the other."""
        rows, columns = weight.shape
        bits = 4 if weight.scheme.values == "uint4" else 8
        group = weight.scheme.group if weight.scheme.group < columns else 0
        zero = None if weight.zeros is None else weight.zeros.t().contiguous()
        packed, scale = pack(weight.values, bits), weight.scales.t().contiguous()
        super().__init__(rows, weight=packed, scale=scale, zero=zero, order=weight.order, bias=bias)
        self._packed = PackedWeight(packed, scale, zero, rows, columns, bits, group)
        self.order, self.bias, self._arrived = weight.order, bias, arrived
        self._card = card_of(packed.device)

    def _fused(self, x: Tensor, norm: Norm | None, activation: str | None, residual: Tensor | None) -> Tensor:
        weight, tile = self._packed, None
        if packed_tiles.supports(x.dtype):
            shape = (weight.rows, weight.columns, weight.bits, weight.group)
            tile = packed_tiles.tile_for(self._card, len(x), *shape, activation is not None)
        if norm is not None and not self._fuses(norm, x, tile):
            x, norm = normed(x, norm), None
        if self.order is not None:
            x = x.index_select(1, self.order)
        if tile is None:
            return self._dense_matmul(x, activation, residual)
        columns = self.out_features // 2 if activation else self.out_features
        out = x.new_empty(len(x), columns) if residual is None else residual
        pdl = self._card.overlaps and x.is_cuda and packed_tiles.overlaps(len(x), weight.rows)
        multiply(x, weight, out, tile, self._arrived, norm, self.bias, residual, activation, pdl)
        return out

    def _fuses(self, norm: Norm, x: Tensor, tile: PackedTile | None) -> bool:
        """Whether the matmul is given the norm's weight, too."""
        fuses = tile is not None and packed_tiles.fuses_norm(tile, len(x), x.dtype, norm.offset)
        return fuses and self.order is None

    def _dense_matmul(self, x: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        """cuBLAS's, with some rows of the weight dense at a time."""
        weight = self._packed
        height = gpu_storage.dense_rows(weight.rows, weight.columns, x.element_size())
        scratch = x.new_empty(height, weight.columns)
        out = x.new_empty(len(x), weight.rows) if residual is None else residual
        for first in range(0, weight.rows, height):
            rows = scratch[: weight.rows - first]
            dense(weight.values, weight.scale, weight.zero, rows, first, weight.rows, weight.bits, weight.group)
            bias = None if self.bias is None else self.bias[first : first + height]
            into = out[:, first : first + height]
            if residual is None:
                matmul(x, rows, bias, into)
            else:
                add_matmul(x, rows, bias, into)
        if activation is None:
            return out
        activated = x.new_empty(len(x), self.out_features // 2)
        gated(out, activation, activated)
        return activated


class FusedPackedLinears:
    """Makes linears of these schemes for a device."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)

    takes = staticmethod(gpu_storage.packs)

    def __call__(self, weight: QuantisedMatrix, bias: Tensor | None = None) -> Linear:
        """Takes over a weight and its bias ``[out]``. One whose inputs are no whole blocks is not packed."""
        if not packs(weight.shape[1]):
            return DequantisedLinear(weight, bias)
        return FusedPackedLinear(weight, bias, self._arrived)
