"""One tile of a matmul of few rows, on tensor cores: how it is multiplied and what is made of its sums."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from lightllmd.kernels.activation import activate
from lightllmd.kernels.gemv import load_weights, weight_row


@triton.jit
def prefetch(weight, group, N: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
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
def multiply(
    x,
    weight,
    x_stride,
    m,
    M,
    group,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
):
    """fp32 sums ``[BLOCK_M, BLOCK_N]`` of tile `group`."""
    used = (m < M)[:, None]
    k = tl.arange(0, BLOCK_K)
    column = group * BLOCK_N + tl.arange(0, BLOCK_N)
    # Weight rows past the last are clamped, not masked: their sums are never stored.
    row = tl.minimum(weight_row(column, N, ACTIVATION), N - 1)
    rows = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    tile = weight + row[None, :] * K + k[:, None]
    whole: tl.constexpr = K % BLOCK_K == 0
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if whole:
            a = tl.load(rows + start, mask=used, other=0.0)
        else:
            a = tl.load(rows + start, mask=used & (start + k < K)[None, :], other=0.0)
        b = load_weights(tile + start, start + k[:, None], K, whole, EVICT)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def load_residual(residual, residual_stride, m, M, group, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """``[BLOCK_M, BLOCK_N]`` of the residual stream, in its dtype."""
    column = group * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (column < N)[None, :]
    return tl.load(residual + m.to(tl.int64)[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def finish(
    sums,
    added,
    out,
    bias,
    out_stride,
    m,
    M,
    group,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, activation or residual of a whole tile. Its elements are this program's alone, so out may be residual."""
    column = group * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias is not None:
        biases = tl.load(bias + weight_row(column, N, ACTIVATION), mask=column < N, other=0.0)
        sums += biases.to(tl.float32)[None, :]
    if ACTIVATION is None:
        y = sums
        if added is not None:
            y += added.to(tl.float32)
        owned = column < N
    else:
        gate, up = tl.split(tl.reshape(sums, [BLOCK_M, BLOCK_N // 2, 2]))
        y = activate(gate, ACTIVATION) * up
        column = group * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        owned = column < N // 2
    stored = (m < M)[:, None] & owned[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * out_stride + column[None, :], y.to(out.dtype.element_ty), mask=stored)
