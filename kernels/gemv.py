"""The matmul of one to eight rows with a weight, in Triton, as multiplications and sums: reading the weight is all the
work, and programs of a few weight rows keep the most bytes in flight. Meaning: `reference.linear` and its like.

All arithmetic is in fp32; the only rounding is that of the result. `skinny.linear` launches it.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.activation import activate


@triton.jit
def weight_row(column, N: tl.constexpr, ACTIVATION: tl.constexpr):
    """Which row of the weight makes `column` of a program's sums, as int64.

    With an activation the weight is [gate; up], and columns 2i and 2i + 1 are row i of the gate and of up: side by
    side, so that `tl.split` parts them without moving data between threads.
    """
    row = column if ACTIVATION is None else column // 2 + column % 2 * (N // 2)
    return row.to(tl.int64)


@triton.jit
def load_weights(tile, k, K: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """A block of the weight at pointers `tile`; `k` of their shape says which of K. WHOLE: no block reaches past K."""
    if WHOLE:
        return tl.load(tile, eviction_policy=EVICT)
    return tl.load(tile, mask=k < K, other=0.0, eviction_policy=EVICT)


@triton.jit
def _accumulate(sums, squares, weights, x, x_stride, norm, k, K: tl.constexpr, M: tl.constexpr, OFFSET: tl.constexpr):
    """One block of K: sums[m] [BLOCK_N, BLOCK_K] += weights * x[m] * (OFFSET + norm), squares[m] [BLOCK_K] += x[m]²."""
    wide = weights.to(tl.float32)
    inside = k < K
    if norm is not None:
        scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            scale += OFFSET
    new_sums = ()
    new_squares = ()
    for m in tl.static_range(M):
        row = tl.load(x + m * x_stride + k, mask=inside, other=0.0).to(tl.float32)
        if norm is not None:
            new_squares = new_squares + (squares[m] + row * row,)  # noqa: RUF005  # Triton has no starred tuples
            row = row * scale
        new_sums = new_sums + (sums[m] + wide * row[None, :],)  # noqa: RUF005
    return new_sums, new_squares


@triton.jit
def gemv(
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
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out [M, N]`` (``[M, N / 2]`` with an activation). A program makes the sums of BLOCK_N weight rows.

    PDL: started while the kernel before still runs, it may read weights, and nothing else before the wait.
    """
    if PDL:
        gdc_launch_dependents()
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = weight_row(column, N, ACTIVATION)
    owned = column < N
    k = tl.arange(0, BLOCK_K)
    whole: tl.constexpr = K % BLOCK_K == 0
    # Rows past the last are clamped, not masked: their sums are never stored.
    tile = weight + tl.minimum(row, N - 1)[:, None] * K + k[None, :]
    sums = ()
    squares = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)  # noqa: RUF005
        if norm is not None:
            squares = squares + (tl.zeros([BLOCK_K], tl.float32),)  # noqa: RUF005
    weights = load_weights(tile, k[None, :], K, whole, EVICT)
    if PDL:
        gdc_wait()
    # Asked for before the matmul, which then hides the way to memory.
    added = ()
    if residual is not None:
        for m in tl.static_range(M):
            added = added + (tl.load(residual + m * residual_stride + column, mask=owned, other=0.0),)  # noqa: RUF005
    sums, squares = _accumulate(sums, squares, weights, x, x_stride, norm, k, K, M, OFFSET)
    for start in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        weights = load_weights(tile + start, start + k[None, :], K, whole, EVICT)
        sums, squares = _accumulate(sums, squares, weights, x, x_stride, norm, start + k, K, M, OFFSET)
    for m in tl.static_range(M):
        y = tl.sum(sums[m], 1)
        if norm is not None:
            y *= tl.rsqrt(tl.sum(squares[m], 0) / K + eps)
        if bias is not None:
            y += tl.load(bias + row, mask=owned, other=0.0).to(tl.float32)
        if ACTIVATION is None:
            if residual is not None:
                y += added[m].to(tl.float32)
            tl.store(out + m * out_stride + column, y.to(out.dtype.element_ty), mask=owned)
        else:
            gate, up = tl.split(tl.reshape(y, [BLOCK_N // 2, 2]))
            y = activate(gate, ACTIVATION) * up
            made = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            tl.store(out + m * out_stride + made, y.to(out.dtype.element_ty), mask=made < N // 2)
