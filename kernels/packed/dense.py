"""A packed weight of 4 or 8 bits made dense, in Triton: what matmuls of many rows give to cuBLAS."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.packed.layout import BLOCK_INPUTS
from lightllmd.kernels.packed.tile import INTERPRETED, MAGIC_BF16, MAGIC_FP16, block_step, first_block, nibbles

SPAN = 4  # blocks of 64 inputs of a program


@triton.jit
def _dense(
    weight,
    scale,
    zero,
    out,
    first,
    count,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Program (i, j): 16 rows from ``first + 16 i`` on, SPAN blocks of inputs from ``SPAN * j`` on. The elements of a
    plane are 16 inputs that share a scale."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    MAGIC: tl.constexpr = MAGIC_BF16 if tl.bfloat16 == DTYPE else MAGIC_FP16
    SHORT: tl.constexpr = tl.float32 != DTYPE
    ROUNDED: tl.constexpr = SHORT and scale.dtype.element_ty == DTYPE
    PARTS: tl.constexpr = 1 if GROUP % 64 == 0 else 2 if GROUP % 32 == 0 else 4  # groups of a block
    WIDTH: tl.constexpr = 16 if BITS == 4 else 64
    row = first + tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    clamped = tl.minimum(row, N - 1)
    kb = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    c = tl.arange(0, 16)
    starts, step = first_block(weight, clamped, N, K, WIDTH), block_step(clamped, N, WIDTH)
    at = (starts[:, None] + step[:, None] * kb[None, :])[:, :, None] + c[None, None, :]
    inside = ((row < first + count)[:, None] & (kb < K // 64)[None, :])[:, :, None]
    if BITS == 4:
        words = tl.load(at, mask=inside, other=0)
    into = out + (row - first)[:, None, None] * K + kb[None, :, None] * 64 + c[None, None, :]
    for j in tl.static_range(4):
        if j % (4 // PARTS) == 0:
            of_group = tl.minimum(kb * 64 + 16 * j, K - 1) // GROUP if GROUP > 0 else kb * 0
            of_group = of_group[None, :] * N + clamped[:, None]
            scales = tl.load(scale + of_group).to(tl.float32)[:, :, None]
            if zero is not None:
                zeros = tl.load(zero + of_group).to(tl.float32)[:, :, None]
        if BITS == 8:
            values = tl.load(at + 16 * j, mask=inside, other=0).to(DTYPE)  # exact, without the slow units
            if zero is not None:
                values = values.to(tl.float32) - zeros
        elif SHORT:
            # Exact, two at a time.
            values = nibbles(words, j, DTYPE, ASSEMBLY)
            if zero is not None:
                values -= (zeros + MAGIC).to(DTYPE)
            else:
                values -= tl.full([1, 1, 1], MAGIC, DTYPE)
        else:
            values = ((words >> 4 * j) & 15).to(tl.float32)
            values -= zeros if zero is not None else 0.0
        # The product of two 16-bit floats is rounded as that in fp32 is.
        dense = values.to(DTYPE) * scales.to(DTYPE) if ROUNDED else (values.to(tl.float32) * scales).to(DTYPE)
        tl.store(into + 16 * j, dense, mask=inside)


def dense(
    weight: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, first: int, rows: int, bits: int, group: int
) -> None:
    """Rows from `first` on of what ``packing.pack`` made of ``[rows, K]`` -> ``out [R, K]``, rounded once. `first` is a
    multiple of 16; scale and zero are ``[G, rows]``; group: 0 for all of a row."""
    count, columns = out.shape
    grid = (triton.cdiv(count, 16), triton.cdiv(columns // BLOCK_INPUTS, SPAN))
    options = {"N": rows, "K": columns, "BITS": bits, "GROUP": group, "SPAN": SPAN, "ASSEMBLY": not INTERPRETED}
    _dense[grid](weight, scale, zero, out, first, count, **options, num_warps=4)
