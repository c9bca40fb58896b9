"""Which kernel and tile a matmul of few rows gets: plain rules, tuned offline on an H100 with `tests/bench/kernels.py
--sweep`, and what `tests/bench/tune.py` has measured on other cards. Pure arithmetic, no Triton, so that a plan can be
made where there is none.

M rows of x, weight ``[N, K]`` (N counts gate and up together), in bf16 or fp16.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

GEMV_ROWS = 8  # the most that `gemv` takes; each has a fp32 accumulator of its own in registers
BLOCK_ROWS = 128  # rows of x that one program of the tensor-core kernel covers at most


class Tile(NamedTuple):
    """How a matmul of few rows is cut, and which kernel computes it."""

    gemv: bool
    block_n: int  # weight rows of a tile, a power of two; at least 2 if gated: both halves of a column
    block_k: int
    warps: int
    stages: int  # blocks of K in flight in shared memory; 1: in registers
    evict: str = ""  # cache hint of reads of the weight: "" or "evict_first"


# By card (`cards.Card.kind`) and (gated, N, K): the tile up to each number of rows, fewest first; None: cuBLAS.
# The rules below are those of an H100, and of every card that is not in here.
TUNED: dict[str, dict[tuple[bool, int, int], list[tuple[int, Tile | None]]]] = {}


def _measured(kind: str, m: int, n: int, k: int, gated: bool) -> tuple[int, Tile | None] | None:
    found = TUNED.get(kind, {}).get((gated, n, k), ())
    return next((entry for entry in found if m <= entry[0]), None)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_above(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


def supports(dtype: torch.dtype) -> bool:
    """fp32 is left to cuBLAS: the tensor cores would round it, and it is not served for speed."""
    return dtype in (torch.bfloat16, torch.float16)


def prefers(m: int, n: int, k: int, dtype: torch.dtype, gated: bool, kind: str = "H100") -> bool:
    """Whether the matmul here beats cuBLAS's (with a separate activation if `gated`) on a card of this kind.

    Up to 16 rows always. With more only for larger weights, or where an activation is saved.
    Milliseconds of a step's matmuls, norms and activations of an 8B model, cuBLAS and ours: 5.74 and 5.05 at 1 row,
    5.83 and 5.56 at 4, 5.90 and 5.64 at 8, 5.91 and 5.65 at 16, 6.00 and 5.87 at 32, 6.06 and 5.95 at 64, 6.44 and
    6.83 at 128.
    """
    if not supports(dtype):
        return False
    measured = _measured(kind, m, n, k, gated)
    if measured is not None:
        return measured[1] is not None
    if gated or n > 65536:
        return m <= (128 if n > 8192 else 64)
    return m <= (64 if k > 8192 else 32 if k >= 4096 else 16)


def fuses_norm(m: int, dtype: torch.dtype) -> bool:
    """Whether `linear` is to be given the norm's weight; else the caller norms x in a kernel of its own.

    Every program norms all rows for its few columns: with two rows that costs more than it saves. On tensor cores,
    where x * norm would also have to be rounded, it more than doubled the time, so only `gemv` does it, in fp32: there
    it can't overflow either (residual streams reach 1e4).
    """
    return m == 1


def overlaps(m: int, n: int) -> bool:
    """Whether programmatic dependent launch pays: where a program is short, so that its start is much of it."""
    return n <= (65536 if m <= 2 else 2048)


def gemv_rows(n: int) -> int:
    """Up to how many rows `tile_for` chooses `gemv`. Narrow weights have too few tiles for tensor cores."""
    return 2 if n > 2048 else 4


def block_rows(m: int) -> int:
    """BLOCK_M of the tensor-core kernel: the rows of x a program covers."""
    return min(BLOCK_ROWS, max(16, power_above(m)))


@functools.cache
def tile_for(m: int, n: int, k: int, dtype: torch.dtype, gated: bool, kind: str = "H100") -> Tile:
    """The fastest measured for ``x [m, k] @ weight [n, k].T``; `gated`: the weight is [gate; up]."""
    measured = _measured(kind, m, n, k, gated)
    if measured is not None and measured[1] is not None:
        return measured[1]
    if m <= gemv_rows(n):
        tile = _gemv_tile(m, n, k)
        return tile._replace(block_n=max(2, tile.block_n)) if gated else tile
    rows = block_rows(m)
    block_k = next((block for block in (256, 128, 64) if k % block == 0), 64)
    narrow = min(block_k, 128)
    if rows <= 16:
        if n > 8192:
            return Tile(False, 32, block_k, 4, 3)
        return Tile(False, 32, narrow, 4, 4 if n > 4096 else 6)
    if rows <= 32:
        if n > 4096:
            return Tile(False, 64 if n > 65536 else 32, narrow, 4, 4)
        return Tile(False, 16, block_k, 4, 4) if k > 8192 else Tile(False, 32, narrow, 4, 6)
    if rows <= 64:
        return Tile(False, 64, narrow, 4, 3) if n > 8192 else Tile(False, 32, narrow, 4, 5)
    # Every program reads all of x through the L2 cache: no more than of the weight where a tile is a square.
    return Tile(False, 128, narrow, 8, 3) if n > 8192 else Tile(False, 64, narrow, 8, 4)


def _gemv_tile(m: int, n: int, k: int) -> Tile:
    """Few rows per program where N is small, for there to be programs enough; long blocks of K, in registers."""
    whole = next((block for block in (4096, 2048, 1024, 512) if k % block == 0), min(power_above(k), 1024))
    if m > 2:
        return Tile(True, 1, min(whole, 1024), 2, 1, evict="evict_first")
    if m == 2:
        return Tile(True, 2 if n > 4096 else 1, min(whole, 2048), 8 if whole > 1024 else 4, 1, evict="evict_first")
    if whole <= 1024:
        return Tile(True, 2 if n <= 4096 else 4, whole, 4 if n <= 2048 else 2, 1, evict="evict_first")
    if n > 8192:
        return Tile(True, 2, whole, 8, 1)
    if n > 4096:
        return Tile(True, 1, min(whole, 2048), 8, 1, evict="evict_first")
    rows = 2 if n <= 2048 else 8 if k > 8192 else 4
    return Tile(True, rows, whole, 8, 1, evict="evict_first")
