"""Products of few rows whose tiles would not fill a GPU evenly: programs share them. `skinny.linear` launches it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from lightllmd.kernels.tile_product import finish, load_residual, multiply
from lightllmd.kernels.tiles import SHARED_COUNTERS, SHARED_SUMS


@triton.jit(do_not_specialize=["M"])
def stream_k(
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
        sums = multiply(
            x,
            weight,
            x_stride,
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
        if stop - first == blocks:
            added = None
            if residual is not None:
                added = load_residual(residual, residual_stride, m, M, group, N, BLOCK_N)
            finish(sums, added, out, bias, out_stride, m, M, group, N, ACTIVATION, BLOCK_M, BLOCK_N)
        else:
            # Whose runs hold the tile's first and last block: the inverse of begin = program * units // PROGRAMS.
            lowest = ((start + 1) * PROGRAMS - 1) // units
            highest = ((start + blocks) * PROGRAMS - 1) // units
            slot = program * 2 + tl.where(first > 0, 0, 1)
            tl.store(partial + slot * area + cell, sums, mask=used, cache_modifier=".cg")
            tl.debug_barrier()  # the whole program's stores come before its count
            if tl.atomic_add(arrived + group, 1, sem="acq_rel") == highest - lowest:
                tl.store(arrived + group, 0)
                whole = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for other in tl.range(lowest, highest + 1, num_stages=1):
                    slot = other * 2 + tl.where(other * units // PROGRAMS > start, 0, 1)
                    whole += tl.load(partial + slot * area + cell, mask=used, other=0.0, cache_modifier=".cg")
                added = None
                if residual is not None:
                    added = load_residual(residual, residual_stride, m, M, group, N, BLOCK_N)
                finish(whole, added, out, bias, out_stride, m, M, group, N, ACTIVATION, BLOCK_M, BLOCK_N)


class SharedTiles:
    """Where programs that share a tile leave their parts. Launches that may overlap need one each.

    Invariant: between launches all counters are 0.
    """

    def __init__(self, device: torch.device | str, sums: int = SHARED_SUMS, counters: int = SHARED_COUNTERS) -> None:
        self.partial = torch.empty(sums, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(counters, dtype=torch.int32, device=device)
