"""The matmul of one token with a weight of 8-bit values in Triton, inputs rounded inside it: what stands around it in a
decoder is one launch. Meaning: `quantised_rows` and `w8a8_skinny`, with the same values of the inputs.

Each program rounds all inputs for its few rows of the weight, whose first block it has asked for before. int8 values
are multiplied four at a time, as the weight's bytes lie, which is exact; fp8 values in fp32.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.activation import activate
from lightllmd.kernels.gemv import load_weights, weight_row
from lightllmd.kernels.quantised_rows import inputs_scale, largest_of, rounded

CHUNK = tl.constexpr(16)  # neighbouring values of the weight that one thread loads


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
    if GROUP == 0:
        y = tl.reshape(_load_inputs(x, norm, every, K, OFFSET), [1, ALL_K]) * before
        all_scale, scaled = inputs_scale(largest_of(y, SMALLEST), static, LEVEL)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_N, BLOCK_K // step if int8 else BLOCK_K // CHUNK], tl.int32 if int8 else tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        if start > 0:
            weights = load_weights(tile + start // step, (start // step + word)[None, :], K // step, whole, EVICT)
        y = _load_inputs(x, norm, start + k, K, OFFSET) * before
        if GROUP == 0:
            y = rounded(y, scaled, LEVEL, static is not None)
        else:
            y = tl.reshape(y, [BLOCK_K // GROUP, GROUP])
            group_scale, group_scaled = inputs_scale(largest_of(y, SMALLEST), None, LEVEL)
            y = rounded(y, group_scaled[:, None], LEVEL, False)
            y = tl.reshape(y * group_scale[:, None], [BLOCK_K])
        if int8:
            sums = _dot4(weights, tl.broadcast_to(_packed(y, BLOCK_K // 4)[None, :], weights.shape), sums, NATIVE)
        else:
            products = weights.to(tl.float32) * y[None, :]
            parts = tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // CHUNK, CHUNK]), 2)
            if GROUP != 0:
                of = (start + tl.arange(0, BLOCK_K // CHUNK) * CHUNK) // GROUP
                in_rows = (of < (K + GROUP - 1) // GROUP)[None, :]
                parts *= tl.load(scale + of[None, :] * N + row[:, None], mask=in_rows, other=0.0)
            sums += parts
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
