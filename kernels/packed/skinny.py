"""The matmul of few rows with a packed weight of 4 or 8 bits, in Triton: ``out.T = weight @ x.T`` on tensor cores.

The weight streams through once and is the left operand, 16 rows of it for as few as 8 of x, so that one row of x costs
what eight do. Each warp of a program has a slice of every step's inputs, and their sums meet at the end: narrow weights
have too few rows for a warp each. Values become floats in registers (`tile`); scales and zeros are applied to
the sums of a group, not to weights: ``scale * (sum of x * (MAGIC + q) - (MAGIC + zero) * sum of x)``, in fp32. The sum
of x is a product with ones, which the tensor cores have time for.

At 4 TB/s an H200 has 4 instructions a thread for a weight of 4 bits; this takes about 2.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

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
from lightllmd.kernels.tile_matmul import finish, load_residual


@triton.jit
def _prefetch(start, step, kb, K: tl.constexpr, BITS: tl.constexpr):
    """Asks for a program's first blocks in the L2 cache, 128 bytes per element: `start` has each row's."""
    at = start[None, :] + step[None, :] * tl.minimum(kb, K // 64 - 1)[:, None]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _of_groups(stored, row, k, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """Scales or zeros ``[SLICES, 16]`` of the groups that the inputs `k` [SLICES] are in, as they are stored."""
    return tl.load(stored + tl.minimum(k, K - 1)[:, None] // GROUP * N + row[None, :])


@triton.jit
def _subtracted(zeros, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """What is subtracted from values, ``[SLICES, 16, 1]``. The sum over one element has the compiler move these few
    numbers between threads, in place of the many that they are subtracted from."""
    moved = tl.sum(tl.reshape(zeros.to(tl.float32), [1, zeros.shape[0], zeros.shape[1]]), 0)
    MAGIC: tl.constexpr = MAGIC_BF16 if tl.bfloat16 == DTYPE else MAGIC_FP16
    offset: tl.constexpr = MAGIC if BITS == 4 else 0.0
    return (moved + offset).to(DTYPE)[:, :, None]


@triton.jit
def _scaled(sums, total, scales, zeros, BITS: tl.constexpr, DTYPE: tl.constexpr, CENTRED: tl.constexpr):
    """The sums of a group as what they stand for."""
    if CENTRED:
        MAGIC: tl.constexpr = MAGIC_BF16 if tl.bfloat16 == DTYPE else MAGIC_FP16
        offset: tl.constexpr = MAGIC if BITS == 4 else 0.0
        if zeros is not None:
            sums -= (zeros.to(tl.float32) + offset)[:, :, None] * total
        else:
            sums -= offset * total
    return sums * scales.to(tl.float32)[:, :, None]


@triton.jit(do_not_specialize=["M"])
def packed_skinny(
    x,
    weight,
    scale,
    zero,
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    POWER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, j): the i-th TILES tiles of 16 weight rows, rows of block j of x.

    GROUP: inputs that share a scale, a multiple of 16; 0: all of a row. A step is BLOCKS blocks of 64 inputs for each
    slice, all of one group. With a norm M is 1, and POWER a power of two that is no less than K; x times the norm's
    weight is rounded, as the result of a norm of its own would be. Meaning of the rest: as in `skinny`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    GROUPED: tl.constexpr = GROUP > 0
    PARTS: tl.constexpr = 1 if GROUP % 64 == 0 else 2 if GROUP % 32 == 0 else 4  # groups of a block
    PLANES: tl.constexpr = 4 if BITS == 4 else PARTS  # products of a block
    DEPTH: tl.constexpr = 64 // PLANES  # inputs of each
    PER: tl.constexpr = PLANES // PARTS
    WIDTH: tl.constexpr = 16 if BITS == 4 else 64  # words of a row of a block
    # Zeros are subtracted from values where sums are more than values.
    SUBTRACTS: tl.constexpr = zero is not None and BLOCK_M >= 32 and PARTS == 1
    CENTRED: tl.constexpr = (BITS == 4 or zero is not None) and not SUBTRACTS
    SPAN: tl.constexpr = 64 * BLOCKS
    whole: tl.constexpr = K % (SPAN * SLICES) == 0
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.arange(0, SLICES)
    c = tl.arange(0, DEPTH)
    group = tl.program_id(0) * TILES
    rows = ()
    starts = ()
    steps = ()
    for t in tl.static_range(TILES):
        row = tile_rows((group + t) * 16 + tl.arange(0, 16), N, ACTIVATION)
        rows = rows + (row,)  # noqa: RUF005  # Triton has no starred tuples
        starts = starts + (first_block(weight, row, N, K, WIDTH),)  # noqa: RUF005
        steps = steps + (block_step(row, N, WIDTH),)  # noqa: RUF005
    if PDL:
        if BLOCK_M == 8:
            gdc_launch_dependents()
        for t in tl.static_range(TILES):
            _prefetch(starts[t], steps[t], tl.arange(0, SLICES * BLOCKS), K, BITS)
    # Weights, scales and zeros are constant: what is read of them need not wait.
    scales = ()
    zeros = ()
    if GROUPED and PARTS == 1:
        for t in tl.static_range(TILES):
            scales = scales + (_of_groups(scale, rows[t], part * SPAN, N, K, GROUP),)  # noqa: RUF005
            if zero is not None:
                zeros = zeros + (_of_groups(zero, rows[t], part * SPAN, N, K, GROUP),)  # noqa: RUF005
    if PDL:
        gdc_wait()
    # Asked for before the matmul, which then hides the way to memory.
    added = ()
    if residual is not None:
        for t in tl.static_range(TILES):
            added = added + (load_residual(residual, residual_stride, m, M, group + t, N, 16),)  # noqa: RUF005
    if norm is not None:
        every = tl.arange(0, POWER)
        row = tl.load(x + every, mask=every < K, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(row * row, 0) / K + eps)
    inputs = x + m.to(tl.int64)[None, None, :] * x_stride + c[None, :, None]
    used = (m < M)[None, None, :]
    ones = tl.full([SLICES, 16, DEPTH], 1.0, DTYPE)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros([SLICES, 16, BLOCK_M], tl.float32),)  # noqa: RUF005
    for start in tl.range(0, K, SPAN * SLICES, num_stages=STAGES):
        kb = start // 64 + part * BLOCKS
        # Asked for a step ahead, since the pipeline leaves loads of so few bytes where they are.
        next_scales = ()
        next_zeros = ()
        if GROUPED and PARTS == 1:
            k = (kb + SLICES * BLOCKS) * 64
            for t in tl.static_range(TILES):
                next_scales = next_scales + (_of_groups(scale, rows[t], k, N, K, GROUP),)  # noqa: RUF005
                if zero is not None:
                    next_zeros = next_zeros + (_of_groups(zero, rows[t], k, N, K, GROUP),)  # noqa: RUF005
        partial = ()
        if GROUPED:
            for _ in tl.static_range(TILES):
                partial = partial + (tl.zeros([SLICES, 16, BLOCK_M], tl.float32),)  # noqa: RUF005
        else:
            partial = sums
        total = tl.zeros([SLICES, 16, BLOCK_M], tl.float32)
        subtracted = ()
        if SUBTRACTS:
            for t in tl.static_range(TILES):
                subtracted = subtracted + (_subtracted(zeros[t], BITS, DTYPE),)  # noqa: RUF005
        for b in tl.static_range(BLOCKS):
            inside = (kb + b < K // 64)[:, None, None]
            words = ()
            if BITS == 4:
                for t in tl.static_range(TILES):
                    at = (starts[t][None, :] + steps[t][None, :] * (kb + b)[:, None])[:, :, None] + c[None, None, :]
                    words = words + (load_inside(at, inside, whole),)  # noqa: RUF005
            for j in tl.static_range(PLANES):
                k = (kb + b) * 64 + DEPTH * j
                if whole:
                    values = tl.load(inputs + k[:, None, None], mask=used, other=0.0)
                else:
                    values = tl.load(inputs + k[:, None, None], mask=used & inside, other=0.0)
                if norm is not None:
                    gain = tl.load(norm + k[:, None, None] + c[None, :, None], mask=inside, other=0.0)
                    values *= gain
                made = ()
                for t in tl.static_range(TILES):
                    if BITS == 4:
                        a = nibbles(words[t], j, DTYPE, ASSEMBLY)
                    else:
                        at = (starts[t][None, :] + steps[t][None, :] * (kb + b)[:, None])[:, :, None] + c[None, None, :]
                        a = load_inside(at + DEPTH * j, inside, whole).to(DTYPE)
                    if SUBTRACTS:
                        a -= subtracted[t]
                    made = made + (tl.dot(a, values, partial[t], input_precision="ieee"),)  # noqa: RUF005
                partial = made
                if CENTRED and GROUPED:
                    total = tl.dot(ones, values, total, input_precision="ieee")
                if GROUPED and PARTS > 1 and j % PER == PER - 1:
                    grown = ()
                    empty = ()
                    for t in tl.static_range(TILES):
                        s = _of_groups(scale, rows[t], k, N, K, GROUP)
                        z = _of_groups(zero, rows[t], k, N, K, GROUP) if zero is not None else None
                        grown = grown + (sums[t] + _scaled(partial[t], total, s, z, BITS, DTYPE, CENTRED),)  # noqa: RUF005
                        empty = empty + (tl.zeros([SLICES, 16, BLOCK_M], tl.float32),)  # noqa: RUF005
                    sums = grown
                    partial = empty
                    total = tl.zeros([SLICES, 16, BLOCK_M], tl.float32)
        if GROUPED and PARTS == 1:
            grown = ()
            for t in tl.static_range(TILES):
                z = zeros[t] if zero is not None else None
                grown = grown + (sums[t] + _scaled(partial[t], total, scales[t], z, BITS, DTYPE, CENTRED),)  # noqa: RUF005
            sums = grown
            scales = next_scales
            zeros = next_zeros
        if not GROUPED:
            sums = partial
    if PDL and BLOCK_M > 8:
        # Not earlier: programs of the next kernel would take places beside long ones of this, and spread unevenly.
        gdc_launch_dependents()
    for t in tl.static_range(TILES):
        y = tl.sum(sums[t], 0)
        if not GROUPED:
            y *= tl.load(scale + rows[t]).to(tl.float32)[:, None]
        if norm is not None:
            y *= root
        before = added[t] if residual is not None else None
        finish(tl.trans(y), before, out, bias, out_stride, m, M, group + t, N, ACTIVATION, BLOCK_M, 16)
