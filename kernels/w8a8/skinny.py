"""The matmul of a few tokens, rounded to 8 bits, with a weight of 8-bit values in Triton, on tensor cores: int8 by int8
in int32, fp8 by fp8 in fp32. Scales, bias, activation and residual are applied to the sums. Meaning:
`dequantised_linear`, with one rounding at the end.

With groups, sums of a block of K within one are scaled before they are added up (DeepSeek-V3 technical report, 3.3.2).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.activation import activate
from lightllmd.kernels.gemv import load_weights


@triton.jit
def weight_row(column, N: tl.constexpr, ACTIVATION: tl.constexpr, PAIR: tl.constexpr):
    """Which row of the weight makes `column` of a program's sums, as int64, none past the last.

    With an activation the weight is [gate; up], and columns that lie PAIR apart are a row of the gate and of up: the
    distance at which one thread has both.
    """
    row = column
    if ACTIVATION is not None:
        row = column // (2 * PAIR) * PAIR + column % PAIR + column // PAIR % 2 * (N // 2)
    return tl.minimum(row, N - 1).to(tl.int64)


@triton.jit
def _prefetch(weight, row, K: tl.constexpr):
    """Asks for the first 2 KiB of the rows in the L2 cache, 128 bytes per element."""
    at = tl.minimum(tl.arange(0, 16) * 128, K - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [weight + row[:, None] * K + at[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def finish(
    sums,
    added,
    out,
    bias,
    out_stride,
    m,
    M,
    row,
    group,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Bias, activation or residual of a whole tile. Its elements are this program's alone, so out may be residual.

    sums: ``[BLOCK_M, BLOCK_N]``, or with SWAP ``[BLOCK_N, BLOCK_M]``. group: which columns of the result these are.
    """
    if bias is not None:
        biases = tl.load(bias + row).to(tl.float32)
        sums += biases[:, None] if SWAP else biases[None, :]
    if ACTIVATION is None:
        y = sums
        if added is not None:
            y += added.to(tl.float32)
        column, owned = group * BLOCK_N + tl.arange(0, BLOCK_N), N
    else:
        if SWAP:
            pairs = tl.permute(tl.reshape(sums, [BLOCK_N // 16, 2, 8, BLOCK_M]), (0, 2, 3, 1))
            gate, up = tl.split(pairs)
            y = tl.reshape(activate(gate, ACTIVATION) * up, [BLOCK_N // 2, BLOCK_M])
        else:
            gate, up = tl.split(tl.reshape(sums, [BLOCK_M, BLOCK_N // 2, 2]))
            y = activate(gate, ACTIVATION) * up
        column, owned = group * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2), N // 2
    tl.store(
        place(out, out_stride, m, column, SWAP),
        y.to(out.dtype.element_ty),
        mask=inside(m, M, column, owned, SWAP),
    )


@triton.jit
def place(base, stride, m, column, SWAP: tl.constexpr):
    """Pointers of a tile of rows `m` and these columns."""
    if SWAP:
        at = m.to(tl.int64)[None, :] * stride + column[:, None]
    else:
        at = m.to(tl.int64)[:, None] * stride + column[None, :]
    return base + at


@triton.jit
def inside(m, M, column, N: tl.constexpr, SWAP: tl.constexpr):
    """Which elements of a tile there are."""
    rows, columns = m < M, column < N
    return rows[None, :] & columns[:, None] if SWAP else rows[:, None] & columns[None, :]


@triton.jit(do_not_specialize=["M"])
def skinny(
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
    SWAP: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out [M, N]`` (``[M, N / 2]`` with an activation). Program (i, j): columns of tile i, rows of block j.

    x ``[M, K]``, its scales ``[G, M]``; weight ``[N, K]``, its scales ``[G, N]``. GROUP: inputs to a scale, a multiple
    of BLOCK_K; 0: all of them. SWAP: the weight is the left factor, whose 64 rows Hopper's tensor cores want there.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(0)
    pair: tl.constexpr = 8 if SWAP else 1
    column = group * BLOCK_N + tl.arange(0, BLOCK_N)
    row = weight_row(column, N, ACTIVATION, pair)
    if PDL:
        _prefetch(weight, row, K)
        gdc_wait()
    used = m < M
    # Asked for before the matmul, which then hides the way to memory.
    added = None
    if residual is not None:
        at = place(residual, residual_stride, m, column, SWAP)
        added = tl.load(at, mask=inside(m, M, column, N, SWAP), other=0.0)
    k = tl.arange(0, BLOCK_K)
    whole: tl.constexpr = K % BLOCK_K == 0
    sum_type: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    shape: tl.constexpr = [BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N]
    rows = x + m.to(tl.int64) * K
    tile = weight + row * K
    sums = tl.zeros(shape, sum_type if GROUP == 0 else tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if SWAP:
            b = _load_rows(rows[None, :] + (start + k)[:, None], used[None, :], (start + k)[:, None], K, whole)
            a = load_weights(tile[:, None] + (start + k)[None, :], (start + k)[None, :], K, whole, EVICT)
        else:
            a = _load_rows(rows[:, None] + (start + k)[None, :], used[:, None], (start + k)[None, :], K, whole)
            b = load_weights(tile[None, :] + (start + k)[:, None], (start + k)[:, None], K, whole, EVICT)
        if GROUP == 0:
            sums = tl.dot(a, b, sums, out_dtype=sum_type)
        else:
            of = start // GROUP
            sums += _scaled(tl.dot(a, b, out_dtype=sum_type), x_scale + of * M, scale + of * N, m, used, row, SWAP)
    if PDL:
        # Not earlier: programs of the next kernel would take places beside long ones of this, and spread unevenly.
        gdc_launch_dependents()
    if GROUP == 0:
        sums = _scaled(sums, x_scale, scale, m, used, row, SWAP)
    finish(sums, added, out, bias, out_stride, m, M, row, group, N, ACTIVATION, BLOCK_M, BLOCK_N, SWAP)


@triton.jit
def _load_rows(at, used, k, K: tl.constexpr, WHOLE: tl.constexpr):
    """A block of x; WHOLE: none reaches past K."""
    there = used
    if not WHOLE:
        there = used & (k < K)
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def _scaled(sums, x_scale, scale, m, used, row, SWAP: tl.constexpr):
    """Sums in fp32, times the scales of the rows of x and of the weight."""
    of_rows = tl.load(x_scale + m, mask=used, other=0.0)
    of_weight = tl.load(scale + row)
    if SWAP:
        scaled = sums.to(tl.float32) * of_weight[:, None] * of_rows[None, :]
    else:
        scaled = sums.to(tl.float32) * of_weight[None, :] * of_rows[:, None]
    return scaled
