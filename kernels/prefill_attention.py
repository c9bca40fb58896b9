"""Causal attention of the newest tokens of each row over all tokens of the row, which lie in the KV cache already. A
program computes one tile (`prefill_tile`). Meaning: `reference.attention`.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from lightllmd.kernels.attention_kind import Operands, attention_shape, operands, store_lines
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Heads, PrefillTiles
from lightllmd.kernels.prefill_tile import attend, keys_of, tile_at


class TileShape(NamedTuple):
    """How a program goes through the queries and keys of a tile."""

    block_m: int  # (token, head) pairs per program; divides the pairs of a tile
    block_n: int  # keys at a time
    warps: int
    stages: int  # slots go two iterations ahead of keys and values, those two ahead of the products: 5


def pairs_per_tile(tokens: int, group: int) -> int:
    """(token, head) pairs of a tile in a step that feeds `tokens`: few tokens are spread over more programs."""
    return 128 if tokens * group >= 4096 else 64


def tile_shape(dtype: torch.dtype, head_dim: int, pairs: int, quantised: bool = False) -> TileShape:
    """What fits into the registers and the shared memory of an H100; keys and values that are `quantised` go through
    registers."""
    if dtype is torch.float32:  # no tensor cores: products go through registers
        return TileShape(32, 32, 4, 3) if head_dim <= 128 else TileShape(16, 16, 4, 3)
    if head_dim > 128:
        return TileShape(pairs, 32, 8, 5)
    if head_dim > 64 and pairs == 128:
        return TileShape(128, 64 if quantised else 128, 8, 5)
    return TileShape(pairs, 64, 4, 5)


def tiles_for(counts: Sequence[int], starts: Sequence[int], group: int, pairs: int) -> NDArray[np.int32]:
    """``[N, 2]``: (row, tile of its pairs), those with the most keys first, of rows that feed ``counts`` tokens behind
    ``starts`` cached ones; N is at most ``sum(counts) * group // pairs + len(counts)``."""
    numbers = np.asarray(counts, dtype=np.int64) * group
    tiles = -(-numbers // pairs)
    row = np.repeat(np.arange(len(tiles)), tiles)
    tile = np.arange(len(row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    keys = np.asarray(starts, dtype=np.int64)[row] + np.minimum((tile + 1) * pairs, numbers[row]) // group
    order = np.argsort(-keys, kind="stable")
    return np.stack([row, tile], 1)[order].astype(np.int32)


@triton.jit(do_not_specialize_on_alignment=["tiles", "rows", "first", "counts", "starts", "runs"])
def _prefill(
    on: Operands,
    tiles,
    rows,
    first,
    counts,
    starts,
    runs,
    SHAPE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile is computed in `PARTS` programs."""
    index, begin, count, start = tile_at(tiles, counts, starts, tl.program_id(1), PARTS, BLOCK_M)
    if begin < count * SHAPE.GROUP:
        row, packed = tl.load(rows + index), tl.load(first + index)
        low, end = keys_of(runs, packed, start, count, begin, SHAPE, BLOCK_M)
        kv_head = tl.program_id(0)
        lowest: tl.constexpr = -1e30 if SHAPE.WINDOW else float("-inf")
        line, _, weight, value = attend(
            on, runs, row, packed, start, count, begin, kv_head, low, end, SHAPE, BLOCK_M, BLOCK_N, lowest
        )
        ours = begin + tl.arange(0, BLOCK_M) < count * SHAPE.GROUP
        store_lines(on.out, line, ours, value / weight[:, None], SHAPE.D)


def prefill_attention(
    q: Tensor,
    cache: LayerCache,
    heads: Heads,
    table: Tensor,
    rows: PrefillTiles,
    out: Tensor,
    *,
    shape: TileShape | None = None,
) -> None:
    """``q [T, H, D]`` (tokens may lie apart) -> the same tokens of ``out [T, H, D]`` contiguous, of all rows that have
    tiles. The keys and values of all tokens of row r are in the cache, at the slots ``table[rows.rows[r]]``; ``table
    [R, W]`` is int32. D is a power of two from 16 on. `rows.tiles` come from `tiles_for`, with `rows.pairs`; one of a
    row without tokens is passed over."""
    block_m, block_n, warps, stages = shape or tile_shape(q.dtype, heads.dim, rows.pairs, not cache.scheme.dense)
    parts = rows.pairs // block_m
    _prefill[(heads.kv, len(rows.tiles) * parts)](
        operands(q, cache, heads, table, out),
        *(rows.tiles, rows.rows, rows.first, rows.counts, rows.starts, rows.bidirectional),
        SHAPE=attention_shape(q, cache, heads),
        PARTS=parts,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
