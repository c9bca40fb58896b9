"""The matmul of many tokens, rounded to 8 bits, with a weight of 8-bit values in Triton: tiles that Hopper's copy
engine brings to shared memory and its warp groups multiply, scaled, activated and added to the residual stream before
they are stored once. Meaning: `skinny`.

cuBLAS's int8 stores int32, and none of its fp8 with groups, or stored as fp16, is in every torch that we run on.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from lightllmd.kernels.activation import activate

ROWS_TOGETHER = tl.constexpr(16)  # tiles of x that take turns for one tile of the weight, and stay in the L2 cache


@triton.jit
def _scaled(sums, x_scale, scale, bias, m, M, row):
    """Sums in fp32, times the scales of the rows of x and of the weight, plus the bias of the latter."""
    of_rows = tl.load(x_scale + m, mask=m < M, other=0.0)
    scaled = sums.to(tl.float32) * tl.load(scale + row)[None, :] * of_rows[:, None]
    if bias is not None:
        scaled += tl.load(bias + row).to(tl.float32)[None, :]
    return scaled


@triton.jit
def _multiply(a, b, sums, x_scale, scale, of, m, M, row, N: tl.constexpr, GROUP: tl.constexpr):
    """``sums + a @ b.T``, scaled where the block is of one group."""
    kind: tl.constexpr = tl.int32 if a.dtype == tl.int8 else tl.float32
    if GROUP == 0:
        sums = tl.dot(a, b.T, sums, out_dtype=kind)
    else:
        sums += _scaled(tl.dot(a, b.T, out_dtype=kind), x_scale + of * M, scale + of * N, None, m, M, row)
    return sums


@triton.jit(do_not_specialize=["M"])
def gemm(
    x,
    weight,
    x_scale,
    scale,
    out,
    bias,
    residual,
    out_stride,
    residual_stride,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out [M, N]`` (``[M, N / 2]`` with an activation). A program makes BLOCK_M by BLOCK_N of it.

    x ``[M, K]`` and weight ``[N, K]`` are descriptors of blocks of BLOCK_M and BLOCK_N times BLOCK_K; x_scale
    ``[G, M]``, scale ``[G, N]``. GROUP: inputs to a scale, a multiple of BLOCK_K; 0: all of them. With an activation a
    program multiplies the same rows of gate and of up.
    """
    made: tl.constexpr = N if ACTIVATION is None else N // 2
    high, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(made, BLOCK_N)
    together = tl.program_id(0) // (ROWS_TOGETHER * wide)
    first = together * ROWS_TOGETHER
    rows = tl.minimum(high - first, ROWS_TOGETHER)
    turn = tl.program_id(0) % (ROWS_TOGETHER * wide)
    top, left = (first + turn % rows) * BLOCK_M, turn // rows * BLOCK_N
    m, column = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    row = tl.minimum(column, made - 1)
    kind: tl.constexpr = tl.int32 if x.dtype == tl.int8 and GROUP == 0 else tl.float32
    sums = tl.zeros([BLOCK_M, BLOCK_N], kind)
    ups = tl.zeros([BLOCK_M, BLOCK_N], kind)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a, of = x.load([top, start]), start // (GROUP if GROUP != 0 else K)
        b = weight.load([left, start])
        sums = _multiply(a, b, sums, x_scale, scale, of, m, M, row, N, GROUP)
        if ACTIVATION is not None:
            c = weight.load([made + left, start])
            ups = _multiply(a, c, ups, x_scale, scale, of, m, M, made + row, N, GROUP)
    if GROUP == 0:
        y = _scaled(sums, x_scale, scale, bias, m, M, row)
        if ACTIVATION is not None:
            ups = _scaled(ups, x_scale, scale, bias, m, M, made + row)
    else:
        y = sums
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)[None, :]
            ups += tl.load(bias + N - made + row).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION) * ups
    if BLOCK_N > 128:
        # In halves, for which there are registers beside the sums.
        near, far = tl.split(tl.permute(tl.reshape(y, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))
        _store(near, out, residual, out_stride, residual_stride, m, M, left, made, BLOCK_N // 2)
        _store(far, out, residual, out_stride, residual_stride, m, M, left + BLOCK_N // 2, made, BLOCK_N // 2)
    else:
        _store(y, out, residual, out_stride, residual_stride, m, M, left, made, BLOCK_N)


@triton.jit
def _store(y, out, residual, out_stride, residual_stride, m, M, left, made: tl.constexpr, COLUMNS: tl.constexpr):
    """``y [BLOCK_M, COLUMNS]`` from column `left` on, added to the residual if there is one."""
    column = left + tl.arange(0, COLUMNS)
    there = (m < M)[:, None] & (column < made)[None, :]
    at = m.to(tl.int64)[:, None]
    if residual is not None:
        y += tl.load(residual + at * residual_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + at * out_stride + column[None, :], y.to(out.dtype.element_ty), mask=there)
