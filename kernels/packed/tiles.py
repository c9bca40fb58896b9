"""Which kernel and tile the matmul with a packed weight gets. Pure arithmetic, no Triton.

M rows of x, weight ``[N, K]`` (N counts gate and up together). What was measured on a card is in `TUNED`, as
`tests/bench/tune.py` prints it; else tiles are derived from the card's figures:

- A few rows stream the weight. Every program reads all of x through the second-level cache, which gives about 1.4 times
  what the memory does, so that tiles grow with M: at 8 rows, 32 weight rows of 4 bits are as many bytes as x.
- For latency to be hidden each multiprocessor has about 24 KiB in flight (4 TB/s times 800 ns) and 8 warps or more.
- More rows are bound by arithmetic: programs for all multiprocessors, and each weight made a float as seldom as can be.
- From `DENSE_ROWS` on making the whole weight dense costs less than cuBLAS is ahead: 2.5 bytes a weight of 4 bits are
  4.4 ms for 7e9 weights on an H200, where 512 rows are 9.2 ms of arithmetic at its full rate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lightllmd.kernels.cards import Card
from lightllmd.kernels.tiles import cdiv, power_above

DENSE_ROWS = 512  # up to so many the kernels read the packed weight
SKINNY_ROWS = 32  # up to so many rows stream the weight
SKINNY_STAGED = 100 << 10  # bytes of shared memory of a program, two of which a multiprocessor then has


class PackedTile(NamedTuple):
    """How a matmul with a packed weight is cut."""

    wide: bool  # `packed_wide` computes it, not `packed_skinny`
    block_m: int  # rows of x of a program, a power of two
    block_n: int  # weight rows: skinny: 16, 32 or 64, in tiles of 16; wide: a power of two, 64 or more
    warps: int  # skinny: each has a slice of the inputs
    blocks: int  # of 64 inputs in a step (of each slice), all of one group
    stages: int  # steps in flight
    splits: int = 1  # programs that share a tile's inputs; wide alone


# By card and (bits, gated, N, K): the tile up to each number of rows; None: cuBLAS, with the weight made dense.
Measured = dict[tuple[int, bool, int, int], list[tuple[int, PackedTile | None]]]
TUNED: dict[str, Measured] = {}


def supports(dtype: torch.dtype) -> bool:
    """Of x. fp32 would be rounded by the tensor cores."""
    return dtype in (torch.bfloat16, torch.float16)


def fuses_norm(m: int, dtype: torch.dtype, offset: float) -> bool:
    """Whether `packed_skinny` is given the norm's weight. In fp16 x times it could overflow."""
    return m == 1 and dtype is torch.bfloat16 and offset == 0.0


def overlaps(m: int, n: int) -> bool:
    """Whether programmatic dependent launch pays: where a program is short, so that its start is much of it."""
    return m <= 64 and n <= 65536


def largest_step(group: int, k: int) -> int:
    """Blocks of 64 inputs of a step whose inputs share a scale. group: 0 for all of a row."""
    return 2 if group == 0 or group >= k or group % 128 == 0 else 1


@functools.cache
def tile_for(card: Card, m: int, n: int, k: int, bits: int, group: int, gated: bool) -> PackedTile | None:
    """The tile of ``x [m, k] @ weight [n, k].T``; None: the weight is made dense for cuBLAS."""
    blocks = largest_step(group, k)
    for rows, tile in TUNED.get(card.kind, {}).get((bits, gated, n, k), ()):
        if m <= rows:
            return None if tile is None else tile._replace(blocks=min(blocks, tile.blocks))
    if m > DENSE_ROWS:
        return None
    return _skinny(card, m, n, bits, blocks) if m <= SKINNY_ROWS else _wide(card, m, n, k, bits, blocks)


def staged(tile: PackedTile, bits: int) -> int:
    """Bytes of shared memory of the steps in flight."""
    slices = 1 if tile.wide else tile.warps
    step = slices * 64 * tile.blocks * (tile.block_n * bits // 8 + tile.block_m * 2)
    # Warp groups read a step while the next ones are under way; registers hold it in the other kernel.
    return step * (tile.stages if tile.wide else tile.stages - 1)


def _skinny(card: Card, m: int, n: int, bits: int, blocks: int) -> PackedTile:
    block_m = max(8, power_above(m))
    # At one row x is few bytes, and its norm may be computed in each program: many programs, but two tiles in each.
    enough = 1.4 if m == 1 else 0.9
    tiles = next((t for t in (4, 2) if cdiv(n, 16 * t) >= enough * card.multiprocessors), 1)
    if m > 16:
        tiles = min(2, max(2, tiles))  # more sums than registers
    programs = cdiv(n, 16 * tiles)
    warps = 8 if programs < 2 * card.multiprocessors else 4
    tile = PackedTile(False, block_m, 16 * tiles, warps, blocks, 2)
    limit = SKINNY_STAGED if m <= 16 else card.shared - (24 << 10)
    return _deepest(tile, bits, limit, 4)


def _wide(card: Card, m: int, n: int, k: int, bits: int, blocks: int) -> PackedTile:
    block_m = 64 if m <= 64 else 128
    if n > 64 * card.multiprocessors:
        if m > 128:
            block_m = 256
        return _deepest(PackedTile(True, block_m, 128, 8, blocks, 2), bits, card.shared - (8 << 10), 4)
    programs = cdiv(n, 64) * cdiv(m, block_m)
    # Two programs on each multiprocessor; no part of less than 1024 inputs.
    splits = max(1, min(cdiv(3 * card.multiprocessors, 2 * programs), k // 1024, 8))
    tile = PackedTile(True, block_m, 64, 4, blocks, 2, splits)
    return _deepest(tile, bits, card.shared // 2, 4)


def _deepest(tile: PackedTile, bits: int, limit: int, most: int) -> PackedTile:
    """As many stages as there is memory for; shorter steps before too few of them."""
    for blocks in range(tile.blocks, 0, -1):
        for stages in range(most, 2, -1):
            deeper = tile._replace(blocks=blocks, stages=stages)
            if staged(deeper, bits) <= limit:
                return deeper
    return tile._replace(blocks=1)
