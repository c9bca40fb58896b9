"""Launches the matmul with a packed weight of 4 or 8 bits, cut as `tiles` says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightllmd.kernels.linear import Norm
from lightllmd.kernels.packed.gemv import packed_gemv, whole_inputs
from lightllmd.kernels.packed.layout import BLOCK_INPUTS
from lightllmd.kernels.packed.skinny import packed_skinny
from lightllmd.kernels.packed.tile import INTERPRETED
from lightllmd.kernels.packed.tiles import PackedTile
from lightllmd.kernels.packed.wide import packed_wide
from lightllmd.kernels.skinny import Launch
from lightllmd.kernels.tiles import cdiv, power_above

UNITS = 4  # of inputs of a program that makes them whole numbers
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
    for kernel, grid, arguments, options in launches(
        x, weight, out, tile, arrived, norm, bias, residual, activation, pdl
    ):
        kernel[grid](*arguments, **options)


def launches(
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
) -> list[Launch]:
    """What `multiply` launches with the same arguments, one after the other."""
    m, k = x.shape
    if tile.way == "gemv":
        return _gemv(x, weight, out, tile, norm, bias, residual, activation, pdl)
    strides = x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0)
    tiles = cdiv(weight.rows, tile.block_n), cdiv(m, tile.block_m)
    options = _common(weight, k, tile, activation, pdl)
    options |= {"BLOCK_M": tile.block_m, "STAGES": tile.stages}
    stored = weight.values, weight.scale, weight.zero
    if tile.way == "skinny":
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        options |= {"POWER": power_above(k), "TILES": tile.block_n // 16, "SLICES": tile.warps}
        return [Launch(packed_skinny, tiles, (x, *stored, out, gain, bias, residual, *strides, eps, m), options)]
    assert norm is None, "see tiles.fuses_norm"
    options |= {"BLOCK_N": tile.block_n, "SPLITS": tile.splits}
    partial = None
    if tile.splits > 1:
        elements = tile.splits * tiles[0] * tiles[1] * tile.block_n * tile.block_m
        partial = x.new_empty(elements, dtype=torch.float32)
    counters = None if partial is None else arrived
    arguments = (x, *stored, out, bias, residual, partial, counters, *strides, m)
    return [Launch(packed_wide, (*tiles, tile.splits), arguments, options)]


def _common(weight: PackedWeight, k: int, tile: PackedTile, activation: str | None, pdl: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "N": weight.rows,
        "K": k,
        "BITS": weight.bits,
        "GROUP": weight.groups_of,
        "ACTIVATION": activation,
        "BLOCKS": tile.blocks,
        "ASSEMBLY": not INTERPRETED,
    }
    return options | _started(tile.warps, pdl)


def _started(warps: int, pdl: bool) -> dict[str, Any]:
    """`launch_pdl` is an option of the CUDA backend alone, unknown to the interpreter."""
    return {"num_warps": warps, "PDL": pdl} | ({"launch_pdl": True} if pdl else {})


def _gemv(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    tile: PackedTile,
    norm: Norm | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pdl: bool,
) -> list[Launch]:
    """The inputs as whole numbers, then the sums."""
    m, k = x.shape
    units = k // (BLOCK_INPUTS * tile.blocks)
    words = x.new_empty(m * k // 2, dtype=torch.int32)
    made = words, x.new_empty(m, units, dtype=torch.float32), x.new_empty(m, units, dtype=torch.int32)
    gain, eps, offset = (None, 0.0, 0.0) if norm is None else (norm.weight, norm.eps, norm.offset)
    options = {"K": k, "BITS": weight.bits, "BLOCKS": tile.blocks, "OFFSET": offset, "POWER": power_above(k)}
    inputs = Launch(
        whole_inputs,
        (cdiv(units, UNITS), m),
        (x, gain, *made, x.stride(0), eps),
        options | {"SPAN": UNITS} | _started(4, pdl),
    )
    stored = weight.values, weight.scale, weight.zero
    strides = out.stride(0), 0 if residual is None else residual.stride(0)
    options = _common(weight, k, tile, activation, pdl)
    options |= {"M": m, "TILES": tile.block_n // 16, "SLICES": tile.warps}
    grid = (cdiv(weight.rows, tile.block_n),)
    return [inputs, Launch(packed_gemv, grid, (*made, *stored, out, bias, residual, *strides), options)]
