"""The matmul of more rows with a packed weight of 4 or 8 bits, in Triton: ``out.T = weight @ x.T`` by warp groups.

Weights become 16-bit floats in registers, scaled and rounded as a dense weight would be, which are the left operand of
Hopper's warp-group instructions; x is read from shared memory by them. Each weight is made a float once for up to 256
rows of x. Where the weight is too narrow for a program on each multiprocessor, several share its inputs: the last of
them to end adds what all have found, in their order.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.packed.tile import (
    MAGIC_BF16,
    MAGIC_FP16,
    block_step,
    first_block,
    load_inside,
    nibbles,
    tile_rows,
)
from lightllmd.kernels.segments import last_to_arrive
from lightllmd.kernels.tile_matmul import finish, load_residual


@triton.jit
def _of_rows(stored):
    """``[BLOCK_N, 1]`` in fp32. The sum over one element has the compiler move these few numbers between threads, in
    place of the many that they are combined with."""
    return tl.sum(tl.reshape(stored.to(tl.float32), [1, stored.shape[0]]), 0)[:, None]


@triton.jit
def _dense(values, scales, zeros, BITS: tl.constexpr, DTYPE: tl.constexpr, ROUNDED: tl.constexpr):
    """``(values - zeros) * scales`` in `DTYPE`, rounded once. ROUNDED: scales have this dtype, so that the product of
    16-bit floats is what that in fp32 rounds to."""
    MAGIC: tl.constexpr = MAGIC_BF16 if tl.bfloat16 == DTYPE else MAGIC_FP16
    offset: tl.constexpr = MAGIC if BITS == 4 else 0.0
    if zeros is not None:
        values -= (_of_rows(zeros) + offset).to(DTYPE)
    elif BITS == 4:
        values -= tl.full([1, 1], offset, DTYPE)
    of_rows = _of_rows(scales)
    return values * of_rows.to(DTYPE) if ROUNDED else (values.to(tl.float32) * of_rows).to(DTYPE)


@triton.jit(do_not_specialize=["M"])
def packed_wide(
    x,
    weight,
    scale,
    zero,
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, j, s): columns of tile i, rows of block j, the s-th part of the inputs.

    GROUP and BLOCKS: as in `packed_skinny`. `partial`: fp32 ``[SPLITS, programs, BLOCK_N * BLOCK_M]``, `arrived`:
    int32 zeros for each program of a part; both only where SPLITS > 1. Meaning of the rest: as in `skinny`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    ROUNDED: tl.constexpr = scale.dtype.element_ty == DTYPE
    GROUPED: tl.constexpr = GROUP > 0
    PARTS: tl.constexpr = 1 if GROUP % 64 == 0 else 2 if GROUP % 32 == 0 else 4  # groups of a block
    PLANES: tl.constexpr = 4 if BITS == 4 else PARTS  # products of a block
    DEPTH: tl.constexpr = 64 // PLANES  # inputs of each
    WIDTH: tl.constexpr = 16 if BITS == 4 else 64
    SPAN: tl.constexpr = 64 * BLOCKS
    STEPS: tl.constexpr = (K + SPAN - 1) // SPAN
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS * SPAN  # inputs of a part
    whole: tl.constexpr = K % SPAN == 0
    group = tl.program_id(0)
    row = tile_rows(group * BLOCK_N + tl.arange(0, BLOCK_N), N, ACTIVATION)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, DEPTH)
    used = (m < M)[None, :]
    begin = tl.program_id(2) * SHARE
    step = block_step(row, N, WIDTH)
    tile = first_block(weight, row, N, K, WIDTH)[:, None] + c[None, :]
    inputs = x + m.to(tl.int64)[None, :] * x_stride + c[:, None]
    scales = None
    zeros = None
    if GROUPED and PARTS == 1:
        scales = tl.load(scale + begin // GROUP * N + row)
        if zero is not None:
            zeros = tl.load(zero + begin // GROUP * N + row)
    if PDL:
        gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + SHARE, K), SPAN, num_stages=STAGES):
        if GROUPED and PARTS == 1:
            # Asked for a step ahead, since the pipeline leaves loads of so few bytes where they are.
            later = tl.minimum(start + SPAN, K - 1) // GROUP * N
            next_scales = tl.load(scale + later + row)
            if zero is not None:
                next_zeros = tl.load(zero + later + row)
        for b in tl.static_range(BLOCKS):
            kb = start // 64 + b
            inside = (kb * 64 + c < K)[None, :]
            at = tile + (kb * step)[:, None]
            if BITS == 4:
                words = load_inside(at, inside, whole)
            for j in tl.static_range(PLANES):
                k = kb * 64 + DEPTH * j
                if whole:
                    values = tl.load(inputs + k, mask=used, other=0.0)
                else:
                    values = tl.load(inputs + k, mask=used & (k + c < K)[:, None], other=0.0)
                if BITS == 4:
                    a = nibbles(words, j, DTYPE, ASSEMBLY)
                else:
                    a = load_inside(at + DEPTH * j, inside, whole).to(DTYPE)
                if GROUPED and PARTS == 1:
                    a = _dense(a, scales, zeros, BITS, DTYPE, ROUNDED)
                elif GROUPED:
                    of_group = tl.minimum(k, K - 1) // GROUP * N
                    z = tl.load(zero + of_group + row) if zero is not None else None
                    a = _dense(a, tl.load(scale + of_group + row), z, BITS, DTYPE, ROUNDED)
                sums = tl.dot(a, values, sums, input_precision="ieee")
        if GROUPED and PARTS == 1:
            scales = next_scales
            if zero is not None:
                zeros = next_zeros
    if PDL:
        gdc_launch_dependents()
    last = True
    if SPLITS > 1:
        tiles = tl.num_programs(0) * tl.num_programs(1)
        number = tl.program_id(1) * tl.num_programs(0) + group
        element = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = partial + (tl.program_id(2) * tiles + number).to(tl.int64) * (BLOCK_N * BLOCK_M) + element
        tl.store(mine, sums)
        last = last_to_arrive(arrived + number, SPLITS)
        if last:
            sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for s in tl.static_range(SPLITS):
                theirs = partial + (s * tiles + number).to(tl.int64) * (BLOCK_N * BLOCK_M) + element
                # Past the first-level cache: other multiprocessors wrote it.
                sums += tl.load(theirs, cache_modifier=".cg")
    if last:
        if not GROUPED:
            sums *= tl.load(scale + row).to(tl.float32)[:, None]
        added = None
        if residual is not None:
            added = load_residual(residual, residual_stride, m, M, group, N, BLOCK_N)
        finish(tl.trans(sums), added, out, bias, out_stride, m, M, group, N, ACTIVATION, BLOCK_M, BLOCK_N)
