"""Launches the matmul with a packed weight of 4 or 8 bits, cut as `tiles` says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightllmd.kernels.linear import Norm
from lightllmd.kernels.packed.skinny import packed_skinny
from lightllmd.kernels.packed.tile import INTERPRETED
from lightllmd.kernels.packed.tiles import PackedTile
from lightllmd.kernels.packed.wide import packed_wide
from lightllmd.kernels.skinny import Launch
from lightllmd.kernels.tiles import cdiv, power_above

ONE_GROUP = 1 << 24  # more inputs than a row has, and a multiple of every step


class PackedWeight(NamedTuple):
    """A weight ``[rows, columns]`` as it lies on a device."""

    values: Tensor  # as `packing.pack` has them
    scale: Tensor  # [G, rows]
    zero: Tensor | None  # [G, rows]
    rows: int
    columns: int
    bits: int  # 4 or 8
    group: int  # inputs that share a scale, a multiple of 16; 0: all of a row

    @property
    def groups_of(self) -> int:
        """The GROUP of the kernels: 0 only where scales are for the sums of whole rows."""
        return self.group or (0 if self.bits == 8 and self.zero is None else ONE_GROUP)


def multiply(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    tile: PackedTile,
    arrived: Tensor,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    pdl: bool = False,
) -> None:
    """``out [M, N] = norm(x [M, K]) @ weight.T + bias [N] + residual [M, N]``; meaning and strides as in
    `skinny.linear`. `norm`: of one row, without an offset. `arrived`: int32 zeros, one for each of a launch's tiles.
    """
    kernel, grid, arguments, options = launch(x, weight, out, tile, arrived, norm, bias, residual, activation, pdl)
    kernel[grid](*arguments, **options)


def launch(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    tile: PackedTile,
    arrived: Tensor,
    norm: Norm | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pdl: bool,
) -> Launch:
    """What `multiply` launches with the same arguments."""
    m, k = x.shape
    strides = x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0)
    tiles = cdiv(weight.rows, tile.block_n), cdiv(m, tile.block_m)
    options: dict[str, Any] = {
        "N": weight.rows,
        "K": k,
        "BITS": weight.bits,
        "GROUP": weight.groups_of,
        "ACTIVATION": activation,
        "BLOCK_M": tile.block_m,
        "BLOCKS": tile.blocks,
        "STAGES": tile.stages,
        "ASSEMBLY": not INTERPRETED,
        "PDL": pdl,
        "num_warps": tile.warps,
    }
    if pdl:
        options["launch_pdl"] = True  # an option of the CUDA backend alone, unknown to the interpreter
    stored = weight.values, weight.scale, weight.zero
    if not tile.wide:
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        options |= {"POWER": power_above(k), "TILES": tile.block_n // 16, "SLICES": tile.warps}
        return Launch(packed_skinny, tiles, (x, *stored, out, gain, bias, residual, *strides, eps, m), options)
    assert norm is None, "see tiles.fuses_norm"
    options |= {"BLOCK_N": tile.block_n, "SPLITS": tile.splits}
    partial = None
    if tile.splits > 1:
        elements = tile.splits * tiles[0] * tiles[1] * tile.block_n * tile.block_m
        partial = x.new_empty(elements, dtype=torch.float32)
    counters = None if partial is None else arrived
    arguments = (x, *stored, out, bias, residual, partial, counters, *strides, m)
    return Launch(packed_wide, (*tiles, tile.splits), arguments, options)
