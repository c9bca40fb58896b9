"""Which kernel and tile the matmul with a packed weight gets. Pure arithmetic, no Triton.

M rows of x, weight ``[N, K]`` (N counts gate and up together). What was measured on a card is in `TUNED`, as
`tests/bench/tune.py` prints it; else tiles are derived from the card's figures:

- One row, or up to four of 8 bits, is multiplied without tensor cores (`packed_gemv`): programs of few weight rows.
- A few rows stream the weight. Every program reads all of x through the second-level cache, which gives about 1.4 times
  what the memory does, so that tiles grow with M: at 8 rows, 32 weight rows of 4 bits are as many bytes as x.
- For latency to be hidden each multiprocessor has about 24 KiB in flight (4 TB/s times 800 ns) and 8 warps or more.
- More rows are bound by arithmetic: programs for all multiprocessors, and each weight made a float as seldom as can be.
- From `DENSE_ROWS` on making the whole weight dense costs less than cuBLAS is ahead: 2.5 bytes a weight of 4 bits are
  4.4 ms for 7e9 weights on an H200, where 512 rows are 9.2 ms of arithmetic at its full rate.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch

from lightllmd.kernels.cards import Card
from lightllmd.kernels.tiles import cdiv, power_above

DENSE_ROWS = 512  # up to so many the kernels read the packed weight
GEMV_ROWS = {4: 1, 8: 4}  # by bits: up to so many rows are multiplied without tensor cores
SKINNY_ROWS = {4: 1, 8: 8}  # by bits: up to so many rows stream the weight
SKINNY_STAGED = 100 << 10  # bytes of shared memory of a program, two of which a multiprocessor then has


Way = Literal["gemv", "skinny", "wide"]  # the kernel: `packed_gemv`, `packed_skinny`, `packed_wide`


class PackedTile(NamedTuple):
    """How a matmul with a packed weight is cut."""

    way: Way
    block_m: int  # rows of x of a program, a power of two; gemv: all
    block_n: int  # weight rows: gemv, skinny: in tiles of 16; wide: a power of two, 64 or more
    warps: int  # gemv, skinny: each has a slice of the inputs
    blocks: int  # of 64 inputs in a step (of each slice), all of one group
    stages: int  # steps in flight in shared memory; gemv: 1
    splits: int = 1  # programs that share a tile's inputs; wide alone


# By card and (bits, gated, N, K): the tile up to each number of rows; None: cuBLAS, with the weight made dense.
Measured = dict[tuple[int, bool, int, int], list[tuple[int, PackedTile | None]]]
TUNED: dict[str, Measured] = {
    "H200": {
        (4, False, 6144, 4096): [
            (1, PackedTile("gemv", 1, 64, 16, 2, 1, 1)),
            (8, PackedTile("wide", 16, 64, 4, 2, 3, 4)),
            (16, PackedTile("wide", 16, 128, 4, 2, 3, 8)),
            (32, PackedTile("wide", 32, 128, 4, 1, 4, 8)),
            (64, PackedTile("wide", 64, 128, 8, 2, 3, 4)),
            (128, PackedTile("wide", 128, 128, 8, 2, 3, 2)),
            (512, None),
        ],
        (4, False, 4096, 4096): [
            (1, PackedTile("gemv", 1, 32, 16, 2, 1, 1)),
            (8, PackedTile("wide", 16, 64, 4, 2, 3, 8)),
            (16, PackedTile("wide", 16, 128, 4, 1, 4, 8)),
            (32, PackedTile("wide", 32, 128, 8, 2, 3, 4)),
            (64, PackedTile("wide", 64, 128, 8, 2, 3, 4)),
            (128, PackedTile("wide", 128, 128, 8, 2, 3, 4)),
            (512, None),
        ],
        (4, True, 28672, 4096): [
            (1, PackedTile("gemv", 1, 64, 4, 2, 1, 1)),
            (8, PackedTile("wide", 16, 128, 4, 2, 3, 2)),
            (16, PackedTile("wide", 16, 64, 4, 2, 3, 1)),
            (32, PackedTile("wide", 32, 128, 8, 2, 3, 1)),
            (64, PackedTile("wide", 64, 128, 8, 2, 3, 1)),
            (128, PackedTile("wide", 128, 128, 8, 2, 3, 1)),
            (256, PackedTile("wide", 256, 128, 8, 2, 3, 1)),
        ],
        (4, False, 4096, 14336): [
            (8, PackedTile("wide", 16, 64, 4, 2, 3, 8)),
            (16, PackedTile("wide", 16, 128, 4, 2, 3, 8)),
            (32, PackedTile("wide", 32, 128, 4, 2, 3, 8)),
            (64, PackedTile("wide", 64, 128, 8, 2, 3, 8)),
            (128, PackedTile("wide", 128, 128, 8, 2, 3, 4)),
            (256, PackedTile("wide", 128, 128, 8, 2, 3, 2)),
        ],
        (8, False, 6144, 4096): [
            (1, PackedTile("gemv", 1, 16, 8, 2, 1, 1)),
            (4, PackedTile("gemv", 1, 32, 8, 2, 1, 1)),
            (8, PackedTile("skinny", 8, 64, 4, 2, 3, 1)),
            (32, PackedTile("wide", 32, 64, 4, 2, 3, 4)),
            (64, PackedTile("wide", 64, 64, 4, 2, 3, 4)),
        ],
        (8, False, 4096, 4096): [
            (1, PackedTile("gemv", 1, 16, 8, 2, 1, 1)),
            (4, PackedTile("gemv", 1, 32, 16, 2, 1, 1)),
            (8, PackedTile("wide", 16, 64, 4, 1, 4, 8)),
            (32, PackedTile("wide", 32, 64, 4, 2, 3, 8)),
            (64, PackedTile("wide", 64, 64, 4, 2, 4, 4)),
        ],
        (8, True, 28672, 4096): [
            (1, PackedTile("gemv", 1, 128, 8, 2, 1, 1)),
            (4, PackedTile("gemv", 1, 64, 4, 2, 1, 1)),
            (8, PackedTile("skinny", 8, 64, 4, 2, 3, 1)),
            (32, PackedTile("wide", 32, 64, 4, 1, 4, 1)),
            (64, PackedTile("wide", 64, 128, 8, 2, 3, 1)),
        ],
        (8, False, 4096, 14336): [
            (1, PackedTile("gemv", 1, 32, 16, 2, 1, 1)),
            (4, PackedTile("gemv", 1, 32, 16, 2, 1, 1)),
            (8, PackedTile("wide", 16, 64, 4, 2, 3, 8)),
            (32, PackedTile("wide", 32, 64, 4, 2, 3, 8)),
            (64, PackedTile("wide", 64, 64, 4, 2, 4, 4)),
        ],
    },
}


def supports(dtype: torch.dtype) -> bool:
    """Of x. fp32 would be rounded by the tensor cores."""
    return dtype in (torch.bfloat16, torch.float16)


def fuses_norm(tile: PackedTile, m: int, dtype: torch.dtype, offset: float) -> bool:
    """Whether the matmul is given the norm's weight. In fp16 x times it could overflow in `packed_skinny`."""
    return tile.way == "gemv" or (tile.way == "skinny" and m == 1 and dtype is torch.bfloat16 and offset == 0.0)


def overlaps(m: int, n: int) -> bool:
    """Whether programmatic dependent launch pays: where a program is short, so that its start is much of it."""
    return m <= 64 and n <= 65536


def largest_step(group: int, k: int) -> int:
    """Blocks of 64 inputs of a step whose inputs share a scale. group: 0 for all of a row."""
    return 2 if group == 0 or group >= k or group % 128 == 0 else 1


def fits_gemv(m: int, n: int, k: int, bits: int, group: int, gated: bool) -> bool:
    """Whether `packed_gemv` has it: whole tiles of the weight, and groups that are whole blocks."""
    return m <= GEMV_ROWS[bits] and n % (32 if gated else 16) == 0 and (group >= k or group % 64 == 0)


@functools.cache
def tile_for(card: Card, m: int, n: int, k: int, bits: int, group: int, gated: bool) -> PackedTile | None:
    """The tile of ``x [m, k] @ weight [n, k].T``; None: the weight is made dense for cuBLAS."""
    blocks = largest_step(group, k)
    for rows, tile in TUNED.get(card.kind, {}).get((bits, gated, n, k), ()):
        if m <= rows:
            return None if tile is None else tile._replace(blocks=min(blocks, tile.blocks))
    if m > DENSE_ROWS:
        return None
    if fits_gemv(m, n, k, bits, group, gated):
        return _gemv(card, n, k, blocks, gated)
    return _skinny(card, m, n, bits, blocks) if m <= SKINNY_ROWS[bits] else _wide(card, m, n, k, bits, blocks)


def staged(tile: PackedTile, bits: int) -> int:
    """Bytes of shared memory of the steps in flight."""
    slices = 1 if tile.way == "wide" else tile.warps
    step = slices * 64 * tile.blocks * (tile.block_n * bits // 8 + tile.block_m * 2)
    # Warp groups read a step while the next ones are under way; registers hold it in the other kernel.
    return step * (tile.stages if tile.way == "wide" else tile.stages - 1)


def _gemv(card: Card, n: int, k: int, blocks: int, gated: bool) -> PackedTile:
    """Programs of as many rows as leave three for each multiprocessor: each reads all inputs."""
    tiles = next((t for t in (4, 2) if cdiv(n, 16 * t) >= 3 * card.multiprocessors), 2 if gated else 1)
    while k // 64 % blocks:
        blocks //= 2
    return PackedTile("gemv", 1, 16 * tiles, 8, blocks, 1)


def _skinny(card: Card, m: int, n: int, bits: int, blocks: int) -> PackedTile:
    block_m = max(8, power_above(m))
    # At one row x is few bytes, and its norm may be computed in each program: many programs, but two tiles in each.
    enough = 1.4 if m == 1 else 0.9
    tiles = next((t for t in (4, 2) if cdiv(n, 16 * t) >= enough * card.multiprocessors), 1)
    if m > 16:
        tiles = min(2, max(2, tiles))  # more sums than registers
    programs = cdiv(n, 16 * tiles)
    warps = 8 if programs < 2 * card.multiprocessors else 4
    tile = PackedTile("skinny", block_m, 16 * tiles, warps, blocks, 2)
    limit = SKINNY_STAGED if m <= 16 else card.shared - (24 << 10)
    return _deepest(tile, bits, limit, 4)


def _wide(card: Card, m: int, n: int, k: int, bits: int, blocks: int) -> PackedTile:
    block_m = min(128, max(16, power_above(m)))
    if n > 64 * card.multiprocessors:
        if m > 128:
            block_m = 256
        return _deepest(PackedTile("wide", block_m, 128, 8, blocks, 2), bits, card.shared - (8 << 10), 3)
    programs = cdiv(n, 64) * cdiv(m, block_m)
    # Two programs on each multiprocessor; no part of less than 1024 inputs.
    splits = max(1, min(cdiv(3 * card.multiprocessors, 2 * programs), k // 1024, 8))
    tile = PackedTile("wide", block_m, 64, 4, blocks, 2, splits)
    return _deepest(tile, bits, card.shared // 2, 4)


def _deepest(tile: PackedTile, bits: int, limit: int, most: int) -> PackedTile:
    """As many stages as there is memory for; shorter steps before too few of them."""
    for blocks in range(tile.blocks, 0, -1):
        for stages in range(most, 2, -1):
            deeper = tile._replace(blocks=blocks, stages=stages)
            if staged(deeper, bits) <= limit:
                return deeper
    return tile._replace(blocks=1)
