"""The matmul of one to four rows with a packed weight of 4 or 8 bits, in Triton: products of whole numbers, four to an
instruction.

Reading the weight is all the work. `whole_inputs` makes inputs whole numbers of 16 bits, in units of their own for each
64 or 128 of them side by side (the largest is 32767): off by 1 / 65536 of the largest, where a bf16 number so large is
rounded by 1 / 512. They are multiplied as two bytes each, with 4 or 8 bits of the weight, and sums are exact until the
scales. A thread has 16 bytes of a block's row at a time, and nothing of a weight passes through shared memory.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.kernels.activation import activate

LARGEST = tl.constexpr(32767.0)  # of the whole numbers


@triton.jit
def _dot4(a, b, sums, A_SIGNED: tl.constexpr, B_SIGNED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """``sums + a . b`` of int32 that are four bytes each."""
    if ASSEMBLY:
        code: tl.constexpr = (
            ("dp4a.s32.s32" if B_SIGNED else "dp4a.s32.u32")
            if A_SIGNED
            else ("dp4a.u32.s32" if B_SIGNED else "dp4a.u32.u32")
        )
        sums = tl.inline_asm_elementwise(
            code + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            byte_a = (a << (24 - 8 * i)) >> 24 if A_SIGNED else (a >> 8 * i) & 255
            byte_b = (b << (24 - 8 * i)) >> 24 if B_SIGNED else (b >> 8 * i) & 255
            sums += byte_a * byte_b
    return sums


@triton.jit
def _inputs(x, norm, at, there, OFFSET: tl.constexpr):
    """``x * (OFFSET + norm)`` at `at` in fp32, 0 where not `there`."""
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if norm is not None:
        gain = tl.load(norm + at, mask=there, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            gain += OFFSET
        values *= gain
    return values


@triton.jit
def whole_inputs(
    x,
    norm,
    words,
    units,
    totals,
    x_stride,
    eps,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OFFSET: tl.constexpr,
    POWER: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, m): the i-th SPAN units of row m of x, normed. A unit is BLOCKS blocks of 64 inputs.

    -> `words` int32 ``[M, K / 64, halves, 2, W]``: in the order of `packed_gemv`'s bytes, the upper ones and the lower
    ones, which are unsigned; `units` fp32 and `totals` int32 ``[M, K / (64 * BLOCKS)]``: what one is worth, and sums.
    """
    WORDS: tl.constexpr = 8 if BITS == 4 else 16
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    COUNT: tl.constexpr = K // 64
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(1).to(tl.int64)
    row = x + m * x_stride
    root = 1.0
    if norm is not None:
        every = tl.arange(0, POWER)
        plain = tl.load(row + every, mask=every < K, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(plain * plain, 0) / K + eps)
    number = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    there = number * BLOCKS < COUNT
    word = tl.arange(0, WORDS)
    byte = tl.arange(0, 4)
    # The input that byte i of word w is multiplied with, in the lower half of bytes.
    within = byte % 2 * 32 + byte // 2 if BITS == 4 else byte
    order = within[None, :] + (2 if BITS == 4 else 4) * word[:, None]
    values = ()
    largest = tl.full([SPAN, WORDS, 4], 1e-30, tl.float32)
    for b in tl.static_range(BLOCKS):
        for half in tl.static_range(HALVES):
            at = (number * BLOCKS + b)[:, None, None] * 64 + (order + 16 * half)[None, :, :]
            values = values + (_inputs(row, norm, at, there[:, None, None], OFFSET),)  # noqa: RUF005  # no starred tuples
            largest = tl.maximum(largest, tl.abs(values[b * HALVES + half]))
    most = tl.max(tl.max(largest, 2), 1)
    unit = (tl.full([SPAN], LARGEST, tl.float32) / most)[:, None, None]
    shift = (byte * 8)[None, None, :]
    total = tl.zeros([SPAN], tl.int32)
    for b in tl.static_range(BLOCKS):
        for half in tl.static_range(HALVES):
            scaled = values[b * HALVES + half] * unit
            whole = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int32)
            total += tl.sum(tl.sum(whole, 2), 1)
            into = words + (((m * COUNT + number * BLOCKS + b) * HALVES + half) * 2 * WORDS)[:, None] + word[None, :]
            tl.store(into, tl.sum(((whole >> 8) & 255) << shift, 2), mask=there[:, None])
            tl.store(into + WORDS, tl.sum((whole & 255) << shift, 2), mask=there[:, None])
    # What is no finite number is none among the whole ones: it stays told in what its unit is worth.
    broken = tl.zeros([SPAN], tl.float32)
    for i in tl.static_range(BLOCKS * HALVES):
        broken += tl.sum(tl.sum(values[i] * 0.0, 2), 1)
    tl.store(units + m * (COUNT // BLOCKS) + number, most * (root / LARGEST) + broken, mask=there)
    tl.store(totals + m * (COUNT // BLOCKS) + number, total, mask=there)


@triton.jit
def packed_gemv(
    words,
    units,
    totals,
    weight,
    scale,
    zero,
    out,
    bias,
    residual,
    out_stride,
    residual_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out [M, N]`` (``[M, N / 2]`` with an activation) of a weight of whole tiles: 16 rows by 64 inputs.

    A program makes the sums of TILES tiles of weight rows; each of its SLICES warps has the BLOCKS blocks of one unit
    in a step. With an activation tiles take turns: of the gate, then of the same rows of up. `words`, `units` and
    `totals` are of `whole_inputs`. GROUP: inputs that share a scale, a multiple of 64 * BLOCKS; 0: all of a row.

    PDL: started while the kernel before still runs, it may read weights, and nothing else before the wait.
    """
    GROUPED: tl.constexpr = GROUP > 0
    WORDS: tl.constexpr = 8 if BITS == 4 else 16  # int32 of a row of a block
    HALVES: tl.constexpr = 2 if BITS == 4 else 1  # of a byte
    SIGNED: tl.constexpr = weight.dtype.element_ty == tl.int8
    COUNT: tl.constexpr = K // 64
    UNITS: tl.constexpr = COUNT // BLOCKS
    if PDL:
        gdc_launch_dependents()
    tile = tl.arange(0, TILES)
    r = tl.arange(0, 16)
    if ACTIVATION is None:
        first = (tl.program_id(0) * TILES + tile) * 16
        owned = first < N
    else:
        first = (tl.program_id(0) * (TILES // 2) + tile // 2) * 16
        owned = first < N // 2
        first += tile % 2 * (N // 2)
    first = tl.where(owned, first, 0)
    row = first[:, None] + r[None, :]  # [TILES, 16]
    part = tl.arange(0, SLICES)
    word = tl.arange(0, WORDS)
    starts = weight.to(tl.pointer_type(tl.int32)) + first.to(tl.int64)[None, :, None, None] * (COUNT * WORDS)
    starts += (r[:, None] * WORDS + word[None, :])[None, None, :, :]
    # Weights, scales and zeros are constant: what is read of them need not wait.
    ahead = ()
    for b in tl.static_range(BLOCKS):
        early = tl.minimum(part * BLOCKS + b, COUNT - 1)[:, None, None, None]
        ahead = ahead + (tl.load(starts + early * (16 * WORDS), eviction_policy="evict_first"),)  # noqa: RUF005
    if PDL:
        gdc_wait()
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([SLICES, TILES, 16], tl.float32),)  # noqa: RUF005
    for begin in tl.range(0, UNITS, SLICES):
        here = ahead
        ahead = ()
        for b in tl.static_range(BLOCKS):
            later = tl.minimum((begin + SLICES + part) * BLOCKS + b, COUNT - 1)[:, None, None, None]
            ahead = ahead + (tl.load(starts + later * (16 * WORDS), eviction_policy="evict_first"),)  # noqa: RUF005
        number = begin + part
        there = (number < UNITS)[:, None, None]
        number = tl.minimum(number, UNITS - 1)
        if GROUPED:
            of = (number * (64 * BLOCKS) // GROUP * N)[:, None, None] + row[None, :, :]
            scales = tl.load(scale + of).to(tl.float32)
        if zero is not None:
            of = (number * (64 * BLOCKS) // (GROUP if GROUPED else K) * N)[:, None, None] + row[None, :, :]
            zeros = tl.load(zero + of).to(tl.int32)
        grown = ()
        for m in tl.static_range(M):
            above = tl.zeros([SLICES, TILES, 16, WORDS], tl.int32)
            below = tl.zeros([SLICES, TILES, 16, WORDS], tl.int32)
            for b in tl.static_range(BLOCKS):
                for half in tl.static_range(HALVES):
                    a = (here[b] >> 4 * half) & 0x0F0F0F0F if BITS == 4 else here[b]
                    at = ((m * COUNT + number * BLOCKS + b) * HALVES + half) * (2 * WORDS)
                    of_words = words + at[:, None, None, None] + word[None, None, None, :]
                    upper = tl.broadcast_to(tl.load(of_words), a.shape)
                    lower = tl.broadcast_to(tl.load(of_words + WORDS), a.shape)
                    above = _dot4(a, upper, above, SIGNED, True, ASSEMBLY)
                    below = _dot4(a, lower, below, SIGNED, False, ASSEMBLY)
            made = tl.sum((above << 8) + below, 3)
            if zero is not None:
                made -= zeros * tl.load(totals + m * UNITS + number)[:, None, None]
            unit = tl.load(units + m * UNITS + number)[:, None, None]
            if UNITS % SLICES != 0:
                unit = tl.where(there, unit, 0.0)
            made = made.to(tl.float32) * unit
            grown = grown + (sums[m] + (made * scales if GROUPED else made),)  # noqa: RUF005
        sums = grown
    for m in tl.static_range(M):
        y = tl.sum(sums[m], 0)  # [TILES, 16]
        if not GROUPED:
            y *= tl.load(scale + row).to(tl.float32)
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)
        if ACTIVATION is None:
            if residual is not None:
                y += tl.load(residual + m * residual_stride + row).to(tl.float32)
            tl.store(out + m * out_stride + row, y.to(out.dtype.element_ty), mask=owned[:, None] & (r < 16)[None, :])
        else:
            gate, up = tl.split(tl.permute(tl.reshape(y, [TILES // 2, 2, 16]), (0, 2, 1)))
            column = (tl.program_id(0) * (TILES // 2) + tl.arange(0, TILES // 2))[:, None] * 16 + r[None, :]
            y = activate(gate, ACTIVATION) * up
            tl.store(out + m * out_stride + column, y.to(out.dtype.element_ty), mask=column < N // 2)
