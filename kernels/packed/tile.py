"""Reading packed weights (`packing`) in Triton: where blocks lie, and 16-bit floats out of 4 and 8 bits.

A 4-bit value q is written below the bits of a power of two, whose last bits of the mantissa it becomes: MAGIC + q,
exactly.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from lightllmd.kernels.gemv import weight_row

INTERPRETED = triton.knobs.runtime.interpret  # machine code is for compilers only

# What is added to each value of 4 bits in bf16, and in fp16.
MAGIC_BF16, MAGIC_FP16 = tl.constexpr(128.0), tl.constexpr(1024.0)
# What makes two 16-bit floats of plane j of a register of two words, by dtype.
BF16_0 = tl.constexpr("lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea;")
BF16_1 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 4; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }")
BF16_2 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }")
BF16_3 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 12; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }")
FP16_0 = tl.constexpr("lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xea;")
FP16_1 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 4; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea; }")
FP16_2 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea; }")
FP16_3 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 12; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea; }")


@triton.jit
def nibbles(words, J: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Plane J of int16 words of any shape, in `DTYPE` (bf16 or fp16), MAGIC added."""
    if ASSEMBLY and tl.bfloat16 == DTYPE:
        bf16: tl.constexpr = BF16_0 if J == 0 else BF16_1 if J == 1 else BF16_2 if J == 2 else BF16_3
        made = tl.inline_asm_elementwise(bf16, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif ASSEMBLY:
        fp16: tl.constexpr = FP16_0 if J == 0 else FP16_1 if J == 1 else FP16_2 if J == 2 else FP16_3
        made = tl.inline_asm_elementwise(fp16, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        exponent: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        made = ((words >> 4 * J) & 15 | exponent).to(tl.uint16).to(DTYPE, bitcast=True)
    return made


@triton.jit
def load_inside(at, inside, WHOLE: tl.constexpr):
    """A block of the weight. WHOLE: no block reaches past its inputs."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0)


@triton.jit
def tile_rows(column, N: tl.constexpr, ACTIVATION: tl.constexpr):
    """The weight's row of each column of a tile, int64; those past the last are the last, and are never stored."""
    return tl.minimum(weight_row(column, N, ACTIVATION), N - 1)


@triton.jit
def first_block(weight, row, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to each row's words in the first block of the inputs. WIDTH: words of a row of a block."""
    return weight + (row // 16 * (16 * (K // 64)) + row % 16) * WIDTH


@triton.jit
def block_step(row, N: tl.constexpr, WIDTH: tl.constexpr):
    """Words from a row's words in one block to those in the next, of each row."""
    if N % 16 == 0:
        return tl.full(row.shape, 16 * WIDTH, tl.int32)
    return (tl.minimum(N - row // 16 * 16, 16) * WIDTH).to(tl.int32)
