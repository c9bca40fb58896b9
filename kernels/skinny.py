"""Matmuls of a few rows with a weight in Triton: ``x [M, K] @ weight [N, K].T``, fused with what stands before and
after it in a decoder. Reading the weight once is most of the work, so each part of it is read by one program, for all
rows. Meaning: `reference.rms_norm`, `linear` and `gated`, with one rounding at the end.

Up to eight rows may go to `gemv`, more to tensor cores here; `tiles` has the rules. Not for fp32: see `tiles.supports`.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.cards import card_of
from lightllmd.kernels.gemv import gemv
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.tile_matmul import finish, load_residual, multiply, prefetch
from lightllmd.kernels.tiles import Tile, block_rows, cdiv, fuses_norm, overlaps, prefers, tile_for

__all__ = ["fuses_norm", "linear", "overlaps", "prefers"]


@triton.jit(do_not_specialize=["M"])
def _skinny(
    x,
    weight,
    out,
    bias,
    residual,
    x_stride,
    out_stride,
    residual_stride,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, j): columns of tile i, rows of block j."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(0)
    if PDL:
        prefetch(weight, group, N, K, ACTIVATION, BLOCK_N)
        gdc_wait()
    # Asked for before the matmul, which then hides the way to memory.
    added = None
    if residual is not None:
        added = load_residual(residual, residual_stride, m, M, group, N, BLOCK_N)
    sums = multiply(x, weight, x_stride, m, M, group, N, K, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVICT)
    if PDL:
        # Not earlier: programs of the next kernel would take places beside long ones of this, and spread unevenly.
        gdc_launch_dependents()
    finish(sums, added, out, bias, out_stride, m, M, group, N, ACTIVATION, BLOCK_M, BLOCK_N)


class Launch(NamedTuple):
    """One launch of a kernel, not yet made."""

    kernel: Any  # a Triton kernel: kernel[grid](*arguments, **options)
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    pdl: bool = False,
    tile: Tile | None = None,
) -> None:
    """``out [M, N] = norm(x [M, K]) @ weight [N, K].T + bias [N] + residual [M, N]``.

    With an `activation` (a key of `reference.ACTIVATIONS`) the weight is ``[2I, K]``, gate first, and out is
    ``[M, I] = act(gate) * up``, without a residual. x and weight are bf16 or fp16, out may be fp32 too. The first
    dimension's stride of x, out and residual is free, all else contiguous. `residual` may be `out`: the residual stream
    is updated in place.

    `norm` may be given where `fuses_norm` allows it. `pdl`: programmatic dependent launch, which starts this kernel
    while the one before it in the stream still runs; that one's results are waited for. `tile` overrides the rule.
    """
    kernel, grid, arguments, options = launch(x, weight, out, norm, bias, residual, activation, pdl, tile)
    kernel[grid](*arguments, **options)


def launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Norm | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pdl: bool,
    tile: Tile | None,
) -> Launch:
    """What `linear` launches with the same arguments."""
    m, k = x.shape
    n = weight.shape[0]
    if tile is None:
        tile = tile_for(m, n, k, x.dtype, activation is not None, card_of(x.device).kind)
    tiles = cdiv(n, tile.block_n)
    strides = x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0)
    options = {
        "N": n,
        "K": k,
        "ACTIVATION": activation,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "EVICT": tile.evict,
        "PDL": pdl,
        "num_warps": tile.warps,
    }
    if pdl:
        options["launch_pdl"] = True  # an option of the CUDA backend alone, unknown to the interpreter
    if tile.gemv:
        options["M"] = m
        options["OFFSET"] = 0.0 if norm is None else norm.offset
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return Launch(gemv, (tiles,), (x, weight, out, gain, bias, residual, *strides, eps), options)
    assert norm is None, "see fuses_norm"
    rows = options["BLOCK_M"] = block_rows(m)
    return Launch(_skinny, (tiles, cdiv(m, rows)), (x, weight, out, bias, residual, *strides, m), options)
