"""Launches of the matmuls with 8-bit inputs and an 8-bit weight in Triton, fused with what stands around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lightllmd.architecture.schemes import Scheme
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.quantised import LEVELS, SMALLEST_INPUT
from lightllmd.kernels.skinny import Launch
from lightllmd.kernels.tiles import cdiv
from lightllmd.kernels.w8a8.gemm import gemm
from lightllmd.kernels.w8a8.gemv import gemv
from lightllmd.kernels.w8a8.rounded_rows import QuantisedRows
from lightllmd.kernels.w8a8.skinny import skinny
from lightllmd.kernels.w8a8.tiles import GEMM_ROWS, Tile8, WholeTile, block_rows, tile_for, whole_tile_for


@dataclass(frozen=True, eq=False)
class Weight8:
    """A weight as these kernels read it."""

    scheme: Scheme
    values: Tensor  # [N, K] int8 or float8_e4m3fn
    scales: Tensor  # [G, N] fp32
    input_scale: Tensor | None = None  # [] fp32, of static schemes
    bias: Tensor | None = None  # [N]
    copied: bool = False  # the device has a copy engine for tiles: Hopper and later


def linear(
    x: Tensor | QuantisedRows,
    weight: Weight8,
    out: Tensor,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    pdl: bool = False,
    tile: Tile8 | WholeTile | None = None,
) -> None:
    """``out [M, N] = norm(x [M, K]) @ weight [N, K].T + bias [N] + residual [M, N]``, inputs rounded by the scheme.

    x is rounded already, or it is one token (``[1, K]``, contiguous) of the model's dtype, for which `norm` may be
    given: see `tiles.rounds_inside`. With an `activation` (a key of `reference.ACTIVATIONS`) the weight is
    ``[2I, K]``, gate first, and out is ``[M, I] = act(gate) * up``, without a residual. The first dimension's stride of
    out and residual is free. `residual` may be `out`. `pdl`, `tile`: as in `skinny.linear`; a `WholeTile` is for rows
    that are rounded, of a K that `tiles.copies` takes.
    """
    kernel, grid, arguments, options = launch(x, weight, out, norm, residual, activation, pdl, tile)
    kernel[grid](*arguments, **options)


def launch(
    x: Tensor | QuantisedRows,
    weight: Weight8,
    out: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    activation: str | None,
    pdl: bool,
    tile: Tile8 | WholeTile | None,
) -> Launch:
    """What `linear` launches with the same arguments."""
    n, k = weight.values.shape
    scheme, rows = weight.scheme, len(out)
    if tile is None and rows >= GEMM_ROWS and weight.copied:
        tile = whole_tile_for(rows, n, scheme.group, activation is not None)
    if isinstance(tile, WholeTile):
        assert isinstance(x, QuantisedRows)
        return _whole(x, weight, out, residual, activation, tile)
    if tile is None:
        tile = tile_for(rows, n, k, scheme.group, isinstance(x, Tensor))
    options: dict[str, Any] = {
        "N": n,
        "K": k,
        "GROUP": scheme.group,
        "ACTIVATION": activation,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVICT": tile.evict,
        "PDL": pdl,
        "num_warps": tile.warps,
    }
    if pdl:
        options["launch_pdl"] = True  # an option of the CUDA backend alone, unknown to the interpreter
    if isinstance(x, Tensor):
        int8 = scheme.values == "int8"
        options["LEVEL"], options["SMALLEST"] = LEVELS[scheme.inputs], SMALLEST_INPUT
        options["ALL_K"], options["NATIVE"] = triton.next_power_of_2(k), x.is_cuda
        gain, eps, options["OFFSET"] = (None, 0.0, 0.0) if norm is None else (norm.weight, norm.eps, norm.offset)
        values = weight.values.view(torch.int32) if int8 else weight.values
        given = (x, values, weight.scales, weight.input_scale, out, gain, weight.bias, residual, eps)
        return Launch(gemv, (cdiv(n, tile.block_n),), given, options)
    block_m = options["BLOCK_M"] = block_rows(rows)
    options["STAGES"], options["SWAP"] = tile.stages, tile.swap
    strides = out.stride(0), 0 if residual is None else residual.stride(0)
    arguments = (x.values, weight.values, x.scales, weight.scales, out, weight.bias, residual, *strides, rows)
    return Launch(skinny, (cdiv(n, tile.block_n), cdiv(rows, block_m)), arguments, options)


def _whole(
    x: QuantisedRows, weight: Weight8, out: Tensor, residual: Tensor | None, activation: str | None, tile: WholeTile
) -> Launch:
    """Of many rows."""
    (n, k), rows = weight.values.shape, len(out)
    blocks = [
        TensorDescriptor.from_tensor(values, [block, tile.block_k])
        for values, block in ((x.values, tile.block_m), (weight.values, tile.block_n))
    ]
    options = {
        "N": n,
        "K": k,
        "GROUP": weight.scheme.group,
        "ACTIVATION": activation,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
    strides = out.stride(0), 0 if residual is None else residual.stride(0)
    arguments = (*blocks, x.scales, weight.scales, out, weight.bias, residual, *strides, rows)
    grid = (cdiv(rows, tile.block_m) * cdiv(n // 2 if activation else n, tile.block_n),)
    return Launch(gemm, grid, arguments, options)
