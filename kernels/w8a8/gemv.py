"""The matmul of one token with a weight of 8-bit values in Triton, inputs rounded inside it: what stands around it in a
decoder is one launch. Meaning: `rounded_rows` and `skinny`, with the same values of the inputs.

Each program rounds all inputs for its few rows of the weight, whose first block it has asked for before. int8 values
are multiplied four at a time, as the weight's bytes lie, which is exact; fp8 values two at a time in fp16, where
products are exact, too.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.activation import activate
from lightllmd.kernels.gemv import load_weights, weight_row
from lightllmd.kernels.w8a8.rounded_rows import inputs_scale, largest_of, rounded

CHUNK = tl.constexpr(16)  # values of the weight side by side that one thread loads


@triton.jit
def _load_inputs(x, norm, k, K: tl.constexpr, OFFSET: tl.constexpr):
    """``x * (OFFSET + norm)`` at `k` in fp32, 0 beyond K."""
    y = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if norm is not None:
        gain = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            gain += OFFSET
        y *= gain
    return y


@triton.jit
def _packed(y, WORDS: tl.constexpr):
    """Whole numbers ``[4 * WORDS]`` from -127 to 127 in fp32 -> int32 ``[WORDS]``: four bytes each."""
    at = tl.arange(0, 4)[None, :] * 8
    return tl.sum((tl.reshape(y.to(tl.int32), [WORDS, 4]) & 0xFF) << at, 1)


@triton.jit
def _dot4(a, b, sums, NATIVE: tl.constexpr):
    """``sums + a . b`` of int32 that are four int8 each."""
    if NATIVE:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            sums += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return sums


@triton.jit
def _quarters(values, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """``[ROWS, 16 * CHUNKS]`` -> four of ``[ROWS, CHUNKS, 4]``: of each 16 values side by side the first four, the
    second four and so on."""
    cut = tl.permute(tl.reshape(values, [ROWS, CHUNKS, 2, 2, 4]), (0, 1, 4, 2, 3))
    even, odd = tl.split(cut)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _products(weights, y, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr):
    """Sums ``[BLOCK_N, BLOCK_K / 16]`` of 16 products of fp8 values side by side, in fp32. HALF: four are summed in
    fp16, two at a time, which has each product exactly (of 4 by 4 bits, down to 2 ** -24) and takes a third of the
    instructions; a sum of four is rounded to 11 bits, the result to no more."""
    chunks: tl.constexpr = BLOCK_K // CHUNK
    if HALF:
        # The largest value of inputs is 448: without the factor products would be beyond fp16's.
        w0, w1, w2, w3 = _quarters(weights.to(tl.float16), BLOCK_N, chunks)
        y0, y1, y2, y3 = _quarters((y * 0.00390625).to(tl.float16)[None, :], 1, chunks)
        sums = tl.sum((w0 * y0 + w1 * y1 + w2 * y2 + w3 * y3).to(tl.float32), 2) * 256.0
    else:
        sums = tl.sum(tl.reshape(weights.to(tl.float32) * y[None, :], [BLOCK_N, chunks, CHUNK]), 2)
    return sums


@triton.jit
def _accumulate(
    sums,
    weights,
    y,
    scaled,
    scale,
    row,
    start,
    static,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    LEVEL: tl.constexpr,
    SMALLEST: tl.constexpr,
    NATIVE: tl.constexpr,
    HALF: tl.constexpr,
):
    """One block of K, from `start` on: `sums` plus the products of the weight's values with those of the inputs
    ``y [BLOCK_K]``, which `scaled` rounds. With groups the scale of each does, and scales are in the sums."""
    columns: tl.constexpr = y.shape[0]
    if GROUP == 0:
        y = rounded(y, scaled, LEVEL, static is not None)
    else:
        grouped = tl.reshape(y, [columns // GROUP, GROUP])
        group_scale, group_scaled = inputs_scale(largest_of(grouped, SMALLEST), None, LEVEL)
        y = tl.reshape(rounded(grouped, group_scaled[:, None], LEVEL, False), [columns])
    if LEVEL == 127.0:
        sums = _dot4(weights, tl.broadcast_to(_packed(y, columns // 4)[None, :], weights.shape), sums, NATIVE)
    else:
        parts = _products(weights, y, weights.shape[0], columns, HALF)
        if GROUP != 0:
            of = (start + tl.arange(0, columns // CHUNK) * CHUNK) // GROUP
            there = (of < (K + GROUP - 1) // GROUP)[None, :]
            of_inputs = tl.broadcast_to(group_scale[:, None], [columns // GROUP, GROUP // CHUNK])
            parts *= tl.reshape(of_inputs, [columns // CHUNK])[None, :]
            parts *= tl.load(scale + of[None, :] * N + row[:, None], mask=there, other=0.0)
        sums += parts
    return sums


@triton.jit
def gemv(
    x,
    weight,
    scale,
    static,
    out,
    norm,
    bias,
    residual,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LEVEL: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALL_K: tl.constexpr,
    NATIVE: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out [N]`` (``[N / 2]`` with an activation). A program makes the sums of BLOCK_N weight rows.

    weight: ``[N, K]`` float8_e4m3fn; or int32 ``[N, K / 4]``, each four int8 values. scale: ``[G, N]``. GROUP: inputs
    to a scale, 0: all of them. ALL_K: a power of two from K on. NATIVE: the device has the instruction for int8.

    PDL: started while the kernel before still runs, it may read weights, and nothing else before the wait.
    """
    if PDL:
        gdc_launch_dependents()
    int8: tl.constexpr = LEVEL == 127.0
    step: tl.constexpr = 4 if int8 else 1  # values to an element of the weight
    row = weight_row(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N, ACTIVATION)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    owned = column < N
    word = tl.arange(0, BLOCK_K // step)
    # Rows past the last are clamped, not masked: their sums are never stored.
    row = tl.minimum(row, N - 1)
    tile = weight + row[:, None] * (K // step) + word[None, :]
    whole: tl.constexpr = K % BLOCK_K == 0
    weights = load_weights(tile, word[None, :], K // step, whole, EVICT)
    if PDL:
        gdc_wait()
    added = None
    if residual is not None:
        added = tl.load(residual + column, mask=owned, other=0.0)
    every = tl.arange(0, ALL_K)
    factor = 1.0
    if norm is not None:
        plain = tl.load(x + every, mask=every < K, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(plain * plain, 0) / K + eps)
    before = factor if static is not None else 1.0  # values are cut off where they would be with the norm
    scaled = before
    if GROUP == 0:
        given = tl.reshape(_load_inputs(x, norm, every, K, OFFSET), [1, ALL_K]) * before
        all_scale, scaled = inputs_scale(largest_of(given, SMALLEST), static, LEVEL)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_N, BLOCK_K // step if int8 else BLOCK_K // CHUNK], tl.int32 if int8 else tl.float32)
    half: tl.constexpr = out.dtype.element_ty != tl.float32
    y = _load_inputs(x, norm, k, K, OFFSET) * before
    sums = _accumulate(sums, weights, y, scaled, scale, row, 0, static, N, K, GROUP, LEVEL, SMALLEST, NATIVE, half)
    for start in tl.range(BLOCK_K, K, BLOCK_K):
        at = (start // step + word)[None, :]
        weights = load_weights(tile + start // step, at, K // step, whole, EVICT)
        y = _load_inputs(x, norm, start + k, K, OFFSET) * before
        sums = _accumulate(
            sums, weights, y, scaled, scale, row, start, static, N, K, GROUP, LEVEL, SMALLEST, NATIVE, half
        )
    total = tl.sum(sums, 1).to(tl.float32) * factor if static is None else tl.sum(sums, 1).to(tl.float32)
    if GROUP == 0:
        total *= tl.load(scale + row)
        total *= all_scale
    if bias is not None:
        total += tl.load(bias + row, mask=owned, other=0.0).to(tl.float32)
    if ACTIVATION is None:
        if added is not None:
            total += added.to(tl.float32)
        tl.store(out + column, total.to(out.dtype.element_ty), mask=owned)
    else:
        gate, up = tl.split(tl.reshape(total, [BLOCK_N // 2, 2]))
        total = activate(gate, ACTIVATION) * up
        made = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(out + made, total.to(out.dtype.element_ty), mask=made < N // 2)
