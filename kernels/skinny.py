"""Products of a few rows with a weight in Triton: ``x [M, K] @ weight [N, K].T``, fused with what stands before and
after it in a decoder. Reading the weight once is most of the work, so each part of it is read by one program, for all
rows. Meaning: `reference.rms_norm`, `linear` and `gated`, with one rounding at the end.

Up to eight rows may go to `gemv`, more to tensor cores here; `tiles` has the rules. Not for fp32: see `supports`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.activation import activate
from lightllmd.kernels.gemv import gemv, load_weights, weight_row
from lightllmd.kernels.tiles import (
    SHARED_COUNTERS,
    SHARED_SUMS,
    Tile,
    block_rows,
    cdiv,
    fuses_norm,
    prefers,
    supports,
    tile_for,
)

__all__ = ["SharedTiles", "fuses_norm", "linear", "prefers", "supports"]


@triton.jit
def _prefetch(weight, group, N: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """Asks for the first 2 KiB of the tile's weight rows in the L2 cache, 128 bytes per element."""
    row = tl.minimum(weight_row(group * BLOCK_N + tl.arange(0, BLOCK_N), N, ACTIVATION), N - 1)
    at = tl.minimum(tl.arange(0, 16) * 64, K - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [weight + row[:, None] * K + at[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _multiply(
    x,
    weight,
    norm,
    x_stride,
    eps,
    m,
    M,
    group,
    first,
    end,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
):
    """fp32 sums ``[BLOCK_M, BLOCK_N]`` over ``first <= k < end`` of tile `group`."""
    used = (m < M)[:, None]
    k = tl.arange(0, BLOCK_K)
    column = group * BLOCK_N + tl.arange(0, BLOCK_N)
    # Weight rows past the last are clamped, not masked: their sums are never stored.
    row = tl.minimum(weight_row(column, N, ACTIVATION), N - 1)
    rows = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    tile = weight + row[None, :] * K + k[:, None]
    whole: tl.constexpr = K % BLOCK_K == 0
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if norm is not None:
        squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        if whole:
            a = tl.load(rows + start, mask=used, other=0.0)
        else:
            a = tl.load(rows + start, mask=used & (start + k < K)[None, :], other=0.0)
        b = load_weights(tile + start, start + k[:, None], K, whole, EVICT)
        if norm is not None:
            wide = a.to(tl.float32)
            squares += wide * wide
            scale = tl.load(norm + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            a = (wide * scale[None, :]).to(a.dtype)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if norm is not None:
        sums *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    return sums


@triton.jit
def _finish(
    sums,
    out,
    bias,
    residual,
    out_stride,
    residual_stride,
    m,
    M,
    group,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, activation and residual of a whole tile. Its elements are this program's alone, so out may be residual."""
    column = group * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias is not None:
        added = tl.load(bias + weight_row(column, N, ACTIVATION), mask=column < N, other=0.0)
        sums += added.to(tl.float32)[None, :]
    if ACTIVATION is None:
        y = sums
        owned = column < N
    else:
        gate, up = tl.split(tl.reshape(sums, [BLOCK_M, BLOCK_N // 2, 2]))
        y = activate(gate, ACTIVATION) * up
        column = group * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        owned = column < N // 2
    stored = (m < M)[:, None] & owned[None, :]
    m = m.to(tl.int64)[:, None]
    if residual is not None:
        y += tl.load(residual + m * residual_stride + column[None, :], mask=stored, other=0.0).to(tl.float32)
    tl.store(out + m * out_stride + column[None, :], y.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["M"])
def _skinny(
    x,
    weight,
    out,
    norm,
    bias,
    residual,
    x_stride,
    out_stride,
    residual_stride,
    eps,
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
        gdc_launch_dependents()
        _prefetch(weight, group, N, K, ACTIVATION, BLOCK_N)
        gdc_wait()
    sums = _multiply(
        x, weight, norm, x_stride, eps, m, M, group, 0, K, N, K, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVICT
    )
    _finish(sums, out, bias, residual, out_stride, residual_stride, m, M, group, N, ACTIVATION, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def _shared(
    x,
    weight,
    out,
    bias,
    residual,
    partial,
    arrived,
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
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Stream-K (Osama et al., PPoPP 2023): the blocks of K of all tiles in a row, an equal run of them per program.

    A program that made only a part of a tile leaves it in ``partial [PROGRAMS, 2, BLOCK_M, BLOCK_N]`` (index 0: its
    run began inside that tile; 1: it ended there) and counts itself in ``arrived [tiles]``. Who counts last adds the
    parts in their order, so the result does not depend on who that is, and sets the counter to 0 for the next launch.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    units: tl.constexpr = blocks * ((N + BLOCK_N - 1) // BLOCK_N)
    area: tl.constexpr = BLOCK_M * BLOCK_N
    program = tl.program_id(0)
    begin = program * units // PROGRAMS
    end = (program + 1) * units // PROGRAMS
    m = tl.arange(0, BLOCK_M)
    cell = m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    used = (m < M)[:, None]
    for group in tl.range(begin // blocks, (end + blocks - 1) // blocks, num_stages=1):
        start = group * blocks
        first = tl.maximum(begin - start, 0)
        stop = tl.minimum(end - start, blocks)
        sums = _multiply(
            x,
            weight,
            None,
            x_stride,
            0.0,
            m,
            M,
            group,
            first * BLOCK_K,
            tl.minimum(stop * BLOCK_K, K),
            N,
            K,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            EVICT,
        )
        complete = stop - first == blocks
        if not complete:
            # Whose runs hold the tile's first and last block: the inverse of begin = program * units // PROGRAMS.
            lowest = ((start + 1) * PROGRAMS - 1) // units
            highest = ((start + blocks) * PROGRAMS - 1) // units
            slot = program * 2 + tl.where(first > 0, 0, 1)
            tl.store(partial + slot * area + cell, sums, mask=used, cache_modifier=".cg")
            tl.debug_barrier()  # the whole program's stores come before its count
            complete = tl.atomic_add(arrived + group, 1, sem="acq_rel") == highest - lowest
            if complete:
                tl.store(arrived + group, 0)
                sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for other in tl.range(lowest, highest + 1, num_stages=1):
                    slot = other * 2 + tl.where(other * units // PROGRAMS > start, 0, 1)
                    sums += tl.load(partial + slot * area + cell, mask=used, other=0.0, cache_modifier=".cg")
        if complete:
            _finish(
                sums, out, bias, residual, out_stride, residual_stride, m, M, group, N, ACTIVATION, BLOCK_M, BLOCK_N
            )


class SharedTiles:
    """Where programs that share a tile leave their parts. Launches that may overlap need one each.

    Invariant: between launches all counters are 0.
    """

    def __init__(self, device: torch.device | str, sums: int = SHARED_SUMS, counters: int = SHARED_COUNTERS) -> None:
        self.partial = torch.empty(sums, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(counters, dtype=torch.int32, device=device)


class Launch(NamedTuple):
    kernel: Any  # a Triton kernel: kernel[grid](*arguments, **options)
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    shared: SharedTiles | None = None,
    pdl: bool = False,
    tile: Tile | None = None,
) -> None:
    """``out [M, N] = rms_norm(x [M, K], norm [K], eps) @ weight [N, K].T + bias [N] + residual [M, N]``.

    With an `activation` (a key of `reference.ACTIVATIONS`) the weight is ``[2I, K]``, gate first, and out is
    ``[M, I] = act(gate) * up``. x and weight are bf16 or fp16, out may be fp32 too. The first dimension's stride of x,
    out and residual is free, all else contiguous. `residual` may be `out`: the residual stream is updated in place.

    `norm` may be given where `fuses_norm` allows it. `shared` lets programs share tiles, which some shapes need for an
    even load. `pdl`: programmatic dependent launch, which starts this kernel while the one before it in the stream
    still runs; that one's results are waited for. `tile` overrides the rule.
    """
    kernel, grid, arguments, options = launch(x, weight, out, norm, eps, bias, residual, activation, shared, pdl, tile)
    kernel[grid](*arguments, **options)


def launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    shared: SharedTiles | None,
    pdl: bool,
    tile: Tile | None,
) -> Launch:
    """What `linear` launches."""
    m, k = x.shape
    n = weight.shape[0]
    if tile is None:
        tile = tile_for(m, n, k, x.dtype, shared is not None and norm is None)
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
        return Launch(gemv, (tiles,), (x, weight, out, norm, bias, residual, *strides, eps), options)
    rows = options["BLOCK_M"] = block_rows(m)
    if not tile.programs:
        grid = tiles, cdiv(m, rows)
        return Launch(_skinny, grid, (x, weight, out, norm, bias, residual, *strides, eps, m), options)
    assert shared is not None
    options["PROGRAMS"] = tile.programs
    parts = shared.partial, shared.arrived
    return Launch(_shared, (tile.programs,), (x, weight, out, bias, residual, *parts, *strides, m), options)
