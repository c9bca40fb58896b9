"""Which kernel and tile a matmul of 8-bit inputs with an 8-bit weight gets: plain rules, as those of `tiles`.

M rows of x, weight ``[N, K]`` (N counts gate and up together). Reasoned from what was measured of 16-bit weights and
from the machine code, not yet measured: Hopper multiplies fp8 by warp groups alone, whose left factor has 64 rows, and
makes fp16 of it otherwise, which takes more instructions, but tiles as narrow as few rows of the weight need.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lightllmd.architecture.schemes import Scheme
from lightllmd.kernels.tiles import cdiv, power_above

SKINNY_ROWS = 64  # the most that tiles of ours are better for than cuBLAS's
GEMM_ROWS = 129  # from so many on tiles are brought by the copy engine
BLOCK_ROWS = 128  # rows of x that one of its programs covers at most


class Tile8(NamedTuple):
    """How a matmul of few rows is cut, and which kernel computes it."""

    gemv: bool  # of one row, which is rounded inside
    block_n: int  # weight rows of a tile, a power of two; at least 2 if gated, 16 if swapped, too
    block_k: int
    warps: int
    stages: int = 1  # blocks of K in flight in shared memory
    swap: bool = False  # the weight is the left factor
    evict: str = "evict_first"  # cache hint of reads of the weight: "" or "evict_first"


def supports(scheme: Scheme) -> bool:
    """Whether the kernels have it: groups of inputs are blocks of a matmul's K."""
    plain = scheme.symmetric and not scheme.ordered and scheme.inputs == scheme.values and scheme.scales == "float32"
    grouped = scheme.values == "float8_e4m3fn" and scheme.group in (32, 64, 128, 256) and not scheme.static
    return plain and (grouped or not scheme.group)


def prefers_cublas(m: int, n: int, k: int, dtype: torch.dtype, scheme: Scheme) -> bool:
    """Whether cuBLAS multiplies these rows faster: it has fp8 with a scale for each row, stored as bf16. Its int8
    stores int32, which is four bytes to write and to read again where one kernel writes two."""
    fits = scheme.values == "float8_e4m3fn" and not scheme.group and dtype is torch.bfloat16
    return fits and m > SKINNY_ROWS and n % 16 == 0 and k % 16 == 0


class WholeTile(NamedTuple):
    """How a matmul of many rows is cut: each program makes ``block_m x block_n`` of the result."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def whole_tile_for(m: int, n: int, group: int, gated: bool, multiprocessors: int = 132) -> WholeTile:
    """The largest of those that are as many as the card has multiprocessors, or nearly: the larger, the less of shared
    memory is read for each product. Gated: of gate and of up, so each is as two. With groups the sums of one are held
    beside all, which takes as many registers again."""
    made = n // 2 if gated else n
    sizes = [(128, 128, 8), (64, 128, 4), (64, 64, 4)]
    if not group and not gated:
        sizes.insert(0, (128, 256, 8))
    if group and gated:
        sizes = [(128, 64, 8), (64, 64, 4)]
    enough = 0.9 * multiprocessors
    fits = (size for size in sizes if cdiv(m, size[0]) * cdiv(made, size[1]) >= enough)
    rows, columns, warps = next(fits, sizes[-1])
    return WholeTile(rows, columns, min(group or 128, 128), warps, 4 if rows * columns > 4096 else 5)


def copies(k: int) -> bool:
    """Whether the copy engine takes rows of so many bytes."""
    return k % 16 == 0


def rounds_inside(m: int, k: int, int8: bool) -> bool:
    """Whether the matmul rounds its inputs itself. int8 is read in words of four, and a row of x held in registers."""
    return m == 1 and k <= 32768 and (k % 4 == 0 or not int8)


def block_rows(m: int) -> int:
    """BLOCK_M of the tensor-core kernel: the rows of x that a program covers."""
    return min(BLOCK_ROWS, max(16, power_above(m)))


def overlaps(m: int) -> bool:
    """Whether programmatic dependent launch pays. What rounds the inputs has as many programs as they have rows: with
    few there are places left for the matmul's, which ask for their weights meanwhile."""
    return m <= SKINNY_ROWS


@functools.cache
def tile_for(m: int, n: int, k: int, group: int, inside: bool) -> Tile8:
    """For ``x [m, k] @ weight [n, k].T``, with so many inputs to a scale (0: all). `inside`: x is one token that the
    matmul rounds."""
    if inside:
        # Many rows of the weight, for which all inputs are rounded once; no more than give every place a program.
        block_k = min(max(power_above(k), 512), 4096 if k <= 4096 else 2048)
        rows = (4 if group and k > 4096 else 8) if n >= 4096 else 4 if n >= 2048 else 2
        return Tile8(True, rows, block_k, 8 if block_k >= 2048 else 4)
    rows = block_rows(m)
    block_k = 128 if group or k % 256 else 256
    if group:
        block_k = min(block_k, group)
    if rows <= 32:
        if n > 8192:
            return Tile8(False, 64, block_k, 4, 4, swap=True)
        return Tile8(False, 32 if n > 2048 else 16, block_k, 4, 4)
    if rows <= 64:
        return Tile8(False, 64 if n > 8192 else 32, block_k, 4, 4)
    return Tile8(False, 128 if n > 8192 else 64, min(block_k, 128), 8, 4)
